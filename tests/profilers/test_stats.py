from dataclasses import astuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from scipy import stats  # type: ignore[import-untyped]

from profilers.stats import (
    STABLE_ROUNDS,
    Interval,
    paired_ratio,
    ratio_interval,
    stable,
    student_quantile,
    summarise,
)

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
def test_ratio_interval_is_the_loop_over_resamples_stretched(
    baseline: Array, repeats: int, seed: int, data: st.DataObject
) -> None:
    rounds = len(baseline)
    candidate = data.draw(hnp.arrays(np.float64, (rounds, repeats), elements=LATENCIES))
    logs = [np.log(sorted_median(b) / sorted_median(c)) for b, c in zip(baseline, candidate, strict=True)]
    picks = np.random.default_rng(seed).integers(rounds, size=(50, rounds))
    drawn = [stats.trim_mean([logs[index] for index in pick], 0.25) for pick in picks]
    interval = ratio_interval(baseline, candidate, confidence=0.9, resamples=50, seed=seed)
    value, wider = stats.trim_mean(logs, 0.25), stretch(baseline, candidate, 0.9)
    low, high = (value + (stats.scoreatpercentile(drawn, percent) - value) * wider for percent in (5, 95))
    assert interval.value == pytest.approx(np.exp(value)) == pytest.approx(paired_ratio(baseline, candidate))
    assert interval.low == pytest.approx(np.exp(min(low, value)), rel=1e-4)
    assert interval.high == pytest.approx(np.exp(max(high, value)), rel=1e-4)


def stretch(baseline: Array, candidate: Array, confidence: float) -> float:
    """The factor of the docstring, term by term."""
    n = len(baseline)
    logs = [np.log(sorted_median(b) / sorted_median(c)) for b, c in zip(baseline, candidate, strict=True)]
    off = [value - sum(logs) / n for value in logs]
    square = sum(value**2 for value in off)
    rho = sum(first * second for first, second in zip(off[1:], off[:-1], strict=True)) / square if square else 0
    rho = (rho + 1 / n) / max(1 - 3 / n, 0.4) if square else 0
    rho = min(max(rho, 0), 0.8)
    few = stats.t.ppf((1 + confidence) / 2, n - 1) / stats.norm.ppf((1 + confidence) / 2) * (n / (n - 1)) ** 0.5
    return few * ((1 + rho) / (1 - rho)) ** 0.5


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("degrees", [1, 2, 5, 30, 1000])
def test_student_quantile_is_that_of_scipy(confidence: float, degrees: int) -> None:
    expected = stats.t.ppf((1 + confidence) / 2, degrees)
    assert student_quantile(confidence, degrees) == pytest.approx(expected, rel=1e-4)


def sorted_median(values: list[float] | Array) -> float:
    ordered = sorted(values)
    return (ordered[(len(ordered) - 1) // 2] + ordered[len(ordered) // 2]) / 2


def test_a_change_of_pace_scatters_the_paired_ratio_less_than_that_of_medians() -> None:
    rng = np.random.default_rng(0)
    found = []
    for _ in range(100):
        pace = np.where(rng.random(40) < 0.5, 1.0, 1.4)[:, None]
        pair = [pace * np.exp(rng.normal(0, 0.05, (40, 2))) for _ in range(2)]
        found.append((np.log(paired_ratio(*pair)), np.log(np.median(pair[0]) / np.median(pair[1]))))
    paired, pooled = np.std(found, axis=0)
    assert paired < 0.7 * pooled


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
    assert astuple(scaled) == pytest.approx([bound * scale for bound in astuple(plain)])


def test_a_slow_phase_that_hits_both_variants_cancels() -> None:
    speed = np.repeat([1.0, 3.0], [12, 8])[:, None] * np.ones((20, 4))
    interval = ratio_interval(2.0 * speed, speed)
    assert (interval.low, interval.high) == pytest.approx((2.0, 2.0))


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


def autocorrelated(rng: np.random.Generator, rounds: int, correlation: float, tails: float) -> Array:
    """Rounds × 1 latencies of a true 1 ms whose noise of 5 % lasts from round to round, or has heavy tails."""
    noise = 0.05 * rng.standard_t(tails, rounds)
    for index in range(1, rounds):
        noise[index] = correlation * noise[index - 1] + (1 - correlation**2) ** 0.5 * noise[index]
    return np.exp(noise)[:, None]


@pytest.mark.parametrize("rounds", [5, 7, 10, 15, 40])
@pytest.mark.parametrize(("correlation", "tails", "least"), [(0.0, 100.0, 0.94), (0.0, 3.0, 0.94), (0.3, 100.0, 0.91)])
def test_few_rounds_and_noise_that_lasts_do_not_make_the_interval_too_narrow(
    rounds: int, correlation: float, tails: float, least: float
) -> None:
    rng = np.random.default_rng(rounds)
    runs = 400
    hits = 0
    for _ in range(runs):
        pair = [autocorrelated(rng, rounds, correlation, tails) for _ in range(2)]
        hits += ratio_interval(*pair, resamples=200).contains(1.0)
    # Less than two standard errors of 400 runs (1.1 %) below 95 %, or what rounds that resemble each other cost.
    assert hits / runs >= least


def test_stopping_when_stable_leaves_the_coverage() -> None:
    rng = np.random.default_rng(0)
    hits, runs = 0, 100
    for _ in range(runs):
        pair = [autocorrelated(rng, 60, 0.0, 100.0) ** 0.5 for _ in range(2)]
        checks = (rounds for rounds in range(STABLE_ROUNDS, 61, 3) if stable(pair[0][:rounds], pair[1][:rounds]))
        stop = next(checks, 60)
        hits += ratio_interval(pair[0][:stop], pair[1][:stop], resamples=400).contains(1.0)
    assert hits / runs >= 0.91


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
