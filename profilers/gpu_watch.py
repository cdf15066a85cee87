"""Power, clocks, temperature and memory of a GPU during a measurement, and why it runs slower than it could.

Read through NVML, the driver's own interface, which launches nothing on the GPU.
"""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import reduce
from operator import or_
from statistics import fmean, median
from threading import Event, Thread
from types import ModuleType
from typing import Any, Self

Query = Callable[[], Any]

_MIB = 2**20
# NVML's reasons for lower clocks, in words. Idle is not among them.
_REASONS = {
    "SwPowerCap": "power cap",
    "HwSlowdown": "hardware slowdown",
    "SwThermalSlowdown": "thermal slowdown",
    "HwThermalSlowdown": "hardware thermal slowdown",
    "HwPowerBrakeSlowdown": "power brake",
    "ApplicationsClocksSetting": "clocks set by the user",
    "DisplayClockSetting": "display clocks",
    "SyncBoost": "clocks of a group of GPUs",
}
SLOWDOWNS = ("hardware slowdown", "thermal slowdown", "hardware thermal slowdown", "power brake")
"""Reasons that come and go with heat and power supply: latencies measured meanwhile are too long."""


@dataclass(frozen=True)
class GpuWatch:
    """State of the GPU while the variants were measured, without warm-up.

    A figure is None if the device does not report it, or if the GPU was not watched. Memory is that of all processes.

    Attributes:
        watched: whether NVML could be read.
        unwatched_because: why not.
        reasons: why the clocks were lowered at any time, in words, see `SLOWDOWNS`; None if the device does not
            report it.
    """

    watched: bool
    unwatched_because: str | None = None
    mean_power_w: float | None = None
    max_power_w: float | None = None
    min_clock_mhz: float | None = None
    median_clock_mhz: float | None = None
    max_clock_mhz: float | None = None
    max_temperature_c: float | None = None
    peak_memory_mib: float | None = None
    reasons: tuple[str, ...] | None = None


class Watch:
    """Watches one GPU while its block is entered; a context manager.

    A thread reads NVML ten times a second. It does not hold Python's lock meanwhile, so it takes no more from the
    measured runs than, now and then, a processor core.

    Args:
        uuid: see `cuda_uuid`. A number would not do: NVML and CUDA number devices differently.
        nvml: see `installed_nvml`.
        interval_s: between two readings.
    """

    def __init__(self, uuid: str | None, nvml: ModuleType | None, interval_s: float = 0.1) -> None:
        self._uuid, self._nvml, self._interval_s = uuid, nvml, interval_s
        self._readings: dict[str, list[Any]] = defaultdict(list)
        self._problem: str | None = None
        self._ended = Event()
        self._thread: Thread | None = None
        self._begun = False

    def __enter__(self) -> Self:
        if self._nvml is None:
            self._problem = "nvidia-ml-py is not installed (pip install 'optin-deploy[gpu]')"
            return self
        if self._uuid is None:
            self._problem = "torch sees no CUDA device, so it is not known which GPU to watch"
            return self
        try:
            self._nvml.nvmlInit()
            self._begun = True
            device = self._nvml.nvmlDeviceGetHandleByUUID(self._uuid)
        except self._nvml.NVMLError as error:
            self._problem = f"NVML says: {error}"
            return self
        self._thread = Thread(target=self._read_repeatedly, args=(self._nvml, device), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
        if self._begun and self._nvml is not None:
            self._nvml.nvmlShutdown()

    def result(self) -> GpuWatch:
        """Return the figures, once the block is left."""
        if self._problem is not None or self._nvml is None:
            return GpuWatch(watched=False, unwatched_because=self._problem)
        power, clock = self._readings["power_w"], self._readings["clock_mhz"]
        return GpuWatch(
            watched=True,
            mean_power_w=_aggregate(fmean, power),
            max_power_w=_aggregate(max, power),
            min_clock_mhz=_aggregate(min, clock),
            median_clock_mhz=_aggregate(median, clock),
            max_clock_mhz=_aggregate(max, clock),
            max_temperature_c=_aggregate(max, self._readings["temperature_c"]),
            peak_memory_mib=_aggregate(max, self._readings["memory_mib"]),
            reasons=_reasons_in_words(self._nvml, self._readings["reasons"]),
        )

    def _read_repeatedly(self, nvml: ModuleType, device: object) -> None:
        queries: dict[str, Query] = {
            "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(device) / 1e3,
            "clock_mhz": lambda: nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM),
            "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU),
            "memory_mib": lambda: nvml.nvmlDeviceGetMemoryInfo(device).used / _MIB,
            "reasons": lambda: nvml.nvmlDeviceGetCurrentClocksEventReasons(device),
        }
        while True:
            for key, value in _ask(nvml, queries).items():
                self._readings[key].append(value)
            if self._ended.wait(self._interval_s):
                return


def cuda_uuid() -> str | None:
    """Return the first CUDA device, which makes all runs, as NVML writes it; None if torch sees no device."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(0).uuid}" if torch.cuda.is_available() else None


def gpu_settings(uuid: str | None, nvml: ModuleType | None) -> dict[str, Any]:
    """Return the settings of the GPU; a value is None if NVML is missing or does not report it.

    Keys: ``driver`` (its version), ``power_limit_w``, ``max_clock_mhz``, ``ecc`` and ``mig`` (whether they are on), and
    ``persistence`` (whether the driver stays loaded without a process).

    Args:
        uuid: see `cuda_uuid`.
        nvml: see `installed_nvml`.
    """
    unknown = dict.fromkeys(("driver", "power_limit_w", "max_clock_mhz", "ecc", "mig", "persistence"))
    if uuid is None or nvml is None:
        return unknown
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return unknown
    try:
        device = nvml.nvmlDeviceGetHandleByUUID(uuid)
        queries: dict[str, Query] = {
            "driver": nvml.nvmlSystemGetDriverVersion,
            "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1e3,
            "max_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(device, nvml.NVML_CLOCK_SM),
            "ecc": lambda: bool(nvml.nvmlDeviceGetEccMode(device)[0]),
            "mig": lambda: bool(nvml.nvmlDeviceGetMigMode(device)[0]),
            "persistence": lambda: bool(nvml.nvmlDeviceGetPersistenceMode(device)),
        }
        return unknown | _ask(nvml, queries)
    except nvml.NVMLError:
        return unknown
    finally:
        nvml.nvmlShutdown()


def installed_nvml() -> ModuleType | None:
    """Return the module ``pynvml``; None if it is not installed."""
    try:
        import pynvml
    except ImportError:
        return None
    module: ModuleType = pynvml
    return module


def _ask(nvml: ModuleType, queries: Mapping[str, Query]) -> dict[str, Any]:
    """Return the answers to the queries that the device supports."""
    answers = {}
    for key, query in queries.items():
        with suppress(nvml.NVMLError):
            answers[key] = query()
    return answers


def _aggregate(function: Callable[[list[float]], float], values: list[float]) -> float | None:
    return float(function(values)) if values else None


def _reasons_in_words(nvml: ModuleType, masks: Sequence[int]) -> tuple[str, ...] | None:
    """Return all reasons in any of the bit masks, in the order of `_REASONS`; unknown bits as a number.

    None without masks: then the device does not report reasons, which does not mean that it never slowed down.
    """
    if not masks:
        return None
    seen = reduce(or_, masks)
    names, rest = [], seen & ~nvml.nvmlClocksEventReasonGpuIdle
    for name, words in _REASONS.items():
        bit = getattr(nvml, f"nvmlClocksEventReason{name}")
        rest &= ~bit
        if seen & bit:
            names.append(words)
    return (*names, f"reason {rest:#x} of NVML") if rest else tuple(names)
