"""Lowering torch modules to files that serving runtimes load, and checking them against torch.

Knows nothing of pruning: it takes any module and any ONNX file. The names below are imported when they are first used,
so that those of precisions need no torch; torch.onnx, ONNX Runtime and TensorRT likewise.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.errors import ExportError as ExportError
    from exporters.mixed_precision import PARITY_TOLERANCES as PARITY_TOLERANCES
    from exporters.mixed_precision import in_precision as in_precision
    from exporters.mixed_precision import runnable_on_cpu as runnable_on_cpu
    from exporters.onnx_writer import onnx_from_program as onnx_from_program
    from exporters.parity import Alternatives as Alternatives
    from exporters.parity import OnnxModule as OnnxModule
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

_HOMES = {
    "Alternatives": "parity",
    "BUILDERS": "trt_engine",
    "DynamicAxes": "tracing",
    "EngineConfig": "trt_engine",
    "EngineInfo": "trt_engine",
    "ExportError": "errors",
    "OnnxModule": "parity",
    "OutputParity": "parity",
    "PARITY_TOLERANCES": "mixed_precision",
    "Precision": "precisions",
    "build_engine": "trt_engine",
    "check_builder": "trt_engine",
    "check_opset": "trt_engine",
    "check_engine": "trt_engine",
    "check_parity": "parity",
    "compare_outputs": "parity",
    "in_precision": "mixed_precision",
    "input_ranges": "trt_engine",
    "is_quantized": "precisions",
    "onnx_from_program": "onnx_writer",
    "onnx_in_precision": "quantization",
    "runnable_on_cpu": "mixed_precision",
    "save_program": "tracing",
    "trace": "tracing",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'exporters' has no attribute {name!r}")
    return getattr(import_module(f"exporters.{_HOMES[name]}"), name)
