"""What a measurement ran on: processor, cores, memory, system, package versions, CUDA devices."""

import os
import platform
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil

from profilers.gpu_watch import cuda_uuid, gpu_settings, installed_nvml

PACKAGES = (
    "numpy",
    "onnx",
    "onnxruntime",
    "onnxruntime-gpu",
    "tensorrt",
    "tensorrt_rtx",
    "timm",
    "torch",
    "transformers",
)
_GIB = 1024**3


@dataclass(frozen=True)
class Cores:
    """Cores that this process may use (its affinity mask and container limit), not all those of the machine."""

    physical: int
    logical: int


def environment() -> dict[str, Any]:
    """Describes this machine and process as a JSON-able dict.

    Keys: `date` (UTC, ISO 8601), `cpu`, `physical_cores` and `logical_cores` (usable ones), `memory_gib`, `os`,
    `python`, `versions` (package name to version, None when absent), `cuda_devices` (a list of `name`,
    `memory_gib`, `compute_capability`; empty without a GPU), of which the first, on which all runs are, has what
    `profilers.gpu_watch.gpu_settings` tells too.
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
        "versions": {name: _version(name) for name in PACKAGES},
        "cuda_devices": _cuda_devices(),
    }


def usable_cores() -> Cores:
    """Counts the cores this process may use: those of its affinity mask, capped by a container's CPU quota.

    More threads than the quota allows are not merely useless: the kernel stops the whole process for the rest of
    each scheduling period, which ruins a latency measurement.
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
    """The hardware threads sharing this logical CPU's core, in the kernel's notation; None where it does not say."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text().strip()
    except OSError:
        return None


def _quota_cores(path: Path = Path("/sys/fs/cgroup/cpu.max")) -> int | None:
    """Whole cores' worth of CPU time that the container's cgroup (v2) allows; None where there is no limit."""
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
