"""What the runners that launch work on a CUDA device through torch have in common: timing, graphs, TF32."""

import os
from collections.abc import Callable
from typing import Any

from profilers.errors import ProfilingError
from profilers.runners.base import Run

# What is set up lazily (cuBLAS, kernels) cannot be while a graph is captured.
_RUNS_BEFORE_CAPTURE = 2
_OVERRIDE = "NVIDIA_TF32_OVERRIDE"


def timed_by_events(launch: Callable[[], object], stream: Any, held: object) -> Run:
    """A run that waits for what ``launch`` has put on the stream, and returns the milliseconds between two events.

    Recording the events and reading them is part of what the caller's clock sees: some microseconds, whatever the
    network.

    Args:
        launch: puts one complete run on the stream.
        stream: a `torch.cuda.Stream`.
        held: lives as long as the run does: the tensors of which ``launch`` knows only where they lie.
    """
    import torch

    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def run(held: object = held) -> float:
        start.record(stream)
        launch()
        end.record(stream)
        end.synchronize()
        return start.elapsed_time(end)

    return run


def captured(launch: Callable[[], object], stream: Any) -> Any:
    """What ``launch`` puts on the stream as a `torch.cuda.CUDAGraph`, after two runs as it is.

    Args:
        launch: puts one complete run on ``stream``, which is the current one while it is called, always on the same
            memory.
        stream: a `torch.cuda.Stream`, not the default one, which cannot be captured.

    Raises:
        RuntimeError: the run does what a graph cannot hold, such as waiting for the device.
    """
    import torch

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_RUNS_BEFORE_CAPTURE):
            launch()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    # What other threads of a runtime do meanwhile is none of the capture's business.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        launch()
    return graph


def check_tf32(tf32: bool) -> None:
    """ProfilingError where TF32 is asked for and the environment forbids it."""
    if tf32 and os.environ.get(_OVERRIDE) == "0":
        raise ProfilingError(f"TF32 was asked for, but {_OVERRIDE}=0 forbids it: unset it")


def set_torch_tf32(tf32: bool) -> None:
    """Let torch's matrix products and convolutions on CUDA use TF32, or not, in this process."""
    import torch

    # Not `fp32_precision`, which replaces these: torch.compile still reads them, and fails where only that was set.
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


def set_tensorrt_tf32(tf32: bool) -> None:
    """Keep TensorRT inside ONNX Runtime from using TF32 in this process, unless it may.

    An environment variable is the only way, and is read when TensorRT is first used.
    """
    if not tf32:
        os.environ[_OVERRIDE] = "0"
