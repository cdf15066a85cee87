"""Measures networks: how fast an ONNX file or an exported program runs here, and how sure that is.

Knows nothing of pruning: `dense` and `pruned` are two files with the same inputs. Importing this package imports
neither torch nor onnxruntime.
"""

from .compare import ProfileConfig, Variant, compare
from .environment import environment
from .errors import MissingPackageError, ProfilingError
from .results import Comparison, Measurement
from .runners import RUNTIMES, open_runner
from .statistics import Interval, Summary

__all__ = [
    "RUNTIMES",
    "Comparison",
    "Interval",
    "Measurement",
    "MissingPackageError",
    "ProfileConfig",
    "ProfilingError",
    "Summary",
    "Variant",
    "compare",
    "environment",
    "open_runner",
]
