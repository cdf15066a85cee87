"""Runtimes by name. Each opens its kind of file."""

from pathlib import Path
from pkgutil import resolve_name

from profilers.runners.base import Runner, RunSettings
from profilers.runners.cuda import check_tf32
from profilers.runners.registry import SPECS


def open_runner(runtime: str, path: Path, threads: int, *, tf32: bool = False, cuda_graphs: bool = True) -> Runner:
    """Load a file into a runtime.

        with open_runner("ort-cpu", Path("net.onnx"), threads=4) as runner:
            outputs = runner.infer({"x": np.zeros((1, 3, 224, 224), np.float32)})

    Args:
        runtime: a key of `SPECS`.
        path: a file of the kind that the runtime runs.
        threads: CPU threads of one run.
        tf32: let float32 matrix products and convolutions on a GPU use TF32, which rounds their operands to 10 bits of
            mantissa. It has no effect on an engine, which keeps what it was built with, or on a CPU.
        cuda_graphs: let engines replay a CUDA graph if they can be captured in one.

    Raises:
        ValueError: the runtime is unknown.
        ProfilingError: the file cannot be loaded, the device is absent, or the environment forbids TF32.
        MissingPackageError: the package is not installed.
    """
    if runtime not in SPECS:
        raise ValueError(f"unknown runtime {runtime!r}: choose from {', '.join(SPECS)}")
    spec = SPECS[runtime]
    if spec.device == "cuda":
        check_tf32(tf32)
    runner: Runner = resolve_name(spec.runner)(path, spec, RunSettings(threads, tf32, cuda_graphs))
    return runner
