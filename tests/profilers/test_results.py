from dataclasses import asdict, replace

import pytest
from pydantic import TypeAdapter

from profilers import Comparison, GpuWatch, Interval, Measurement, RawSamples
from profilers.results import Builds, is_significant

SAMPLES = {
    "dense": [[2.0, 2.02], [2.01, 2.0], [2.03, 2.0]],
    "dense_again": [[2.01, 2.0], [2.0, 2.02], [2.0, 2.01]],
    "pruned": [[1.0, 1.1, 0.123456], [1.0, 1.0, 1.02], [1.01, 1.0, 1.0]],
}


def measurement() -> Measurement:
    return Measurement.from_samples("ort-cpu", 4, RawSamples(SAMPLES, converged=True, peak_rss_mib=123.4567))


def test_figures_follow_from_the_samples() -> None:
    figures = measurement()
    assert figures.summary["pruned"].p50_ms == 1.0
    assert figures.summary["pruned"].count == 9
    # Nine runs of four samples; the slow ones count, of which the median tells nothing.
    assert figures.throughput_per_s["pruned"] == pytest.approx(36e3 / sum(sum(turn) for turn in SAMPLES["pruned"]))
    assert figures.throughput_per_s["pruned"] < 4000 * 1.1 / 1.0
    # The middle of 2.01 / 1.0, 2.005 / 1.0 and 2.015 / 1.0.
    assert figures.speedup.value == pytest.approx((2.01 * 2.005 * 2.015) ** (1 / 3))
    assert figures.noise.contains(1.0)
    assert figures.significant


def test_json_gives_the_same_back() -> None:
    gpu = GpuWatch(watched=True, mean_power_w=200.5, max_clock_mhz=1980.0, reasons=("power cap", "sync boost"))
    on_gpu = replace(measurement(), device_ms={"dense": 1.9}, cuda_graph={"dense": True}, gpu=gpu)
    several = Measurement.from_samples(
        "rtx", 4, RawSamples(SAMPLES, True, 1.0), builds={"dense": 2, "dense_again": 2, "pruned": 1}
    )
    comparison = Comparison((measurement(), on_gpu, several), {"cpu": "abacus"}, {"threads": 2})
    saved = TypeAdapter(Comparison).dump_json(comparison)
    assert TypeAdapter(Comparison).validate_json(saved) == comparison


def test_files_without_a_gpu_s_figures_or_builds_are_read() -> None:
    data = asdict(measurement())
    assert data.pop("builds") == {}
    for name in ("device_ms", "cuda_graph", "gpu"):
        del data[name]
    assert TypeAdapter(Measurement).validate_python(data) == measurement()


def test_each_build_has_the_rounds_that_were_its_own() -> None:
    turns = [[1.0, 1.2, 1.1], [2.0], [3.0, 3.0], [1.3], [2.2], [3.0]]
    builds = Builds.from_turns(turns, 3)
    assert builds.p50_ms == pytest.approx((1.15, 2.1, 3.0))
    assert builds.spread == pytest.approx(3.0 / 1.15 - 1)
    samples = {name: [turn[:1] for turn in turns] for name in SAMPLES}
    found = Measurement.from_samples("rtx", 1, RawSamples(samples, True, 1.0), builds={"dense": 3, "pruned": 1}).builds
    assert found == {"dense": Builds((1.15, 2.1, 3.0), 3.0 / 1.15 - 1)}


@pytest.mark.parametrize(
    ("speedup", "noise", "significant"),
    [
        (Interval(1.5, 1.4, 1.6), Interval(1.0, 0.98, 1.02), True),
        (Interval(0.6, 0.5, 0.7), Interval(1.0, 0.98, 1.02), True),  # a slow-down is a finding too
        (Interval(1.5, 0.9, 1.6), Interval(1.0, 0.98, 1.02), False),  # its own interval holds 1
        (Interval(1.05, 1.04, 1.06), Interval(0.95, 0.90, 0.99), False),  # less than the same file differs by
        (Interval(1.05, 1.04, 1.06), Interval(1.0, 1.0, 1.10), False),
    ],
)
def test_no_speedup_below_the_noise_is_significant(speedup: Interval, noise: Interval, significant: bool) -> None:
    assert is_significant(speedup, noise) is significant
