"""ONNX files run by ONNX Runtime on the CPU, through CUDA or through TensorRT."""

import ctypes
import io
import warnings
from contextlib import redirect_stdout, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

from profilers.errors import MissingPackageError, ProfilingError
from profilers.runners.base import Feeds, Run, Runner, RunSettings, check_inputs, first_line, numpy_feeds
from profilers.runners.cuda import set_tensorrt_tf32
from profilers.runners.registry import SPECS, RuntimeSpec

_FATAL_ONLY = 4


class OnnxRuntimeRunner(Runner):
    """An ONNX file in an ONNX Runtime session.

    TensorRT as execution provider builds an engine at the first run of each shape, computes in the types of the file
    (strongly typed), and leaves operators that it does not support to CUDA. Whether it may use TF32 is set for the
    whole process, before it is loaded. ONNX Runtime's own CUDA graphs are not used.

    Raises:
        MissingPackageError: onnxruntime is not installed.
        ProfilingError: the file cannot be loaded, or the session falls back to another provider.
    """

    def __init__(self, path: Path, spec: RuntimeSpec, settings: RunSettings) -> None:
        self._device = spec.device
        if spec.uses_tensorrt:
            # Before TensorRT is loaded, because it reads the setting then.
            set_tensorrt_tf32(settings.tf32)
        ort = _onnxruntime(spec)
        self._value_on_device = ort.OrtValue.ortvalue_from_numpy
        try:
            session = _session(ort, str(path), spec, session_options(ort, settings), settings.tf32)
        except ProfilingError:
            raise
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise ProfilingError(f"onnxruntime cannot load {path}: {first_line(error)}") from error
        self._session: Any = session
        self._inputs = [node.name for node in session.get_inputs()]
        self._outputs = [node.name for node in session.get_outputs()]

    def close(self) -> None:
        """See `Runner.close`."""
        self._session = None

    def infer(self, feeds: Feeds) -> Feeds:
        """Return the outputs by their ONNX names; see `Runner.infer`."""
        check_inputs(self._inputs, feeds)
        return numpy_feeds(self._outputs, self._session.run(self._outputs, feeds))

    def prepare(self, feeds: Feeds) -> Run:
        """Keep inputs and outputs on the device through an IOBinding; see `Runner.prepare`."""
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
    """Check with a network of one node that ``provider`` starts.

    ONNX Runtime lists every provider it was built with, even if its libraries or its device are missing.

    Raises:
        ProfilingError: the provider does not start, or this ONNX Runtime was built without it.
        MissingPackageError: onnxruntime is not installed.
    """
    spec = next(spec for spec in SPECS.values() if spec.provider == provider)
    ort = _onnxruntime(spec)
    if provider not in ort.get_available_providers():
        raise ProfilingError(f"this onnxruntime has no {provider}: pip install 'optin-deploy[{spec.extra}]'")
    _session(ort, _one_node(), spec, ort.SessionOptions(), tf32=False)


def _onnxruntime(spec: RuntimeSpec) -> ModuleType:
    """Import onnxruntime and load the libraries of the provider: it does not find those installed by pip itself."""
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingPackageError("onnxruntime", spec.extra) from error
    if spec.device == "cuda" and "CUDAExecutionProvider" in ort.get_available_providers():
        ort.preload_dlls()
    if spec.uses_tensorrt:
        # Without the Python package, the system may still find TensorRT's libraries.
        with suppress(ImportError):
            import tensorrt  # noqa: F401
    module: ModuleType = ort
    return module


def session_options(ort: ModuleType, settings: RunSettings) -> Any:
    """Return options with the threads of ``settings``."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.threads
    options.inter_op_num_threads = 1
    return options


def _session(ort: ModuleType, network: str | bytes, spec: RuntimeSpec, options: Any, tf32: bool) -> Any:
    """Open a session. ONNX Runtime only prints that it falls back to another provider; here that is an error."""
    options.log_severity_level = _FATAL_ONLY
    with redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        session = ort.InferenceSession(network, options, providers=provider_options(spec.provider, tf32))
    used = session.get_providers()[0]
    if used != spec.provider:
        name = f"libonnxruntime_providers_{_library_name(str(spec.provider))}.so"
        reason = _loading_error(Path(str(ort.__file__)).parent / "capi" / name)
        raise ProfilingError(
            f"{spec.provider} was asked for but onnxruntime fell back to {used}{f' ({reason})' if reason else ''}: "
            f"install 'optin-deploy[{spec.extra}]' (without onnxruntime beside it) and check the driver"
        )
    return session


def _library_name(provider: str) -> str:
    """Return the name that a provider's library has: "tensorrt" for "TensorrtExecutionProvider"."""
    return provider.removesuffix("ExecutionProvider").lower()


def _loading_error(library: Path) -> str:
    """Return why the system cannot load a provider's library; "" if it can, or if there is no such file."""
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
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return bytes(model.SerializeToString())


def provider_options(provider: str | None, tf32: bool) -> list[tuple[str, dict[str, str]]]:
    """Return the providers of a session with their options, first choice first."""
    cuda = ("CUDAExecutionProvider", {"device_id": "0", "use_tf32": "1" if tf32 else "0"})
    if provider == "CUDAExecutionProvider":
        return [cuda]
    if provider == "TensorrtExecutionProvider":
        # Networks are strongly typed if all precision flags are off. The engine cache does not notice a changed file,
        # and every session builds its engine only once.
        off = dict.fromkeys(("trt_fp16_enable", "trt_int8_enable", "trt_engine_cache_enable"), "False")
        return [(provider, {"device_id": "0", **off}), cuda]
    return [(provider or "CPUExecutionProvider", {})]
