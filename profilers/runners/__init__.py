"""Runtimes by name, and how each opens its file."""

from pathlib import Path
from typing import Literal

from .base import Runner

RUNTIMES: dict[str, Literal["onnx", "program", "engine"]] = {
    "ort-cpu": "onnx",
    "ort-cuda": "onnx",
    "torch": "program",
    "torch-cuda": "program",
    "torch-compile": "program",
    "torch-compile-cuda": "program",
    "tensorrt": "engine",
    "rtx": "engine",
}
"""Runtime name to the kind of file it runs: an ONNX file, an exported program (`.pt2`), or an engine."""

GPU_RUNTIMES = ("ort-cuda", "torch-cuda", "torch-compile-cuda", "tensorrt", "rtx")
"""Those that need a CUDA device."""


def open_runner(runtime: str, path: Path, threads: int) -> Runner:
    """Loads a file into a runtime.

    Args:
        runtime: one of `RUNTIMES`.
        path: a file of the kind that the runtime takes.
        threads: CPU threads of one run.

    Raises:
        ValueError: the runtime is unknown.
        ProfilingError: the file cannot be loaded or the device is absent; MissingPackageError: so is the package.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"unknown runtime {runtime!r}: choose from {', '.join(RUNTIMES)}")
    if RUNTIMES[runtime] == "onnx":
        from .onnxruntime import OnnxRuntimeRunner

        provider = "CUDAExecutionProvider" if runtime == "ort-cuda" else "CPUExecutionProvider"
        return OnnxRuntimeRunner(path, provider, threads)
    if RUNTIMES[runtime] == "engine":
        from .tensorrt import TensorRTRunner

        return TensorRTRunner(path, runtime)
    from .torch import TorchRunner

    device = "cuda" if runtime.endswith("-cuda") else "cpu"
    return TorchRunner(path, device, threads, compiled=runtime.startswith("torch-compile"))
