"""Lowering torch modules to files that serving runtimes load, and checking them against torch.

Knows nothing of pruning: it takes any module and any ONNX file. torch.onnx and ONNX Runtime are loaded at first use.
"""

from exporters.errors import ExportError
from exporters.onnx import onnx_from_program
from exporters.parity import OutputParity, check_parity
from exporters.tracing import DynamicAxes, save_program, trace

__all__ = [
    "DynamicAxes",
    "ExportError",
    "OutputParity",
    "check_parity",
    "onnx_from_program",
    "save_program",
    "trace",
]
