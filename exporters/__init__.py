"""Lowering torch modules to files that serving runtimes load, and checking them against torch.

Knows nothing of pruning: it takes any module and any ONNX file. torch.onnx, ONNX Runtime and
TensorRT are loaded at first use.
"""

from exporters.engine import (
    BUILDERS,
    EngineConfig,
    EngineInfo,
    build_engine,
    check_builder,
    check_engine,
    input_ranges,
)
from exporters.errors import ExportError
from exporters.onnx import onnx_from_program
from exporters.parity import Alternatives, OnnxModule, OutputParity, check_parity, compare_outputs
from exporters.precision import PARITY_TOLERANCES, Precision, in_precision, runnable_on_cpu
from exporters.quantization import is_quantized, onnx_in_precision
from exporters.tracing import DynamicAxes, save_program, trace

__all__ = [
    "BUILDERS",
    "PARITY_TOLERANCES",
    "Alternatives",
    "DynamicAxes",
    "EngineConfig",
    "EngineInfo",
    "ExportError",
    "OnnxModule",
    "OutputParity",
    "Precision",
    "build_engine",
    "check_builder",
    "check_engine",
    "check_parity",
    "compare_outputs",
    "in_precision",
    "input_ranges",
    "is_quantized",
    "onnx_from_program",
    "onnx_in_precision",
    "runnable_on_cpu",
    "save_program",
    "trace",
]
