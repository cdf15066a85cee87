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
from exporters.parity import OutputParity, check_parity
from exporters.tracing import DynamicAxes, save_program, trace

__all__ = [
    "BUILDERS",
    "DynamicAxes",
    "EngineConfig",
    "EngineInfo",
    "ExportError",
    "OutputParity",
    "build_engine",
    "check_builder",
    "check_engine",
    "check_parity",
    "input_ranges",
    "onnx_from_program",
    "save_program",
    "trace",
]
