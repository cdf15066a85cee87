"""The measuring loop: several variants in turns, round after round, until the figures settle or the time is up."""

import time
from collections.abc import Callable, Mapping
from statistics import median

import numpy as np

WARM_UP_RUNS = 3
WARM_UP_SECONDS = 0.3
# Long enough that the turn's beginning does not matter, short enough that a slow phase hits several variants.
TURN_MS = 40.0
# Bounds the samples kept of a model that takes microseconds.
MOST_REPEATS = 100
# Below this no interval can be told: kept even when it takes longer than the time limit.
FEWEST_ROUNDS = 5

Samples = dict[str, list[list[float]]]
"""Variant name to its samples in milliseconds, rounds × repeats."""


def interleave(
    variants: Mapping[str, Callable[[], None]],
    settled: Callable[[Samples], bool],
    seconds: float,
    seed: int,
    progress: Callable[[float], None],
    clock_ns: Callable[[], int] = time.perf_counter_ns,
) -> tuple[Samples, bool]:
    """Warms the variants up, then times them in rounds.

    In each round every variant has one turn of so many runs as take about `TURN_MS` (at least one, at most
    `MOST_REPEATS`), in an order shuffled anew, so that no variant always follows the same one. A turn of several
    runs begins with one that is not counted: it fetches the weights back into the caches and lets the previous
    variant's threads go to sleep.

    Args:
        variants: name to a callable that makes one run.
        settled: asked now and then whether the samples so far are enough.
        seconds: time limit of the rounds; warm-up comes on top. `FEWEST_ROUNDS` are made whatever the limit.
        seed: of the order of turns.
        progress: called after each round with the fraction of the time limit that has passed.
        clock_ns: a monotonic clock, in nanoseconds.

    Returns:
        The samples, and whether `settled` held when the rounds ended.
    """
    repeats = {name: _repeats(_warm_up_ms(run, clock_ns)) for name, run in variants.items()}
    samples: Samples = {name: [] for name in variants}
    names = list(variants)
    order = np.random.default_rng(seed)
    start_ns = clock_ns()
    next_check = FEWEST_ROUNDS
    while True:
        for index in order.permutation(len(names)):
            name = names[index]
            samples[name].append(_turn_ms(variants[name], repeats[name], clock_ns))
        rounds = len(samples[names[0]])
        elapsed = (clock_ns() - start_ns) / 1e9
        progress(min(1.0, elapsed / seconds))
        late = elapsed >= seconds and rounds >= FEWEST_ROUNDS
        # The check costs milliseconds: made at every round it would eat into the time limit.
        if late or rounds >= next_check:
            if settled(samples):
                return samples, True
            if late:
                return samples, False
            next_check = rounds + max(1, rounds // 8)


def _warm_up_ms(run: Callable[[], None], clock_ns: Callable[[], int]) -> float:
    """Runs until caches, thread pools and clocks are warm; the typical latency of the later half in milliseconds."""
    times_ms: list[float] = []
    end_ns = clock_ns() + WARM_UP_SECONDS * 1e9
    while len(times_ms) < WARM_UP_RUNS or clock_ns() < end_ns:
        times_ms += _turn_ms(run, 1, clock_ns)
    return median(times_ms[len(times_ms) // 2 :])


def _repeats(latency_ms: float) -> int:
    # The clock may read 0 for an empty run.
    return max(1, min(MOST_REPEATS, round(TURN_MS / max(latency_ms, 1e-6))))


def _turn_ms(run: Callable[[], None], repeats: int, clock_ns: Callable[[], int]) -> list[float]:
    if repeats > 1:
        run()
    times_ms = []
    for _ in range(repeats):
        start_ns = clock_ns()
        run()
        times_ms.append((clock_ns() - start_ns) / 1e6)
    return times_ms
