"""Statistics of latency samples: percentiles, a bootstrap interval of a speed-up, and when to stop measuring.

Samples of one variant are an array of rounds × repeats, in milliseconds. Whole rounds are resampled: noise on a real
machine is correlated in time (another process wakes up, the clock drops), so the repeats of one round are not
independent, and the noise of a round hits all variants measured in it. ``scipy.stats.bootstrap`` resamples single
values and has neither such blocks nor the corrections of `_stretch` for few and autocorrelated rounds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist
from typing import Annotated

import numpy as np
from numpy.typing import ArrayLike, NDArray

# With fewer rounds the interval is too rough to end a measurement.
STABLE_ROUNDS = 10
TOLERANCE = 0.02
_STABLE_RESAMPLES = 300
# An upper limit: the estimate from few rounds could be near 1 and make the interval useless.
_LARGEST_AUTOCORRELATION = 0.8


class _AboveZero:
    """Metadata of a type for pydantic, which need not be installed: the figure is above 0."""

    def __get_pydantic_core_schema__(self, source: object, handler: object) -> object:
        from pydantic_core import core_schema

        return core_schema.float_schema(gt=0)


Above = Annotated[float, _AboveZero()]
"""A divisor of other figures; whatever reads it from a file checks that it is above 0."""


@dataclass(frozen=True)
class Summary:
    """Latency of one variant over all its samples, in milliseconds."""

    p50_ms: Above
    p90_ms: Above
    p99_ms: Above
    mean_ms: Above
    min_ms: Above
    count: int


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its 95 % confidence interval."""

    value: Above
    low: Above
    high: Above

    def contains(self, x: float) -> bool:
        """Return whether x lies between the bounds, both included."""
        return self.low <= x <= self.high

    def scaled(self, factor: float) -> "Interval":
        """Return all three figures times a positive factor."""
        return Interval(self.value * factor, self.low * factor, self.high * factor)


def summarise(samples_ms: ArrayLike) -> Summary:
    """Return percentiles, mean and minimum of samples of any shape; ValueError without samples."""
    flat = np.asarray(samples_ms, dtype=np.float64).ravel()
    if flat.size == 0:
        raise ValueError("no samples to summarise")
    p50, p90, p99 = (float(value) for value in np.percentile(flat, [50, 90, 99]))
    return Summary(p50, p90, p99, float(flat.mean()), float(flat.min()), int(flat.size))


def paired_ratio(first_ms: ArrayLike, second_ms: ArrayLike) -> float:
    """Return first ÷ second: the interquartile mean over rounds of the logarithm of the ratio of a round's medians.

    The ratio is computed within each round, because the speed of a machine changes from round to round. On a shared
    machine its variance is less than half that of the ratio of medians over all rounds.

    Raises:
        ValueError: the arrays are not both two-dimensional with the same two or more rounds.
    """
    first, second = _paired_rounds(first_ms, second_ms)
    return float(np.exp(_midmean(_log_ratios(first, second))))


def ratio_interval(
    baseline_ms: ArrayLike,
    candidate_ms: ArrayLike,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Interval:
    """Return the speed-up of the candidate, `paired_ratio` of baseline ÷ candidate, with a bootstrap interval.

        interval = ratio_interval(dense_ms, pruned_ms)  # Interval(value=1.52, low=1.49, high=1.55)

    Whole rounds are drawn with replacement, the same rounds for both variants. So noise that lasts longer than a run
    widens the interval, and noise that hits both variants of a round cancels. The percentile interval of the resampled
    ratios is too narrow for few rounds and for noise that lasts longer than a round; `_stretch` corrects it.

    Args:
        baseline_ms: rounds × repeats, in milliseconds.
        candidate_ms: rounds × repeats, in milliseconds: the same rounds; the number of repeats may differ.
        confidence: nominal coverage, between 0 and 1.
        resamples: bootstrap resamples.
        seed: of the resampling.

    Raises:
        ValueError: the arrays are not both two-dimensional with the same two or more rounds.
    """
    logs = _log_ratios(*_paired_rounds(baseline_ms, candidate_ms))
    picks = np.random.default_rng(seed).integers(len(logs), size=(resamples, len(logs)))
    value = float(_midmean(logs))
    bounds = np.quantile(_midmean(logs[picks]), [(1 - confidence) / 2, (1 + confidence) / 2])
    low, high = value + (bounds - value) * _stretch(logs, confidence)
    return Interval(*(float(np.exp(log)) for log in (value, min(low, value), max(high, value))))


def _log_ratios(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the logarithm of the ratio of the medians of each round."""
    return np.log(np.median(first, axis=1) / np.median(second, axis=1))


def _midmean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the mean of the middle half along the last axis: nearly as efficient as the mean, robust to outliers."""
    count = values.shape[-1]
    return np.sort(values, axis=-1)[..., count // 4 : count - count // 4].mean(-1)


def _stretch(logs: NDArray[np.float64], confidence: float) -> float:
    """Return the factor that widens the bootstrap interval of the logarithms.

    With n rounds it is

        t(n − 1) / z · √(n / (n − 1)) · √((1 + ρ) / (1 − ρ))

    Student's t ÷ the normal quantile: the spread is an estimate. n / (n − 1): resamples scatter around the ratio of the
    sample, not the true one. ρ, the lag-1 autocorrelation of the ratios: a round similar to the one before adds less
    information. ρ is corrected for the bias −(1 + 3ρ) / n of its estimate (Marriott & Pope, 1954); n < 5 counts as 5.
    """
    rounds = len(logs)
    logs = logs - logs.mean()
    square = float(logs @ logs)
    autocorrelation = float(logs[1:] @ logs[:-1]) / square if square > 0 else -1.0
    autocorrelation = (autocorrelation + 1 / rounds) / max(1 - 3 / rounds, 0.4)
    autocorrelation = min(max(autocorrelation, 0.0), _LARGEST_AUTOCORRELATION)
    normal = NormalDist().inv_cdf((1 + confidence) / 2)
    few = student_quantile(confidence, rounds - 1) / normal * (rounds / (rounds - 1)) ** 0.5
    return few * ((1 + autocorrelation) / (1 - autocorrelation)) ** 0.5


@cache
def student_quantile(confidence: float, degrees: int) -> float:
    """Return the t for which Student's distribution has the probability ``confidence`` within ±t, to 1e-4 relative."""
    # With t = √d · tan θ the density is proportional to cos(θ)^(d − 1), on a finite range.
    angles = np.linspace(0, np.pi / 2, 100_001)
    heights = np.cos(angles) ** (degrees - 1)
    area = np.concatenate([[0.0], np.cumsum(heights[1:] + heights[:-1])])
    return float(degrees**0.5 * np.tan(np.interp(confidence, area / area[-1], angles)))


def stable(baseline_ms: ArrayLike, candidate_ms: ArrayLike, tolerance: float = TOLERANCE) -> bool:
    """Return whether the ratio has settled to within ±tolerance (relative): the stopping rule.

    All of these must hold:

    1. There are at least `STABLE_ROUNDS` rounds.
    2. The 95 % interval of the ratio is within ±tolerance of its middle: there are enough samples.
    3. The ratios of the first and of the second half of the rounds differ by at most twice the tolerance: there is no
       drift. Twice, because the difference of two halves scatters twice as much as the whole. Without drift, 2 nearly
       implies 3.

    Takes samples as `ratio_interval` does; raises ValueError as it does.
    """
    baseline, candidate = _paired_rounds(baseline_ms, candidate_ms)
    rounds = len(baseline)
    if rounds < STABLE_ROUNDS:
        return False
    half = rounds // 2
    first = paired_ratio(baseline[:half], candidate[:half])
    second = paired_ratio(baseline[half:], candidate[half:])
    if abs(np.log(first / second)) > 2 * tolerance:
        return False
    interval = ratio_interval(baseline, candidate, resamples=_STABLE_RESAMPLES)
    return bool(interval.high - interval.low <= tolerance * (interval.high + interval.low))


def _paired_rounds(baseline_ms: ArrayLike, candidate_ms: ArrayLike) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    arrays = [np.asarray(samples, dtype=np.float64) for samples in (baseline_ms, candidate_ms)]
    shapes: Sequence[tuple[int, ...]] = [array.shape for array in arrays]
    if any(array.ndim != 2 or array.size == 0 for array in arrays) or shapes[0][0] != shapes[1][0] or shapes[0][0] < 2:
        raise ValueError(f"samples must be rounds × repeats with the same 2 or more rounds, not {shapes}")
    return arrays[0], arrays[1]
