"""The machine of a measurement: processor, cores, memory, system, package versions, CUDA devices."""

import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from profilers.gpu_watch import cuda_uuid, gpu_settings, installed_nvml
from profilers.runners.registry import SPECS

_PACKAGES = sorted(
    {"numpy", "onnx", "onnxruntime-gpu", "timm", "transformers", *(spec.package for spec in SPECS.values())}
)
_GIB = 1024**3


@dataclass(frozen=True)
class Cores:
    """Cores that this process may use (affinity mask and container limit), not all cores of the machine."""

    physical: int
    logical: int


def environment() -> dict[str, Any]:
    """Describe this machine and process as a JSON-able dict.

    Keys: ``date`` (UTC, ISO 8601), ``cpu``, ``physical_cores`` and ``logical_cores`` (usable ones), ``memory_gib``,
    ``os``, ``python``, ``versions`` (package name to version, None if absent), ``cuda_devices`` (a list of ``name``,
    ``memory_gib``, ``compute_capability``; empty without a GPU). The first device makes all runs and also has the keys
    of `profilers.gpu_watch.gpu_settings`.
    """
    cores = usable_cores()
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": _cpu_name(),
        "physical_cores": cores.physical,
        "logical_cores": cores.logical,
        "memory_gib": round(psutil.virtual_memory().total / _GIB, 1),
        "os": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in _PACKAGES},
        "cuda_devices": _cuda_devices(),
    }


def usable_cores() -> Cores:
    """Count the cores this process may use: those of its affinity mask, at most a container's CPU quota.

    With more threads than the quota allows, the kernel stops the whole process for the rest of each scheduling period,
    which ruins a latency measurement.
    """
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    logical = len(cpus)
    siblings = {_siblings(cpu) for cpu in cpus}
    physical = psutil.cpu_count(logical=False) or logical if None in siblings else len(siblings)
    quota = _quota_cores()
    if quota is not None:
        logical = min(logical, quota)
    return Cores(physical=min(physical, logical), logical=logical)


def _siblings(cpu: int) -> str | None:
    """Return the hardware threads that share this logical CPU's core, in the kernel's notation; None if unknown."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return None


def _quota_cores(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> int | None:
    """Return the CPU time that the container's cgroup (v2) allows, in whole cores; None without a limit."""
    try:
        quota, period = path.read_text().split()
    except (OSError, ValueError):
        return None
    return None if quota == "max" else max(1, int(quota) // int(period))


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return value.strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cuda_devices() -> list[dict[str, Any]]:
    try:
        import torch
    except ImportError:
        return []
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    devices: list[dict[str, Any]] = [
        {
            "name": device.name,
            "memory_gib": round(device.total_memory / _GIB, 1),
            "compute_capability": f"{device.major}.{device.minor}",
        }
        for device in properties
    ]
    devices[0] |= gpu_settings(cuda_uuid(), installed_nvml())
    return devices
