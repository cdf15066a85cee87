"""ONNX files run by ONNX Runtime, on the CPU or through CUDA."""

from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from ..errors import MissingPackageError, ProfilingError
from .base import Feeds, check_inputs, first_line, numpy_feeds

# Provider to its device name in ONNX Runtime's words and the extra that installs it.
_PROVIDERS = {"CPUExecutionProvider": ("cpu", "cpu"), "CUDAExecutionProvider": ("cuda", "gpu")}
_ERRORS_ONLY = 3


class OnnxRuntimeRunner:
    """An ONNX file in an ONNX Runtime session.

    Args:
        path: the ONNX file.
        provider: `CPUExecutionProvider` or `CUDAExecutionProvider`.
        threads: intra-op threads; there is one inter-op thread.

    Raises:
        MissingPackageError: onnxruntime is not installed.
        ProfilingError: the file cannot be loaded, or the session does not run on the provider asked for.
    """

    def __init__(self, path: Path, provider: str, threads: int) -> None:
        if provider not in _PROVIDERS:
            raise ProfilingError(f"unknown provider {provider!r}: choose one of {', '.join(_PROVIDERS)}")
        self._device, extra = _PROVIDERS[provider]
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise MissingPackageError("onnxruntime", extra) from error
        self._value_on_device = ort.OrtValue.ortvalue_from_numpy
        if self._device == "cuda":
            # CUDA libraries installed by pip are found only when they are loaded beforehand.
            ort.preload_dlls()
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = _ERRORS_ONLY
        try:
            session = ort.InferenceSession(str(path), options, providers=[provider])
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise ProfilingError(f"onnxruntime cannot load {path}: {first_line(error)}") from error
        got = session.get_providers()[0]
        if got != provider:
            # ONNX Runtime says nothing and carries on with what it has.
            raise ProfilingError(
                f"{provider} was asked for but onnxruntime fell back to {got}: "
                f"install 'optin-deploy[{extra}]' (without onnxruntime beside it) and check the driver"
            )
        self._session: Any = session
        self._inputs = [node.name for node in session.get_inputs()]
        self._outputs = [node.name for node in session.get_outputs()]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._session = None

    def infer(self, feeds: Feeds) -> Feeds:
        """Outputs by their ONNX names; see `Runner.infer`."""
        check_inputs(self._inputs, feeds)
        return numpy_feeds(self._outputs, self._session.run(self._outputs, feeds))

    def prepare(self, feeds: Feeds) -> Callable[[], None]:
        """Inputs and outputs stay on the device, through an IOBinding; see `Runner.prepare`."""
        check_inputs(self._inputs, feeds)
        session = self._session
        binding = session.io_binding()
        for name, array in feeds.items():
            binding.bind_ortvalue_input(name, self._value_on_device(array, self._device, 0))
        for name in self._outputs:
            binding.bind_output(name, self._device, 0)

        def run() -> None:
            session.run_with_iobinding(binding)
            binding.synchronize_outputs()

        return run
