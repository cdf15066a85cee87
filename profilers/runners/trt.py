"""Engines run by the product that built them: TensorRT or TensorRT for RTX."""

import importlib
import json
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from profilers.errors import MissingPackageError, ProfilingError
from profilers.runners import lacking_device
from profilers.runners.base import Feeds, Run, check_inputs, numpy_feeds
from profilers.runners.cuda import captured, timed_by_events

# Runtime to what Python imports, and the extra that installs it.
_PACKAGES = {"tensorrt": ("tensorrt", "tensorrt"), "rtx": ("tensorrt_rtx", "rtx")}


class TensorRTRunner:
    """An engine on the first GPU, with inputs and outputs in device memory, on a stream of its own.

    What `prepare` returns replays a CUDA graph, unless the engine cannot be captured in one: `cuda_graph` says so.

    Args:
        path: the engine; only one that was built for this device by this version runs (`exporters.check_engine`).
        runtime: `tensorrt` or `rtx`.
        cuda_graphs: False launches every run anew.

    Raises:
        ProfilingError: there is no GPU, or the engine cannot be loaded; MissingPackageError: the product is absent.
    """

    def __init__(self, path: Path, runtime: str, *, cuda_graphs: bool = True) -> None:
        import torch

        package, extra = _PACKAGES[runtime]
        try:
            trt = importlib.import_module(package)
        except ImportError as error:
            raise MissingPackageError(package, extra) from error
        if lacking := lacking_device(runtime):
            # Without a device the next lines could end the process.
            raise ProfilingError(f"{path.name} cannot run: {lacking}")
        self._trt, self._torch = trt, torch
        self._runtime: Any = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        if _is_version_compatible(path):
            # Such an engine brings the code that runs it, which TensorRT does not load unless it is told to.
            self._runtime.engine_host_code_allowed = True
        self._engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ProfilingError(f"{package} cannot load {path.name}: build it again on this machine")
        self._context: Any = _context(trt, self._engine, runtime)
        if self._context is None:
            raise ProfilingError(f"{path.name} has no room on the GPU: free memory, or measure smaller batches")
        # An engine that tells much of its layers would do so in every run, to a tool that is not there.
        self._context.nvtx_verbosity = trt.ProfilingVerbosity.NONE
        self._stream = torch.cuda.Stream()
        self._cuda_graphs = cuda_graphs
        self.cuda_graph: bool | None = None
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._outputs = [n for n in names if n not in self._inputs]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._context = self._engine = self._runtime = None

    def infer(self, feeds: Feeds) -> Feeds:
        """Outputs by their ONNX names; see `Runner.infer`."""
        tensors = self._placed(feeds)
        self._launch(tensors)
        self._stream.synchronize()
        return numpy_feeds(self._outputs, (tensors[name].cpu().numpy() for name in self._outputs))

    def prepare(self, feeds: Feeds) -> Run:
        """Each run is timed by events and ends with a synchronisation; what was prepared last is what runs; see
        `Runner.prepare`."""
        tensors = self._placed(feeds)
        launch = partial(self._launch, tensors)
        # An engine that does not run at all must not pass for one that cannot be captured.
        launch()
        self._stream.synchronize()
        graph = self._graph(launch)
        self.cuda_graph = graph is not None
        if graph is None:
            return timed_by_events(launch, self._stream, tensors)
        return timed_by_events(graph.replay, self._torch.cuda.current_stream(), tensors)

    def _graph(self, launch: partial[None]) -> Any:
        """A `torch.cuda.CUDAGraph` of a run; None where none is asked for, or the engine cannot be captured."""
        if not self._cuda_graphs:
            return None
        tells = getattr(self._context, "is_stream_capturable", None)
        if tells is not None and not tells(self._stream.cuda_stream):
            return None
        try:
            return captured(launch, self._stream)
        except (RuntimeError, ProfilingError):
            return None

    def _placed(self, feeds: Feeds) -> dict[str, Any]:
        """Input and output tensors on the device, at addresses that the context is given."""
        check_inputs(self._inputs, feeds)
        torch, context = self._torch, self._context
        tensors = {}
        for name, array in feeds.items():
            tensors[name] = torch.from_numpy(np.ascontiguousarray(array, dtype=self._kind(name))).cuda()
            if not context.set_input_shape(name, tuple(array.shape)):
                raise ProfilingError(f"the engine does not take {name} of shape {tuple(array.shape)}")
        for name in self._outputs:
            shape = tuple(context.get_tensor_shape(name))
            tensors[name] = torch.from_numpy(np.empty(shape, self._kind(name))).cuda()
        for name, tensor in tensors.items():
            context.set_tensor_address(name, tensor.data_ptr())
        torch.cuda.synchronize()
        return tensors

    def _kind(self, name: str) -> np.dtype[Any]:
        return np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))

    def _launch(self, tensors: dict[str, Any]) -> None:
        """Puts one run on the stream; the tensors are those whose addresses the context has."""
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise ProfilingError("the engine did not run")


def _is_version_compatible(engine: Path) -> bool:
    """Whether the description that the builder wrote next to ``engine`` says so; False where there is none."""
    try:
        description = json.loads(engine.with_name(f"{engine.name}.json").read_text(encoding="utf-8"))
        return description["config"]["version_compatible"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _context(trt: Any, engine: Any, runtime: str) -> Any:
    if runtime != "rtx":
        return engine.create_execution_context()
    # TensorRT for RTX otherwise compiles kernels for a shape while it runs others: a graph would keep those others.
    config = engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    return engine.create_execution_context(config)
