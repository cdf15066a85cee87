"""Watching a GPU: what is made of NVML's answers, with a pretended NVML, and with the real one where there is a GPU."""

from threading import Condition, active_count
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from profilers.gpu_watch import SLOWDOWNS, GpuWatch, Watch, cuda_uuid, gpu_settings, installed_nvml

IDLE, POWER_CAP, SET_CLOCKS, THERMAL = 1, 4, 2, 32


class NVMLError(Exception):
    pass


class Nvml:
    """A pretended `pynvml`: each figure is told in the order given, the last one for ever after."""

    NVMLError = NVMLError
    NVML_CLOCK_SM, NVML_TEMPERATURE_GPU = 1, 0
    nvmlClocksEventReasonGpuIdle = IDLE  # noqa: N815
    nvmlClocksEventReasonApplicationsClocksSetting = SET_CLOCKS  # noqa: N815
    nvmlClocksEventReasonSwPowerCap = POWER_CAP  # noqa: N815
    nvmlClocksEventReasonHwSlowdown = 8  # noqa: N815
    nvmlClocksEventReasonSyncBoost = 16  # noqa: N815
    nvmlClocksEventReasonSwThermalSlowdown = THERMAL  # noqa: N815
    nvmlClocksEventReasonHwThermalSlowdown = 64  # noqa: N815
    nvmlClocksEventReasonHwPowerBrakeSlowdown = 128  # noqa: N815
    nvmlClocksEventReasonDisplayClockSetting = 256  # noqa: N815

    def __init__(self, **told: list[float]) -> None:
        self.told = told
        self.asked = self.users = 0
        self.change = Condition()

    def answered(self, times: int) -> bool:
        """Wait until it was asked so often, which happens in a thread of its own."""
        with self.change:
            return self.change.wait_for(lambda: self.asked >= times, timeout=60)

    def nvmlInit(self) -> None:  # noqa: N802
        self.users += 1

    def nvmlShutdown(self) -> None:  # noqa: N802
        self.users -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:  # noqa: N802
        if uuid != "GPU-1":
            raise NVMLError("Not Found")
        return uuid

    def _next(self, figure: str) -> Any:
        values = self.told.get(figure)
        if values is None:
            raise NVMLError("Not Supported")
        return values.pop(0) if len(values) > 1 else values[0]

    def nvmlDeviceGetPowerUsage(self, device: str) -> Any:  # noqa: N802
        with self.change:
            self.asked += 1
            self.change.notify_all()
        return self._next("milliwatts")

    def nvmlDeviceGetClockInfo(self, device: str, kind: int) -> Any:  # noqa: N802
        return self._next("mhz")

    def nvmlDeviceGetTemperature(self, device: str, kind: int) -> Any:  # noqa: N802
        return self._next("celsius")

    def nvmlDeviceGetMemoryInfo(self, device: str) -> Any:  # noqa: N802
        return SimpleNamespace(used=self._next("used_bytes"))

    def nvmlSystemGetDriverVersion(self) -> str:  # noqa: N802
        return "580.95.05"

    def nvmlDeviceGetEnforcedPowerLimit(self, device: str) -> Any:  # noqa: N802
        return self._next("limit_milliwatts")

    def nvmlDeviceGetMaxClockInfo(self, device: str, kind: int) -> Any:  # noqa: N802
        return self._next("max_mhz")

    def nvmlDeviceGetEccMode(self, device: str) -> Any:  # noqa: N802
        return [self._next("ecc"), 0]

    def nvmlDeviceGetMigMode(self, device: str) -> Any:  # noqa: N802
        return [self._next("mig"), 0]

    def nvmlDeviceGetPersistenceMode(self, device: str) -> Any:  # noqa: N802
        return self._next("persistence")

    def nvmlDeviceGetCurrentClocksEventReasons(self, device: str) -> Any:  # noqa: N802
        return self._next("reasons")


def test_what_a_gpu_is_set_to_is_told_as_far_as_it_tells() -> None:
    nvml = Nvml(limit_milliwatts=[700_000], max_mhz=[1980], ecc=[1], persistence=[0])
    assert gpu_settings("GPU-1", nvml) == {
        "driver": "580.95.05",
        "power_limit_w": 700.0,
        "max_clock_mhz": 1980,
        "ecc": True,
        "mig": None,
        "persistence": False,
    }
    assert nvml.users == 0
    unknown = dict.fromkeys(gpu_settings("GPU-1", nvml))
    assert gpu_settings("GPU-2", nvml) == gpu_settings(None, nvml) == gpu_settings("GPU-1", None) == unknown
    assert nvml.users == 0


def test_without_reasons_it_is_unknown_whether_clocks_were_held() -> None:
    assert watched(Nvml(milliwatts=[1.0]), 2).reasons is None
    assert watched(Nvml(reasons=[IDLE]), 2).reasons == ()


def watched(nvml: Nvml, times: int) -> GpuWatch:
    """What is seen when NVML is asked at least so often."""
    with Watch("GPU-1", nvml, interval_s=0.001) as watch:
        assert nvml.answered(times)
    return watch.result()


def test_figures_are_those_that_were_told() -> None:
    nvml = Nvml(
        milliwatts=[100_000, 300_000],
        mhz=[1980, 1200, 1500],
        celsius=[40, 61, 55],
        used_bytes=[2**30, 3 * 2**30, 2**30],
        reasons=[IDLE, POWER_CAP | THERMAL, IDLE],
    )
    seen = watched(nvml, 4)
    assert seen.watched
    assert seen.max_power_w == 300
    assert seen.mean_power_w is not None
    assert 200 < seen.mean_power_w < 300
    assert (seen.min_clock_mhz, seen.median_clock_mhz, seen.max_clock_mhz) == (1200, 1500, 1980)
    assert seen.max_temperature_c == 61
    assert seen.peak_memory_mib == 3 * 1024
    assert seen.reasons == ("power cap", "thermal slowdown")
    assert set(seen.reasons) & set(SLOWDOWNS) == {"thermal slowdown"}
    assert nvml.users == 0


def test_reasons_without_words_are_not_lost() -> None:
    assert watched(Nvml(reasons=[IDLE | POWER_CAP, 0x200]), 3).reasons == ("power cap", "reason 0x200 of NVML")


def test_a_block_that_is_over_at_once_is_seen_too() -> None:
    with Watch("GPU-1", Nvml(mhz=[1000]), interval_s=60) as watch:
        pass
    assert watch.result().median_clock_mhz == 1000


def test_what_the_device_does_not_tell_is_none() -> None:
    assert watched(Nvml(mhz=[1000]), 2) == GpuWatch(
        watched=True, min_clock_mhz=1000, median_clock_mhz=1000, max_clock_mhz=1000
    )


def test_an_error_inside_the_block_ends_the_watch() -> None:
    nvml, threads = Nvml(mhz=[1000]), active_count()
    with pytest.raises(KeyError), Watch("GPU-1", nvml):
        assert active_count() == threads + 1
        raise KeyError
    assert (active_count(), nvml.users) == (threads, 0)


@pytest.mark.parametrize(
    ("uuid", "nvml", "why"),
    [
        ("GPU-1", None, "optin-deploy[gpu]"),
        ("GPU-2", Nvml(), "Not Found"),
        (None, Nvml(), "no CUDA device"),
    ],
)
def test_a_gpu_that_cannot_be_watched_says_why(uuid: str | None, nvml: Nvml | None, why: str) -> None:
    with Watch(uuid, nvml) as watch:
        pass
    seen = watch.result()
    assert not seen.watched
    assert seen.median_clock_mhz is None
    assert seen.unwatched_because is not None
    assert why in seen.unwatched_because
    assert nvml is None or nvml.users == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_the_real_device_is_watched() -> None:
    if installed_nvml() is None:
        pytest.skip("nvidia-ml-py is not installed")
    values = torch.randn(2048, 2048, device="cuda")
    with Watch(cuda_uuid(), installed_nvml()) as watch:
        for _ in range(500):
            values = torch.tanh(values @ values)
        torch.cuda.synchronize()
    seen = watch.result()
    assert seen.watched, seen.unwatched_because
    assert seen.peak_memory_mib is not None
    assert seen.peak_memory_mib > 16
    assert seen.median_clock_mhz is not None
    assert seen.median_clock_mhz > 0
