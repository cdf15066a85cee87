import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from profilers.statistics import STABLE_ROUNDS, Interval, ratio_interval, stable, summarise

Array = NDArray[np.float64]
LATENCIES = st.floats(0.01, 1e3)


def rounds_of(most_rounds: int = 8) -> st.SearchStrategy[Array]:
    return hnp.arrays(np.float64, st.tuples(st.integers(2, most_rounds), st.integers(1, 5)), elements=LATENCIES)


def machine(
    rng: np.random.Generator, latencies_ms: tuple[float, float], rounds: int = 30, repeats: int = 5
) -> tuple[Array, Array]:
    """Latencies on a machine whose speed wanders from round to round, with slow phases and noise of each run."""
    wander = np.zeros(rounds)
    for index in range(1, rounds):
        wander[index] = 0.8 * wander[index - 1] + rng.normal(0, 0.03)
    slow_phase = 0.3 * (np.abs(np.arange(rounds) - rng.integers(rounds)) < 3)
    shared = np.exp(wander + slow_phase)[:, None]
    baseline, candidate = (
        latency * shared * np.exp(rng.normal(0, 0.02, (rounds, 1)) + rng.exponential(0.02, (rounds, repeats)))
        for latency in latencies_ms
    )
    return baseline, candidate


@given(hnp.arrays(np.float64, st.integers(1, 200), elements=LATENCIES))
def test_summary_is_that_of_scipy(samples: Array) -> None:
    summary = summarise(samples)
    for percent, value in ((50, summary.p50_ms), (90, summary.p90_ms), (99, summary.p99_ms)):
        assert value == pytest.approx(stats.scoreatpercentile(samples, percent))
    assert summary.mean_ms == pytest.approx(sum(samples) / len(samples))
    assert (summary.min_ms, summary.count) == (min(samples), len(samples))


def test_summary_of_nothing_is_an_error() -> None:
    with pytest.raises(ValueError, match="no samples"):
        summarise([])


def test_interval_contains_its_bounds() -> None:
    interval = Interval(1.0, 0.9, 1.1)
    assert interval.contains(0.9)
    assert interval.contains(1.1)
    assert not interval.contains(1.11)


@settings(max_examples=25, deadline=None)
@given(rounds_of(), st.integers(1, 4), st.integers(0, 100), st.data())
def test_ratio_interval_is_the_loop_over_resamples(
    baseline: Array, repeats: int, seed: int, data: st.DataObject
) -> None:
    rounds = len(baseline)
    candidate = data.draw(hnp.arrays(np.float64, (rounds, repeats), elements=LATENCIES))
    ratios = []
    for pick in np.random.default_rng(seed).integers(rounds, size=(50, rounds)):
        pooled = [[value for index in pick for value in samples[index]] for samples in (baseline, candidate)]
        ratios.append(sorted_median(pooled[0]) / sorted_median(pooled[1]))
    interval = ratio_interval(baseline, candidate, confidence=0.9, resamples=50, seed=seed)
    assert interval.value == pytest.approx(sorted_median(baseline.ravel()) / sorted_median(candidate.ravel()))
    assert interval.low == pytest.approx(stats.scoreatpercentile(ratios, 5))
    assert interval.high == pytest.approx(stats.scoreatpercentile(ratios, 95))


def sorted_median(values: list[float] | Array) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def test_blocks_of_resamples_make_no_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    baseline, candidate = machine(np.random.default_rng(0), (2.0, 1.0))
    whole = ratio_interval(baseline, candidate)
    monkeypatch.setattr("profilers.statistics._BLOCK_ELEMENTS", 1000)
    assert ratio_interval(baseline, candidate) == whole


@settings(max_examples=25, deadline=None)
@given(rounds_of())
def test_samples_against_themselves_are_exactly_1(samples: Array) -> None:
    assert ratio_interval(samples, samples, resamples=50) == Interval(1.0, 1.0, 1.0)


@settings(max_examples=25, deadline=None)
@given(rounds_of(), st.integers(-4, 4))
def test_ratio_scales_with_the_baseline(samples: Array, exponent: int) -> None:
    scale = 2.0**exponent
    plain = ratio_interval(samples, samples[::-1], resamples=50)
    scaled = ratio_interval(samples * scale, samples[::-1], resamples=50)
    assert scaled == Interval(plain.value * scale, plain.low * scale, plain.high * scale)


def test_a_slow_phase_that_hits_both_variants_cancels() -> None:
    speed = np.repeat([1.0, 3.0], [12, 8])[:, None] * np.ones((20, 4))
    interval = ratio_interval(2.0 * speed, speed)
    assert (interval.low, interval.high) == (2.0, 2.0)


def test_interval_of_same_networks_contains_1_as_often_as_it_says() -> None:
    rng = np.random.default_rng(0)
    runs = 200
    hits = sum(ratio_interval(*machine(rng, (1.0, 1.0)), resamples=400).contains(1.0) for _ in range(runs))
    assert 0.9 <= hits / runs <= 0.99


def test_interval_contains_a_true_speedup_as_often_as_it_says() -> None:
    rng = np.random.default_rng(1)
    runs = 200
    hits = sum(ratio_interval(*machine(rng, (3.0, 2.0)), resamples=400).contains(1.5) for _ in range(runs))
    assert 0.9 <= hits / runs <= 0.99


@pytest.mark.parametrize(
    ("baseline", "candidate"),
    [([[1.0]], [[1.0]]), ([[1.0], [1.0]], [[1.0]]), ([1.0, 2.0], [1.0, 2.0]), (np.ones((3, 0)), np.ones((3, 1)))],
)
def test_rounds_that_do_not_pair_are_an_error(baseline: Array, candidate: Array) -> None:
    with pytest.raises(ValueError, match="2 or more rounds"):
        ratio_interval(baseline, candidate)


def test_quiet_samples_are_stable_once_there_are_enough_rounds() -> None:
    samples = np.random.default_rng(0).normal(1.0, 0.002, (STABLE_ROUNDS, 8))
    assert stable(samples, samples[:, ::-1])
    assert not stable(samples[1:], samples[1:, ::-1])


def test_noisy_samples_are_stable_only_to_a_wide_tolerance() -> None:
    rng = np.random.default_rng(0)
    baseline, candidate = np.exp(rng.normal(0, 0.2, (2, 20, 4)))
    assert not stable(baseline, candidate, tolerance=0.02)
    assert stable(baseline, candidate, tolerance=0.5)


def test_a_drifting_ratio_is_not_stable() -> None:
    drift = np.linspace(1.0, 1.1, 400)[:, None]
    assert not stable(drift, np.ones((400, 1)), tolerance=0.02)
