"""Export torch modules to files that serving runtimes load, and check these files against torch.

This package knows nothing of pruning: it takes any module and any ONNX file. Each name below is imported when it is
first used, so that names of precisions load without torch. torch.onnx, ONNX Runtime and TensorRT are loaded late, too.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from exporters.bf16_emulation import runnable_on_cpu as runnable_on_cpu
    from exporters.errors import ExportError as ExportError
    from exporters.mixed_precision import PARITY_TOLERANCES as PARITY_TOLERANCES
    from exporters.mixed_precision import in_precision as in_precision
    from exporters.onnx_session import OnnxModule as OnnxModule
    from exporters.onnx_session import run_onnx as run_onnx
    from exporters.onnx_writer import OnnxSpec as OnnxSpec
    from exporters.onnx_writer import onnx_from_program as onnx_from_program
    from exporters.parity import Alternatives as Alternatives
    from exporters.parity import OutputParity as OutputParity
    from exporters.parity import check_parity as check_parity
    from exporters.parity import compare_outputs as compare_outputs
    from exporters.precisions import Precision as Precision
    from exporters.precisions import is_quantized as is_quantized
    from exporters.quantization import onnx_in_precision as onnx_in_precision
    from exporters.tracing import DynamicAxes as DynamicAxes
    from exporters.tracing import save_program as save_program
    from exporters.tracing import trace as trace
    from exporters.trt_engine import BUILDERS as BUILDERS
    from exporters.trt_engine import EngineConfig as EngineConfig
    from exporters.trt_engine import EngineInfo as EngineInfo
    from exporters.trt_engine import build_engine as build_engine
    from exporters.trt_engine import check_builder as check_builder
    from exporters.trt_engine import check_engine as check_engine
    from exporters.trt_engine import check_opset as check_opset
    from exporters.trt_engine import input_ranges as input_ranges

_NAMES = {
    "bf16_emulation": ("runnable_on_cpu",),
    "errors": ("ExportError",),
    "mixed_precision": ("PARITY_TOLERANCES", "in_precision"),
    "onnx_session": ("OnnxModule", "run_onnx"),
    "onnx_writer": ("OnnxSpec", "onnx_from_program"),
    "parity": ("Alternatives", "OutputParity", "check_parity", "compare_outputs"),
    "precisions": ("Precision", "is_quantized"),
    "quantization": ("onnx_in_precision",),
    "tracing": ("DynamicAxes", "save_program", "trace"),
    "trt_engine": (
        *("BUILDERS", "EngineConfig", "EngineInfo", "build_engine"),
        *("check_builder", "check_engine", "check_opset", "input_ranges"),
    ),
}
_HOMES = {name: module for module, names in _NAMES.items() for name in names}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module 'exporters' has no attribute {name!r}")
    return getattr(import_module(f"exporters.{_HOMES[name]}"), name)
