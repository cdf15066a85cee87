"""The table of runtimes. A new runtime is a row here and a runner in a file of its own."""

from dataclasses import dataclass, replace
from typing import Literal

_Torch = Literal["torch", "torch-cuda", "torch-graph-cuda", "torch-compile", "torch-compile-cuda"]
Runtime = Literal["ort-cpu", "ort-cuda", "ort-tensorrt", _Torch, "tensorrt", "rtx"]
Artifact = Literal["onnx", "program", "engine"]
Provider = Literal["CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"]


@dataclass(frozen=True)
class RuntimeSpec:
    """One runtime.

    Attributes:
        name: key on the command line and in reports.
        label: name in words.
        artifact: kind of file it runs: an ONNX file, an exported program (``.pt2``), or an engine.
        device: where it computes.
        package: what Python imports.
        extra: extra of ``optin-deploy`` that installs the package.
        runner: ``module:class`` of its `profilers.runners.base.Runner`.
        layer_profiler: ``module:class`` of its `profilers.layer_profilers.ProfiledRuns`; None if it has none.
        provider: execution provider of ONNX Runtime.
        compiled: whether ``torch.compile`` compiles the program.
        cuda_graph: whether every run replays a CUDA graph of the program.
        default_precisions: precisions measured with this runtime if the user names no runtime.
        capabilities: CUDA compute capabilities it supports; None if it supports all.
    """

    name: Runtime
    label: str
    artifact: Artifact
    device: Literal["cpu", "cuda"]
    package: str
    extra: str
    runner: str
    layer_profiler: str | None = None
    provider: Provider | None = None
    compiled: bool = False
    cuda_graph: bool = False
    default_precisions: tuple[str, ...] = ()
    capabilities: tuple[tuple[int, int], ...] | None = None

    @property
    def uses_tensorrt(self) -> bool:
        """Whether TensorRT or TensorRT for RTX computes."""
        return self.artifact == "engine" or self.provider == "TensorrtExecutionProvider"


_ORT = RuntimeSpec(
    name="ort-cpu",
    label="ONNX Runtime",
    artifact="onnx",
    device="cpu",
    package="onnxruntime",
    extra="cpu",
    runner="profilers.runners.ort:OnnxRuntimeRunner",
    layer_profiler="profilers.layer_profilers.ort:ProfiledSession",
    provider="CPUExecutionProvider",
)
_ORT_CUDA = replace(
    _ORT, name="ort-cuda", label="ONNX Runtime CUDA", device="cuda", extra="gpu", provider="CUDAExecutionProvider"
)
_ORT_TENSORRT = replace(
    _ORT_CUDA, name="ort-tensorrt", label="ONNX Runtime TensorRT", extra="ort-tensorrt", layer_profiler=None
)
_TORCH = RuntimeSpec(
    name="torch",
    label="PyTorch",
    artifact="program",
    device="cpu",
    package="torch",
    extra="cpu",
    runner="profilers.runners.pyt:TorchRunner",
    layer_profiler="profilers.layer_profilers.pyt:ProfiledProgram",
)
_TORCH_CUDA = replace(_TORCH, name="torch-cuda", label="PyTorch CUDA", device="cuda", extra="gpu")
_GRAPH = replace(_TORCH_CUDA, name="torch-graph-cuda", label="PyTorch CUDA graph", cuda_graph=True, layer_profiler=None)
_COMPILED = replace(_TORCH, name="torch-compile", label="PyTorch compiled", compiled=True, layer_profiler=None)
_COMPILED_CUDA = replace(
    _TORCH_CUDA, name="torch-compile-cuda", label="PyTorch compiled CUDA", compiled=True, layer_profiler=None
)
_TENSORRT = RuntimeSpec(
    name="tensorrt",
    label="TensorRT",
    artifact="engine",
    device="cuda",
    package="tensorrt",
    extra="tensorrt",
    runner="profilers.runners.trt:TensorRTRunner",
    layer_profiler="profilers.layer_profilers.trt:ProfiledEngine",
)
# Capabilities by NVIDIA's support matrix; an H200 refuses its engines.
_RTX = replace(
    _TENSORRT,
    name="rtx",
    label="TensorRT for RTX",
    package="tensorrt_rtx",
    extra="rtx",
    capabilities=((7, 5), (8, 6), (8, 9), (12, 0), (12, 1)),
)
_ROWS = (
    replace(_ORT, default_precisions=("fp32", "fp16", "int8")),
    replace(_ORT_CUDA, default_precisions=("tf32",)),
    replace(_ORT_TENSORRT, provider="TensorrtExecutionProvider"),
    replace(_TORCH, default_precisions=("fp32", "fp16", "bf16")),
    replace(_TORCH_CUDA, default_precisions=("tf32",)),
    _GRAPH,
    _COMPILED,
    _COMPILED_CUDA,
    replace(_TENSORRT, default_precisions=("fp8",)),
    _RTX,
)

SPECS: dict[str, RuntimeSpec] = {spec.name: spec for spec in _ROWS}
"""All runtimes by name."""

RUNTIMES: dict[str, Artifact] = {spec.name: spec.artifact for spec in _ROWS}
"""The kind of file that each runtime runs."""

GPU_RUNTIMES = tuple(spec.name for spec in _ROWS if spec.device == "cuda")
"""Runtimes that need a CUDA device."""

LAYER_RUNTIMES = tuple(spec.name for spec in _ROWS if spec.layer_profiler)
"""Runtimes that can time single operators."""

ENGINE_RUNTIMES = tuple(spec.name for spec in _ROWS if spec.artifact == "engine")
"""Runtimes that run engines."""

ORT_PROVIDERS: dict[str, Provider] = {spec.name: spec.provider for spec in _ROWS if spec.provider}
"""The execution provider of each runtime of ONNX Runtime."""

# The least compute capability with tensor cores for a precision (TensorRT's support matrix).
_LEAST_CAPABILITY = {"tf32": (8, 0), "bf16": (8, 0), "fp8": (8, 9)}


def lacking_device(runtime: str) -> str:
    """Return why this machine has no device for ``runtime``, in a few words; "" if it has one."""
    spec = SPECS[runtime]
    if spec.device == "cpu":
        return ""
    import torch

    if not torch.cuda.is_available():
        return "no GPU is present"
    if spec.capabilities is not None and torch.cuda.get_device_capability(0) not in spec.capabilities:
        return f"{torch.cuda.get_device_name(0)} cannot run {spec.label}, take tensorrt there"
    return ""


def lacking_precision(runtime: str, precision: str) -> str:
    """Return why TensorRT cannot compute in ``precision`` on this GPU, in a few words; "" if it can, or without GPU."""
    if not SPECS[runtime].uses_tensorrt or precision not in _LEAST_CAPABILITY:
        return ""
    import torch

    if not torch.cuda.is_available():
        return ""
    here, least = torch.cuda.get_device_capability(0), _LEAST_CAPABILITY[precision]
    if here >= least:
        return ""
    needed = f"{least[0]}.{least[1]}"
    return f"{torch.cuda.get_device_name(0)} (compute capability {here[0]}.{here[1]}) has no {precision}, {needed} has"
