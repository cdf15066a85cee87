"""Engines run by TensorRT or TensorRT for RTX, whichever built them."""

import importlib
import json
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np

from profilers.errors import MissingPackageError, ProfilingError
from profilers.runners.base import Feeds, Run, Runner, RunSettings, check_inputs, numpy_feeds
from profilers.runners.cuda import capture_graph, timed_by_events
from profilers.runners.registry import RuntimeSpec, lacking_device

if TYPE_CHECKING:
    import torch


class TensorRTRunner(Runner):
    """An engine on the first GPU, with inputs and outputs in device memory, on a stream of its own.

    It runs only on the device and with the version it was built for (`exporters.check_engine`). The runs of `prepare`
    replay a CUDA graph if the engine can be captured in one; ``cuda_graph`` says whether they do.

    Raises:
        ProfilingError: there is no GPU, or the engine cannot be loaded.
        MissingPackageError: the package is not installed.
    """

    def __init__(self, path: Path, spec: RuntimeSpec, settings: RunSettings) -> None:
        import torch

        try:
            trt = importlib.import_module(spec.package)
        except ImportError as error:
            raise MissingPackageError(spec.package, spec.extra) from error
        if lacking := lacking_device(spec.name):
            # Without a device the next lines could end the process.
            raise ProfilingError(f"{path.name} cannot run: {lacking}")
        self._trt, self._torch = trt, torch
        self._runtime: Any = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        if _is_version_compatible(path):
            # Such an engine brings the code that runs it. TensorRT loads that only if allowed to.
            self._runtime.engine_host_code_allowed = True
        self._engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ProfilingError(f"{spec.package} cannot load {path.name}: build it again on this machine")
        self._context: Any = _context(trt, self._engine, spec.name)
        if self._context is None:
            raise ProfilingError(f"{path.name} has no room on the GPU: free memory, or measure smaller batches")
        # An engine built with detailed layer names would report them in every run, to a tool that does not listen.
        self._context.nvtx_verbosity = trt.ProfilingVerbosity.NONE
        self._stream = torch.cuda.Stream()
        self._cuda_graphs = settings.cuda_graphs
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        self._inputs = [n for n in names if self._engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        self._outputs = [n for n in names if n not in self._inputs]

    def close(self) -> None:
        """See `Runner.close`."""
        self._context = self._engine = self._runtime = None

    def infer(self, feeds: Feeds) -> Feeds:
        """Return the outputs by their ONNX names; see `Runner.infer`."""
        tensors = self._place(feeds)
        self._launch(tensors)
        self._stream.synchronize()
        return numpy_feeds(self._outputs, (tensors[name].cpu().numpy() for name in self._outputs))

    def prepare(self, feeds: Feeds) -> Run:
        """Return a run that is timed by events and ends with a synchronisation; see `Runner.prepare`.

        Preparing other inputs invalidates the runs prepared before.
        """
        tensors = self._place(feeds)
        launch = partial(self._launch, tensors)
        # An engine that does not run at all must not be taken for one that cannot be captured.
        launch()
        self._stream.synchronize()
        graph = self._graph(launch)
        self.cuda_graph = graph is not None
        if graph is None:
            return timed_by_events(launch, self._stream, tensors)
        return timed_by_events(graph.replay, self._torch.cuda.current_stream(), tensors)

    def _graph(self, launch: partial[None]) -> "torch.cuda.CUDAGraph | None":
        """Return a graph of a run; None if none is wanted, or if the engine cannot be captured."""
        if not self._cuda_graphs:
            return None
        is_capturable = getattr(self._context, "is_stream_capturable", None)
        if is_capturable is not None and not is_capturable(self._stream.cuda_stream):
            return None
        try:
            return capture_graph(launch, self._stream)[0]
        except (RuntimeError, ProfilingError):
            return None

    def _place(self, feeds: Feeds) -> "dict[str, torch.Tensor]":
        """Allocate inputs and outputs on the device and set their addresses in the context."""
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

    def _launch(self, tensors: "dict[str, torch.Tensor]") -> None:
        """Put one run on the stream. The context has the addresses of ``tensors``."""
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise ProfilingError("the engine did not run")


def _is_version_compatible(path: Path) -> bool:
    """Return whether the description next to the engine says so; False without a description."""
    try:
        description = json.loads(path.with_name(f"{path.name}.json").read_text(encoding="utf-8"))
        return description["config"]["version_compatible"] is True
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _context(trt: ModuleType, engine: Any, runtime: str) -> Any:
    if runtime != "rtx":
        return engine.create_execution_context()
    # By default TensorRT for RTX runs generic kernels while it compiles those of a shape; a graph would keep them.
    config = engine.create_runtime_config()
    config.dynamic_shapes_kernel_specialization_strategy = trt.DynamicShapesKernelSpecializationStrategy.EAGER
    return engine.create_execution_context(config)
