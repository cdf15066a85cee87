"""Measures networks: how fast an ONNX file or an exported program runs here, and how sure that is.

Knows nothing of pruning: `dense` and `pruned` are two files with the same inputs. Importing this package imports
neither torch nor onnxruntime.
"""

from profilers.compare import ProfileConfig, Variant, compare
from profilers.environment import environment, usable_cores
from profilers.errors import MissingPackageError, ProfilingError
from profilers.gpu_watch import GpuWatch
from profilers.inference import infer_file
from profilers.isolated import Case, loads_for, measure_each, measure_files
from profilers.layer_times import LAYER_RUNTIMES, LayerProfile, layer_profile
from profilers.results import Comparison, Measurement
from profilers.runners import GPU_RUNTIMES, ORT_PROVIDERS, RUNTIMES, lacking_device, lacking_precision, open_runner
from profilers.runners.ort import check_provider
from profilers.stats import Interval, Summary

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
