"""Runtimes by name, and how each opens its file."""

from pathlib import Path
from typing import Literal

from profilers.runners.base import Runner
from profilers.runners.cuda import check_tf32

RUNTIMES: dict[str, Literal["onnx", "program", "engine"]] = {
    "ort-cpu": "onnx",
    "ort-cuda": "onnx",
    "ort-tensorrt": "onnx",
    "torch": "program",
    "torch-cuda": "program",
    "torch-graph-cuda": "program",
    "torch-compile": "program",
    "torch-compile-cuda": "program",
    "tensorrt": "engine",
    "rtx": "engine",
}
"""Runtime name to the kind of file it runs: an ONNX file, an exported program (`.pt2`), or an engine."""

GPU_RUNTIMES = (
    "ort-cuda",
    "ort-tensorrt",
    "torch-cuda",
    "torch-graph-cuda",
    "torch-compile-cuda",
    "tensorrt",
    "rtx",
)
"""Those that need a CUDA device."""

TENSORRT_RUNTIMES = ("ort-tensorrt", "tensorrt", "rtx")
"""Those in which TensorRT, or TensorRT for RTX, computes."""

ORT_PROVIDERS = {
    "ort-cpu": "CPUExecutionProvider",
    "ort-cuda": "CUDAExecutionProvider",
    "ort-tensorrt": "TensorrtExecutionProvider",
}
"""Runtimes of ONNX Runtime, and the execution provider that each is."""


# Compute capabilities that TensorRT for RTX supports (NVIDIA's support matrix); an H200 refuses its engines.
_RTX = ((7, 5), (8, 6), (8, 9), (12, 0), (12, 1))
# The least compute capability with tensor cores of a precision (TensorRT's support matrix).
_LEAST_CAPABILITY = {"tf32": (8, 0), "bf16": (8, 0), "fp8": (8, 9)}


def lacking_device(runtime: str) -> str:
    """Why there is no device here for ``runtime``, in a few words; empty where there is one."""
    if runtime not in GPU_RUNTIMES:
        return ""
    import torch

    if not torch.cuda.is_available():
        return "no GPU is present"
    if runtime == "rtx" and torch.cuda.get_device_capability(0) not in _RTX:
        return f"{torch.cuda.get_device_name(0)} cannot run TensorRT for RTX, take tensorrt there"
    return ""


def lacking_precision(runtime: str, precision: str) -> str:
    """Why TensorRT cannot compute in ``precision`` on the GPU, in a few words; empty where it can or there is none."""
    if runtime not in TENSORRT_RUNTIMES or precision not in _LEAST_CAPABILITY:
        return ""
    import torch

    if not torch.cuda.is_available():
        return ""
    here, least = torch.cuda.get_device_capability(0), _LEAST_CAPABILITY[precision]
    if here >= least:
        return ""
    needed = f"{least[0]}.{least[1]}"
    return f"{torch.cuda.get_device_name(0)} (compute capability {here[0]}.{here[1]}) has no {precision}, {needed} has"


def open_runner(runtime: str, path: Path, threads: int, *, tf32: bool = False, cuda_graphs: bool = True) -> Runner:
    """Loads a file into a runtime.

    Args:
        runtime: one of `RUNTIMES`.
        path: a file of the kind that the runtime takes.
        threads: CPU threads of one run.
        tf32: float32 matrix products and convolutions on a GPU may use it, which rounds their operands to 10 bits of
            mantissa. An engine uses it or not as it was built, a CPU never does.
        cuda_graphs: engines replay a CUDA graph where they can be captured in one.

    Raises:
        ValueError: the runtime is unknown.
        ProfilingError: the file cannot be loaded, the device is absent, or the environment forbids TF32;
            MissingPackageError: the package is absent.
    """
    if runtime not in RUNTIMES:
        raise ValueError(f"unknown runtime {runtime!r}: choose from {', '.join(RUNTIMES)}")
    if runtime in GPU_RUNTIMES:
        check_tf32(tf32)
    if runtime in ORT_PROVIDERS:
        from profilers.runners.ort import OnnxRuntimeRunner

        return OnnxRuntimeRunner(path, ORT_PROVIDERS[runtime], threads, tf32=tf32)
    if RUNTIMES[runtime] == "engine":
        from profilers.runners.trt import TensorRTRunner

        return TensorRTRunner(path, runtime, cuda_graphs=cuda_graphs)
    from profilers.runners.pyt import TorchRunner

    device = "cuda" if runtime.endswith("-cuda") else "cpu"
    compiled, graph = runtime.startswith("torch-compile"), runtime == "torch-graph-cuda"
    return TorchRunner(path, device, threads, compiled=compiled, graph=graph, tf32=tf32)
