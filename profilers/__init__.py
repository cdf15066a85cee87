"""Measure the latency of ONNX files, exported programs and engines on this machine, with its uncertainty.

This package knows nothing about pruning: ``dense`` and ``pruned`` are two files with the same inputs. Importing it
imports neither torch nor onnxruntime.
"""

from profilers.compare import ProfileConfig, Variant, compare
from profilers.environment import environment, usable_cores
from profilers.errors import MissingPackageError, ProfilingError
from profilers.gpu_watch import GpuWatch
from profilers.inference import infer_file
from profilers.layer_times import LayerProfile, layer_profile
from profilers.measure import Case, RawSamples, loads_for, measure_each, measure_files
from profilers.results import Comparison, Measurement
from profilers.runners import open_runner
from profilers.runners.ort import check_provider
from profilers.runners.registry import (
    ENGINE_RUNTIMES,
    GPU_RUNTIMES,
    LAYER_RUNTIMES,
    ORT_PROVIDERS,
    RUNTIMES,
    SPECS,
    Runtime,
    lacking_device,
    lacking_precision,
)
from profilers.stats import Interval, Summary

__all__ = [
    "ENGINE_RUNTIMES",
    "GPU_RUNTIMES",
    "LAYER_RUNTIMES",
    "ORT_PROVIDERS",
    "RUNTIMES",
    "SPECS",
    "Case",
    "Comparison",
    "GpuWatch",
    "Interval",
    "LayerProfile",
    "Measurement",
    "MissingPackageError",
    "ProfileConfig",
    "ProfilingError",
    "RawSamples",
    "Runtime",
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
