"""The Pareto front: the points that no other point dominates."""

import math
from collections.abc import Sequence


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Return the indices of the points ``(cost, worth)`` that no other dominates, in order of cost.

    A point dominates another if it costs no more, is worth no less, and is better in one of the two. Equal points do
    not dominate each other. A worth of NaN counts as −infinity.
    """
    known = [(cost, -math.inf if math.isnan(worth) else worth) for cost, worth in points]
    front: list[int] = []
    for index in sorted(range(len(known)), key=lambda i: (known[i][0], -known[i][1], i)):
        if not front or known[index][1] > known[front[-1]][1] or known[index] == known[front[-1]]:
            front.append(index)
    return front
