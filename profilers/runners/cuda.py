"""Shared by the runners that launch work on a CUDA device through torch: timing, CUDA graphs, TF32."""

import os
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from profilers.errors import ProfilingError
from profilers.runners.base import Run

if TYPE_CHECKING:
    import torch

T = TypeVar("T")

# Lazy set-up (cuBLAS, kernels) must be over before a graph is captured.
_RUNS_BEFORE_CAPTURE = 2
_OVERRIDE = "NVIDIA_TF32_OVERRIDE"


def timed_by_events(launch: Callable[[], object], stream: "torch.cuda.Stream", held: object) -> Run:
    """Return a run that waits for ``launch`` and returns the milliseconds between two events on the stream.

    Recording and reading the events adds some microseconds to the latency by the clock, for every network the same.

    Args:
        launch: puts one complete run on the stream.
        stream: where it runs.
        held: kept alive as long as the run: the tensors of which ``launch`` knows only the addresses.
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


def capture_graph(launch: Callable[[], T], stream: "torch.cuda.Stream") -> "tuple[torch.cuda.CUDAGraph, T]":
    """Capture a run in a CUDA graph, after two plain runs; also return the outputs that the graph writes.

    Args:
        launch: puts one complete run on ``stream``, which is the current stream meanwhile, always on the same memory.
        stream: not the default stream, which cannot be captured.

    Raises:
        RuntimeError: the run does something that a graph cannot hold, such as waiting for the device.
    """
    import torch

    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(_RUNS_BEFORE_CAPTURE):
            launch()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    # Ignore CUDA calls from other threads during capture.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
        outputs = launch()
    return graph, outputs


def check_tf32(tf32: bool) -> None:
    """Raise ProfilingError if TF32 is asked for and the environment forbids it."""
    if tf32 and os.environ.get(_OVERRIDE) == "0":
        raise ProfilingError(f"TF32 was asked for, but {_OVERRIDE}=0 forbids it: unset it")


def set_torch_tf32(tf32: bool) -> None:
    """Let torch's matrix products and convolutions on CUDA use TF32, or not, in this process."""
    import torch

    # Not ``fp32_precision``, which replaces them: torch.compile still reads these and fails if only that is set.
    torch.backends.cuda.matmul.allow_tf32 = tf32
    torch.backends.cudnn.allow_tf32 = tf32


def set_tensorrt_tf32(tf32: bool) -> None:
    """Keep TensorRT inside ONNX Runtime from using TF32 in this process, unless ``tf32`` allows it.

    An environment variable is the only way. TensorRT reads it when it is first used.
    """
    if not tf32:
        os.environ[_OVERRIDE] = "0"
