"""What a GPU does while it is measured: power, clocks, temperature, memory, and why it runs slower than it could.

Read through NVML, the driver's own interface, which launches nothing on the GPU.
"""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from statistics import fmean, median
from threading import Event, Thread
from typing import Any, Self

_MIB = 2**20
# NVML's names of what holds the clocks down, in words. An idle GPU's are not held.
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
"""Reasons that come and go with heat and supply: latencies measured under them are longer than they need be."""


@dataclass(frozen=True)
class GpuWatch:
    """What NVML told about the GPU while its variants were measured, warm-up left out.

    A figure is None where the device does not tell it, and all are where it was not watched. Memory is all that is
    used on the GPU, by whatever process.

    Attributes:
        watched: whether NVML could be asked.
        unwatched_because: why not.
        reasons: what held the clocks down at any time, in words, see `SLOWDOWNS`; None where the device does not tell.
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

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """What `dataclasses.asdict` made, after JSON; KeyError or TypeError on anything else."""
        return cls(**{**data, "reasons": None if data["reasons"] is None else tuple(data["reasons"])})


@dataclass
class _Readings:
    """Figures of one GPU, one value for each time it was asked; none where the device does not tell."""

    power_w: list[float] = field(default_factory=list)
    clock_mhz: list[float] = field(default_factory=list)
    temperature_c: list[float] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)
    reasons: list[int] = field(default_factory=list)


class Watch:
    """Watches one GPU while its block is entered; a context manager.

    A thread asks ten times a second and sleeps in between. While NVML answers it does not hold Python's lock, so the
    runs that are measured wait for nothing but, now and then, the processor core that it takes.

    Args:
        uuid: see `cuda_uuid`. A number would not do: NVML counts devices otherwise than CUDA.
        nvml: see `installed_nvml`.
        interval_s: between two questions.
    """

    def __init__(self, uuid: str | None, nvml: Any, interval_s: float = 0.1) -> None:
        self._uuid, self._nvml, self._interval_s = uuid, nvml, interval_s
        self._readings = _Readings()
        self._problem: str | None = None
        self._ended = Event()
        self._thread: Thread | None = None
        self._begun = False

    def __enter__(self) -> Self:
        if self._uuid is None or self._nvml is None:
            missing = "nvidia-ml-py is not installed (pip install 'optin-deploy[gpu]')"
            self._problem = missing if self._nvml is None else "torch sees no CUDA device, so which it is is not known"
            return self
        try:
            self._nvml.nvmlInit()
            self._begun = True
            device = self._nvml.nvmlDeviceGetHandleByUUID(self._uuid)
        except self._nvml.NVMLError as error:
            self._problem = f"NVML says: {error}"
            return self
        self._thread = Thread(target=self._ask, args=(device,), daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._thread is not None:
            self._ended.set()
            self._thread.join()
        if self._begun:
            self._nvml.nvmlShutdown()

    def result(self) -> GpuWatch:
        """What was seen, once the block is left."""
        if self._problem is not None:
            return GpuWatch(watched=False, unwatched_because=self._problem)
        seen = self._readings
        return GpuWatch(
            watched=True,
            mean_power_w=_of(fmean, seen.power_w),
            max_power_w=_of(max, seen.power_w),
            min_clock_mhz=_of(min, seen.clock_mhz),
            median_clock_mhz=_of(median, seen.clock_mhz),
            max_clock_mhz=_of(max, seen.clock_mhz),
            max_temperature_c=_of(max, seen.temperature_c),
            peak_memory_mib=_of(max, seen.memory_mib),
            reasons=_named(self._nvml, seen.reasons),
        )

    def _ask(self, device: Any) -> None:
        while True:
            _read(self._nvml, device, self._readings)
            if self._ended.wait(self._interval_s):
                return


def cuda_uuid() -> str | None:
    """The first of CUDA's devices, on which all runs are, as NVML writes it; None where torch sees no device."""
    import torch

    return f"GPU-{torch.cuda.get_device_properties(0).uuid}" if torch.cuda.is_available() else None


def gpu_settings(uuid: str | None, nvml: Any) -> dict[str, Any]:
    """What the GPU is set to, as far as NVML tells: a value is None where it does not, and all are without NVML.

    Keys: `driver` (its version), `power_limit_w`, `max_clock_mhz`, `ecc` and `mig` (whether they are on), and
    `persistence` (whether the driver stays loaded without a process).

    Args:
        uuid: see `cuda_uuid`.
        nvml: see `installed_nvml`.
    """
    keys = ("driver", "power_limit_w", "max_clock_mhz", "ecc", "mig", "persistence")
    found: dict[str, Any] = dict.fromkeys(keys)
    if uuid is None or nvml is None:
        return found
    try:
        nvml.nvmlInit()
    except nvml.NVMLError:
        return found
    try:
        with suppress(nvml.NVMLError):
            device = nvml.nvmlDeviceGetHandleByUUID(uuid)
            questions: dict[str, Callable[[], Any]] = {
                "driver": nvml.nvmlSystemGetDriverVersion,
                "power_limit_w": lambda: nvml.nvmlDeviceGetEnforcedPowerLimit(device) / 1e3,
                "max_clock_mhz": lambda: nvml.nvmlDeviceGetMaxClockInfo(device, nvml.NVML_CLOCK_SM),
                "ecc": lambda: bool(nvml.nvmlDeviceGetEccMode(device)[0]),
                "mig": lambda: bool(nvml.nvmlDeviceGetMigMode(device)[0]),
                "persistence": lambda: bool(nvml.nvmlDeviceGetPersistenceMode(device)),
            }
            for key, ask in questions.items():
                with suppress(nvml.NVMLError):
                    found[key] = ask()
    finally:
        nvml.nvmlShutdown()
    return found


def installed_nvml() -> Any:
    """The module `pynvml`; None where it is not installed."""
    try:
        import pynvml
    except ImportError:
        return None
    return pynvml


def _read(nvml: Any, device: Any, into: _Readings) -> None:
    """One value of every figure that the device tells; it may tell some and not others."""
    with suppress(nvml.NVMLError):
        into.power_w.append(nvml.nvmlDeviceGetPowerUsage(device) / 1e3)
    with suppress(nvml.NVMLError):
        into.clock_mhz.append(nvml.nvmlDeviceGetClockInfo(device, nvml.NVML_CLOCK_SM))
    with suppress(nvml.NVMLError):
        into.temperature_c.append(nvml.nvmlDeviceGetTemperature(device, nvml.NVML_TEMPERATURE_GPU))
    with suppress(nvml.NVMLError):
        into.memory_mib.append(nvml.nvmlDeviceGetMemoryInfo(device).used / _MIB)
    with suppress(nvml.NVMLError):
        into.reasons.append(nvml.nvmlDeviceGetCurrentClocksEventReasons(device))


def _of(figure: Callable[[list[float]], float], values: list[float]) -> float | None:
    return float(figure(values)) if values else None


def _named(nvml: Any, masks: list[int]) -> tuple[str, ...] | None:
    """All reasons in any of the bit masks, in words, in the order of `_REASONS`; those without any as bits.

    None without any mask: a device that does not tell is not one that never slowed down.
    """
    if not masks:
        return None
    seen = 0
    for mask in masks:
        seen |= mask
    found, rest = [], seen & ~nvml.nvmlClocksEventReasonGpuIdle
    for name, words in _REASONS.items():
        bit = getattr(nvml, f"nvmlClocksEventReason{name}")
        rest &= ~bit
        if seen & bit:
            found.append(words)
    return (*found, f"reason {rest:#x} of NVML") if rest else tuple(found)
