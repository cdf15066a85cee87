"""The Pareto front: what no other point beats."""

import math
from collections.abc import Sequence


def front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points ``(cost, worth)`` that no other dominates, in order of cost.

    A point dominates another when it costs no more, is worth no less, and is better on one of the two; equal points do
    not dominate each other. A worth of NaN counts as the least there is.
    """
    known = [(cost, -math.inf if math.isnan(worth) else worth) for cost, worth in points]
    found: list[int] = []
    for index in sorted(range(len(known)), key=lambda i: (known[i][0], -known[i][1], i)):
        if not found or known[index][1] > known[found[-1]][1] or known[index] == known[found[-1]]:
            found.append(index)
    return found
