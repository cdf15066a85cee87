"""Engines run by the product that built them: TensorRT or TensorRT for RTX."""

import importlib
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from ..errors import MissingPackageError, ProfilingError
from .base import Feeds, check_inputs, numpy_feeds

# Runtime to what Python imports, and the extra that installs it.
_PACKAGES = {"tensorrt": ("tensorrt", "tensorrt"), "rtx": ("tensorrt_rtx", "rtx")}


class TensorRTRunner:
    """An engine on the first GPU, with inputs and outputs in device memory, on a stream of its own.

    Args:
        path: the engine; only one that was built for this device by this version runs (`exporters.check_engine`).
        runtime: `tensorrt` or `rtx`.

    Raises:
        ProfilingError: there is no GPU, or the engine cannot be loaded; MissingPackageError: the product is absent.
    """

    def __init__(self, path: Path, runtime: str) -> None:
        import torch

        package, extra = _PACKAGES[runtime]
        try:
            trt = importlib.import_module(package)
        except ImportError as error:
            raise MissingPackageError(package, extra) from error
        if not torch.cuda.is_available():
            # Without a device the next lines could end the process.
            raise ProfilingError(f"no GPU is present to run {path.name}")
        self._trt, self._torch = trt, torch
        self._runtime: Any = trt.Runtime(trt.Logger(trt.Logger.ERROR))
        self._engine: Any = self._runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            raise ProfilingError(f"{package} cannot load {path.name}: build it again on this machine")
        self._context: Any = self._engine.create_execution_context()
        self._stream = torch.cuda.Stream()
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
        outputs, run = self._prepared(feeds)
        run()
        return numpy_feeds(outputs, (tensor.cpu().numpy() for tensor in outputs.values()))

    def prepare(self, feeds: Feeds) -> Callable[[], None]:
        """Each run ends with a synchronisation of the stream; what was prepared last is what runs; see
        `Runner.prepare`."""
        return self._prepared(feeds)[1]

    def _prepared(self, feeds: Feeds) -> tuple[dict[str, Any], Callable[[], None]]:
        """Output tensors on the device, and a run that fills them."""
        check_inputs(self._inputs, feeds)
        torch, context, stream = self._torch, self._context, self._stream
        tensors = {}
        for name, array in feeds.items():
            wanted = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
            tensors[name] = torch.from_numpy(np.ascontiguousarray(array, dtype=wanted)).cuda()
            if not context.set_input_shape(name, tuple(array.shape)):
                raise ProfilingError(f"the engine does not take {name} of shape {tuple(array.shape)}")
        outputs = {}
        for name in self._outputs:
            kind = np.dtype(self._trt.nptype(self._engine.get_tensor_dtype(name)))
            shape = tuple(context.get_tensor_shape(name))
            outputs[name] = torch.from_numpy(np.empty(shape, kind)).cuda()
        tensors |= outputs
        for name, tensor in tensors.items():
            context.set_tensor_address(name, tensor.data_ptr())
        torch.cuda.synchronize()

        def run() -> None:
            if not context.execute_async_v3(stream.cuda_stream):
                raise ProfilingError("the engine did not run")
            stream.synchronize()

        # The tensors live as long as the run that has only their addresses.
        run.tensors = tensors  # type: ignore[attr-defined]
        return outputs, run
