"""Statistics of latency samples: percentiles, a bootstrap interval on a speed-up, and when to stop measuring.

Samples of one variant are an array of rounds × repeats, in milliseconds. Rounds are the unit of resampling: noise
on a real machine is correlated in time (another process wakes up, the clock drops), so the repeats of one round are
no independent samples, and all variants measured in one round share its luck.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

# An interval from a handful of rounds is too rough an estimate to be trusted to end a measurement.
STABLE_ROUNDS = 10
TOLERANCE = 0.02
_STABLE_RESAMPLES = 300
# With more, the estimate from a handful of rounds would blow the interval up beyond use.
_LARGEST_AUTOCORRELATION = 0.8


@dataclass(frozen=True)
class Summary:
    """Latency of one variant over all its samples, in milliseconds."""

    p50_ms: float
    p90_ms: float
    p99_ms: float
    mean_ms: float
    min_ms: float
    count: int


@dataclass(frozen=True)
class Interval:
    """An estimate and the bounds of its confidence interval."""

    value: float
    low: float
    high: float

    def contains(self, x: float) -> bool:
        """Whether x lies between the bounds, both included."""
        return self.low <= x <= self.high


def summarise(samples_ms: ArrayLike) -> Summary:
    """Percentiles, mean and minimum over all samples of any shape; ValueError when there are none."""
    flat = np.asarray(samples_ms, dtype=np.float64).ravel()
    if flat.size == 0:
        raise ValueError("no samples to summarise")
    p50, p90, p99 = (float(value) for value in np.percentile(flat, [50, 90, 99]))
    return Summary(p50, p90, p99, float(flat.mean()), float(flat.min()), int(flat.size))


def paired_ratio(first_ms: ArrayLike, second_ms: ArrayLike) -> float:
    """first ÷ second: the interquartile mean, over rounds, of the logarithm of the ratio of a round's medians.

    Rounds are compared with themselves, since a machine's pace changes from round to round and both share its luck:
    on a shared machine this scatters less than half as much (in variance) as the ratio of medians over all rounds.

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
    """How many times faster the candidate is, `paired_ratio` of baseline ÷ candidate, with a bootstrap interval.

    Whole rounds are drawn with replacement, the same rounds for both variants, so that noise that lasts longer than
    a run widens the interval as it should, and noise that hits both variants of a round cancels as it should. The
    percentile interval of the resampled ratios, which is too narrow for a handful of rounds and for noise that lasts
    longer than a round, is stretched by `_stretch`.

    Args:
        baseline_ms: rounds × repeats, in milliseconds.
        candidate_ms: rounds × repeats, in milliseconds: the same rounds, perhaps another number of repeats.
        confidence: coverage aimed at, between 0 and 1.
        resamples: bootstrap resamples.
        seed: of the resampling; one seed makes one interval.

    Raises:
        ValueError: the arrays are not both two-dimensional with the same two or more rounds.
    """
    logs = _log_ratios(*_paired_rounds(baseline_ms, candidate_ms))
    picks = np.random.default_rng(seed).integers(len(logs), size=(resamples, len(logs)))
    value = float(_midmean(logs))
    bounds = np.quantile(_midmean(logs[picks]), [(1 - confidence) / 2, (1 + confidence) / 2])
    low, high = value + (bounds - value) * _stretch(logs, confidence)
    return Interval(*(float(np.exp(found)) for found in (value, min(low, value), max(high, value))))


def _log_ratios(first: NDArray[np.float64], second: NDArray[np.float64]) -> NDArray[np.float64]:
    """The logarithm of the ratio of every round's medians."""
    return np.log(np.median(first, axis=1) / np.median(second, axis=1))


def _midmean(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """The mean of the middle half along the last axis: nearly as steady as the mean, and blind to what sticks out."""
    count = values.shape[-1]
    return np.sort(values, axis=-1)[..., count // 4 : count - count // 4].mean(-1)


def _stretch(logs: NDArray[np.float64], confidence: float) -> float:
    """How many times wider than the bootstrap's an interval of the logarithms has to be, with n rounds:

        t(n − 1) / z · √(n / (n − 1)) · √((1 + ρ) / (1 − ρ))

    Student's t over the normal's quantile because the spread is an estimate, n / (n − 1) because resamples scatter
    around the sample's ratio and not the true one, and ρ, the lag-1 autocorrelation of the rounds' ratios, because
    rounds that resemble the one before count for less. ρ is corrected for the bias −(1 + 3ρ) / n of its estimate
    (Marriott & Pope, 1954), at n < 5 as at 5.
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
    """The t within whose ±t Student's distribution has the probability ``confidence``; good to 1e-4 of its value."""
    # With t = √d · tan θ the density is proportional to cos(θ)^(d − 1), on a finite range.
    angles = np.linspace(0, np.pi / 2, 100_001)
    heights = np.cos(angles) ** (degrees - 1)
    area = np.concatenate([[0.0], np.cumsum(heights[1:] + heights[:-1])])
    return float(degrees**0.5 * np.tan(np.interp(confidence, area / area[-1], angles)))


def stable(baseline_ms: ArrayLike, candidate_ms: ArrayLike, tolerance: float = TOLERANCE) -> bool:
    """The stopping rule: has the ratio settled to within ±tolerance (relative)?

    All of these must hold:

    1. There are at least `STABLE_ROUNDS` rounds.
    2. The 95% interval of the ratio reaches no further than ±tolerance from its middle: enough samples.
    3. The ratio over the first half of the rounds and that over the second differ by no more than twice the
       tolerance: no drift. Twice, because halves scatter twice as much around each other as the whole does around
       the truth; without drift, 2. nearly implies 3.

    Args:
        baseline_ms: rounds × repeats, in milliseconds.
        candidate_ms: rounds × repeats, in milliseconds, the same rounds.
        tolerance: relative, 0.02 is 2%.

    Raises:
        ValueError: the arrays are not both two-dimensional with the same two or more rounds.
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
