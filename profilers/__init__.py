"""Measures networks: how fast an ONNX file or an exported program runs here, and how sure that is.

Knows nothing of pruning: `dense` and `pruned` are two files with the same inputs. Importing this package imports
neither torch nor onnxruntime.
"""

from .compare import ProfileConfig, Variant, compare
from .environment import environment, usable_cores
from .errors import MissingPackageError, ProfilingError
from .gpu import GpuWatch
from .inference import infer_file
from .isolated import Case, loads_for, measure_each, measure_files
from .layers import LAYER_RUNTIMES, LayerProfile, layer_profile
from .results import Comparison, Measurement
from .runners import GPU_RUNTIMES, ORT_PROVIDERS, RUNTIMES, lacking_device, lacking_precision, open_runner
from .runners.onnxruntime import check_provider
from .statistics import Interval, Summary

__all__ = [
    "GPU_RUNTIMES",
    "LAYER_RUNTIMES",
    "ORT_PROVIDERS",
    "RUNTIMES",
    "Case",
    "Comparison",
    "GpuWatch",
    "Interval",
    "LayerProfile",
    "Measurement",
    "MissingPackageError",
    "ProfileConfig",
    "ProfilingError",
    "Summary",
    "Variant",
    "check_provider",
    "compare",
    "environment",
    "infer_file",
    "lacking_device",
    "lacking_precision",
    "layer_profile",
    "loads_for",
    "measure_each",
    "measure_files",
    "open_runner",
    "usable_cores",
]
