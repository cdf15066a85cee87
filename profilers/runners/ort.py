"""ONNX files run by ONNX Runtime, on the CPU, through CUDA or through TensorRT."""

import ctypes
import io
import warnings
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from profilers.errors import MissingPackageError, ProfilingError
from profilers.runners.base import Feeds, Run, check_inputs, first_line, numpy_feeds
from profilers.runners.cuda import set_tensorrt_tf32

# Provider to its device name in ONNX Runtime's words and the extras that install it.
_PROVIDERS = {
    "CPUExecutionProvider": ("cpu", "cpu"),
    "CUDAExecutionProvider": ("cuda", "gpu"),
    "TensorrtExecutionProvider": ("cuda", "ort-tensorrt"),
}
_FATAL_ONLY = 4


class OnnxRuntimeRunner:
    """An ONNX file in an ONNX Runtime session.

    Args:
        path: the ONNX file.
        provider: `CPUExecutionProvider`, `CUDAExecutionProvider`, or `TensorrtExecutionProvider`, which builds its
            engines at the first run of a shape, computes what the file says (strongly typed), and leaves to CUDA what
            it cannot take.
        threads: intra-op threads; there is one inter-op thread.
        tf32: matrix products and convolutions on CUDA may use it. TensorRT is told so for the whole process, before
            it is first used there.

    Raises:
        MissingPackageError: onnxruntime is not installed.
        ProfilingError: the file cannot be loaded, or the session does not run on the provider asked for.
    """

    # ONNX Runtime's own CUDA graphs are not asked for.
    cuda_graph: bool | None = None

    def __init__(self, path: Path, provider: str, threads: int, *, tf32: bool = False) -> None:
        if provider not in _PROVIDERS:
            raise ProfilingError(f"unknown provider {provider!r}: choose one of {', '.join(_PROVIDERS)}")
        self._device, _ = _PROVIDERS[provider]
        if provider == "TensorrtExecutionProvider":
            # Before TensorRT is loaded, which reads it then.
            set_tensorrt_tf32(tf32)
        ort = _onnxruntime(provider)
        self._value_on_device = ort.OrtValue.ortvalue_from_numpy
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        try:
            session = _session(ort, str(path), provider, options, tf32)
        except ProfilingError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise ProfilingError(f"onnxruntime cannot load {path}: {first_line(error)}") from error
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

    def prepare(self, feeds: Feeds) -> Run:
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


def check_provider(provider: str) -> None:
    """Find out with a network of one node whether ``provider`` starts: that ONNX Runtime was built with it does not say
    that its libraries and its device are there.

    Raises:
        ProfilingError: it does not, or is not in this ONNX Runtime; MissingPackageError: onnxruntime is absent.
    """
    ort = _onnxruntime(provider)
    if provider not in ort.get_available_providers():
        raise ProfilingError(
            f"this onnxruntime has no {provider}: pip install 'optin-deploy[{_PROVIDERS[provider][1]}]'"
        )
    _session(ort, _one_node(), provider, ort.SessionOptions(), tf32=False)


def _onnxruntime(provider: str) -> Any:
    """The package, with the libraries that ``provider`` needs loaded: those installed by pip are not found else."""
    device, extra = _PROVIDERS[provider]
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingPackageError("onnxruntime", extra) from error
    if device == "cuda":
        ort.preload_dlls()
    if provider == "TensorrtExecutionProvider":
        # The system may find TensorRT's without Python's package.
        with suppress(ImportError):
            import tensorrt  # noqa: F401
    return ort


def _session(ort: Any, network: str | bytes, provider: str, options: Any, tf32: bool) -> Any:
    """A session on ``provider``; ONNX Runtime itself says nothing and carries on with what it has."""
    options.log_severity_level = _FATAL_ONLY
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():  # where it tells that it falls back
        warnings.simplefilter("ignore")
        session = ort.InferenceSession(network, options, providers=provider_options(provider, tf32))
    got = session.get_providers()[0]
    if got != provider:
        extra = _PROVIDERS[provider][1]
        library = Path(ort.__file__).parent / "capi" / f"libonnxruntime_providers_{_library_name(provider)}.so"
        why = _loading_error(library)
        raise ProfilingError(
            f"{provider} was asked for but onnxruntime fell back to {got}{f' ({why})' if why else ''}: "
            f"install 'optin-deploy[{extra}]' (without onnxruntime beside it) and check the driver"
        )
    return session


def _library_name(provider: str) -> str:
    """The part of a provider's name that its library is called by: "TensorrtExecutionProvider" gives "tensorrt"."""
    return provider.removesuffix("ExecutionProvider").lower()


def _loading_error(library: Path) -> str:
    """Why the system's loader cannot load a provider's library; empty where it can, or there is none."""
    shared = library.with_name("libonnxruntime_providers_shared.so")
    try:
        for file in (shared, library):
            if file.is_file():
                # The provider's library takes symbols from the shared one.
                ctypes.CDLL(str(file), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        return first_line(error)
    return ""


def _one_node() -> bytes:
    from onnx import TensorProto, helper

    shape = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("x", "y"))
    graph = helper.make_graph([helper.make_node("Abs", ["x"], ["y"])], "probe", *([value] for value in shape))
    made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    content: bytes = made.SerializeToString()
    return content


def provider_options(provider: str, tf32: bool) -> list[tuple[str, dict[str, str]]]:
    """What a session on ``provider`` is made with: providers, first choice first, each with its options."""
    cuda = ("CUDAExecutionProvider", {"device_id": "0", "use_tf32": "1" if tf32 else "0"})
    if provider == "CUDAExecutionProvider":
        return [cuda]
    if provider == "TensorrtExecutionProvider":
        # Networks are strongly typed where all precision flags are off. The cache of engines does not notice that a
        # file has changed, and every session builds its engine only once.
        off = dict.fromkeys(("trt_fp16_enable", "trt_int8_enable", "trt_engine_cache_enable"), "False")
        return [(provider, {"device_id": "0", **off}), cuda]
    return [(provider, {})]
