"""Lowering torch modules to files that serving runtimes load, and checking them against torch.

Knows nothing of pruning: it takes any module and any ONNX file. The names below are imported when they are first used,
so that those of precisions need no torch; torch.onnx, ONNX Runtime and TensorRT likewise.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exporters.engine import BUILDERS as BUILDERS
    from exporters.engine import EngineConfig as EngineConfig
    from exporters.engine import EngineInfo as EngineInfo
    from exporters.engine import build_engine as build_engine
    from exporters.engine import check_builder as check_builder
    from exporters.engine import check_engine as check_engine
    from exporters.engine import check_opset as check_opset
    from exporters.engine import input_ranges as input_ranges
    from exporters.errors import ExportError as ExportError
    from exporters.names import Precision as Precision
    from exporters.names import is_quantized as is_quantized
    from exporters.onnx import onnx_from_program as onnx_from_program
    from exporters.parity import Alternatives as Alternatives
    from exporters.parity import OnnxModule as OnnxModule
    from exporters.parity import OutputParity as OutputParity
    from exporters.parity import check_parity as check_parity
    from exporters.parity import compare_outputs as compare_outputs
    from exporters.precision import PARITY_TOLERANCES as PARITY_TOLERANCES
    from exporters.precision import in_precision as in_precision
    from exporters.precision import runnable_on_cpu as runnable_on_cpu
    from exporters.quantization import onnx_in_precision as onnx_in_precision
    from exporters.tracing import DynamicAxes as DynamicAxes
    from exporters.tracing import save_program as save_program
    from exporters.tracing import trace as trace

_HOMES = {
    "Alternatives": "parity",
    "BUILDERS": "engine",
    "DynamicAxes": "tracing",
    "EngineConfig": "engine",
    "EngineInfo": "engine",
    "ExportError": "errors",
    "OnnxModule": "parity",
    "OutputParity": "parity",
    "PARITY_TOLERANCES": "precision",
    "Precision": "names",
    "build_engine": "engine",
    "check_builder": "engine",
    "check_opset": "engine",
    "check_engine": "engine",
    "check_parity": "parity",
    "compare_outputs": "parity",
    "in_precision": "precision",
    "input_ranges": "engine",
    "is_quantized": "names",
    "onnx_from_program": "onnx",
    "onnx_in_precision": "quantization",
    "runnable_on_cpu": "precision",
    "save_program": "tracing",
    "trace": "tracing",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'exporters' has no attribute {name!r}")
    return getattr(import_module(f"exporters.{_HOMES[name]}"), name)
