"""Estimate latencies from noisy samples: their error, shrinkage towards a line, and monotone fits."""

from collections.abc import Sequence
from statistics import median

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def log_error(samples_ms: Sequence[Sequence[Sequence[float]]], loads: int = 1) -> float:
    """Return the standard error of the logarithm of a row's latency, compared with other rows of the same rounds.

    It is estimated from the scatter that remains after the effects of rows and rounds are removed; 0 if there are too
    few rows or rounds.

    Args:
        samples_ms: of every row, rounds × repeats.
        loads: how often the networks were loaded; with more than one load, the scatter is that from load to load.
    """
    if len(samples_ms) < 2 or len({len(turns) for turns in samples_ms}) > 1 or len(samples_ms[0]) < max(2, loads):
        return 0.0
    logs = np.log([[median(turn) for turn in turns] for turns in samples_ms])
    if loads > 1:
        logs = np.stack([np.median(logs[:, first::loads], axis=1) for first in range(loads)], axis=1)
        logs = logs - logs.mean(axis=1, keepdims=True)
        return _error_of_mean(float(np.square(logs - logs.mean(axis=0)).mean()) ** 0.5, *logs.shape)
    # Tukey's median polish: a burst that hits one run moves neither its row nor its round.
    for _ in range(8):
        logs = logs - np.median(logs, axis=1, keepdims=True)
        logs = logs - np.median(logs, axis=0)
    # The median of |x| is 0.6745 standard deviations.
    return _error_of_mean(float(np.median(np.abs(logs))) / 0.6745, *logs.shape)


def _error_of_mean(scatter: float, rows: int, columns: int) -> float:
    """Return the standard error of a row's mean; one degree of freedom of each axis is used up."""
    return scatter * (rows / ((rows - 1) * (columns - 1))) ** 0.5


def shrink_to_line(sizes: Sequence[Sequence[int]], values: Sequence[float], error: float) -> list[float]:
    """Shrink values towards their best linear fit in ``sizes``, by as much as noise explains.

    With e the standard error of a value and v the variance of the residuals in excess of e², residuals are multiplied
    by v / (v + e²), the empirical Bayes estimate (Efron & Morris, 1973). Without noise, steps stay as they are.
    """
    design = np.column_stack([np.ones(len(values)), np.asarray(sizes, dtype=np.float64)])
    known = np.asarray(values, dtype=np.float64)
    design /= np.abs(design).max(0).clip(1.0)
    fit, _, rank, _ = np.linalg.lstsq(design, known, rcond=None)
    line = design @ fit
    free = len(known) - int(rank)
    if free < 1 or error == 0:
        return known.tolist()
    excess = max(0.0, float(np.square(known - line).sum()) / free - error**2)
    return (line + (known - line) * excess / (excess + error**2)).tolist()


def fit_rising(values: Sequence[float]) -> list[float]:
    """Return the non-decreasing sequence nearest to ``values`` in least squares (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while pools and pools[-1][0] >= mean:
            before, more = pools.pop()
            mean, count = (before * more + mean * count) / (more + count), more + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def fit_rising_grid(cells: Array) -> Array:
    """Make cells non-decreasing along both axes: a few sweeps, each axis in turn, then a running maximum."""
    for _ in range(8):
        cells = np.array([fit_rising(row) for row in cells])
        cells = np.array([fit_rising(column) for column in cells.T]).T
    return np.maximum.accumulate(np.maximum.accumulate(cells, 0), 1)
