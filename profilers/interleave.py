"""The measuring loop: several variants in turns, round after round, until the figures settle or the time is up."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from statistics import median
from typing import NamedTuple

import numpy as np

from profilers.runners.base import Run

WARM_UP_RUNS = 3
WARM_UP_SECONDS = 0.3
# Long enough that the turn's beginning does not matter, short enough that a slow phase hits several variants.
TURN_MS = 40.0
# Slower runs take so long that what the run before has left in the caches does not matter.
WARMED_MS = 200.0
# Bounds the samples kept of a model that takes microseconds.
MOST_REPEATS = 100
# Below this no interval can be told: kept even when it takes longer than the time limit.
FEWEST_ROUNDS = 5

Samples = dict[str, list[list[float]]]
"""Variant name to its samples in milliseconds, rounds × repeats."""


class Interleaved(NamedTuple):
    """Latencies by the clock, the times on the device (turns are empty where runs do not tell them), and whether the
    samples had settled when the rounds ended."""

    samples_ms: Samples
    device_ms: Samples
    converged: bool


def interleave(
    variants: Mapping[str, Sequence[Run]],
    settled: Callable[[Samples], bool],
    seconds: float,
    seed: int,
    progress: Callable[[float], None],
    clock_ns: Callable[[], int] = time.perf_counter_ns,
    during_rounds: AbstractContextManager[object] | None = None,
) -> Interleaved:
    """Warms the variants up, then times them in rounds.

    In each round every variant has one turn of so many runs as take about `TURN_MS` (at least one, at most
    `MOST_REPEATS`), in an order shuffled anew, so that no variant always follows the same one. A turn begins with a
    run that is not counted, if it takes less than `WARMED_MS`: it fetches the weights back into the caches and lets
    the previous variant's threads go to sleep.

    Args:
        variants: name to callables that make one run, one for each time that the variant is loaded, or was built; they
            take its turns one after the other, that of round r is r modulo their number. Where in memory a network
            happens to lie makes it a percent faster or slower.
        settled: asked now and then whether the samples so far are enough.
        seconds: time limit of the rounds; warm-up comes on top. `FEWEST_ROUNDS` are made whatever the limit, and every
            callable has a turn.
        seed: of the order of turns.
        progress: called after each round with the fraction of the time limit that has passed.
        clock_ns: a monotonic clock, in nanoseconds.
        during_rounds: entered after the warm-up, left after the last round.
    """
    latency_ms = {
        name: median(_warm_up_ms(run, WARM_UP_SECONDS / len(runs), clock_ns) for run in runs)
        for name, runs in variants.items()
    }
    with during_rounds or nullcontext():
        return _rounds(variants, latency_ms, settled, seconds, seed, progress, clock_ns)


def _rounds(
    variants: Mapping[str, Sequence[Run]],
    latency_ms: Mapping[str, float],
    settled: Callable[[Samples], bool],
    seconds: float,
    seed: int,
    progress: Callable[[float], None],
    clock_ns: Callable[[], int],
) -> Interleaved:
    samples: Samples = {name: [] for name in variants}
    device_ms: Samples = {name: [] for name in variants}
    names = list(variants)
    order = np.random.default_rng(seed)
    start_ns = clock_ns()
    fewest = max([FEWEST_ROUNDS, *map(len, variants.values())])
    rounds, next_check = 0, fewest
    while True:
        for index in order.permutation(len(names)):
            name = names[index]
            runs = variants[name]
            turn = _turn(runs[rounds % len(runs)], latency_ms[name], clock_ns)
            samples[name].append([latency for latency, _ in turn])
            device_ms[name].append([ms for _, ms in turn if ms is not None])
        rounds += 1
        elapsed = (clock_ns() - start_ns) / 1e9
        progress(min(1.0, elapsed / seconds))
        late = elapsed >= seconds and rounds >= fewest
        # The check costs milliseconds: made at every round it would eat into the time limit.
        if late or rounds >= next_check:
            if settled(samples):
                return Interleaved(samples, device_ms, True)
            if late:
                return Interleaved(samples, device_ms, False)
            next_check = rounds + max(1, rounds // 8)


def _warm_up_ms(run: Run, seconds: float, clock_ns: Callable[[], int]) -> float:
    """Runs until caches, thread pools and clocks are warm; the typical latency of the later half in milliseconds."""
    times_ms: list[float] = []
    end_ns = clock_ns() + seconds * 1e9
    while len(times_ms) < WARM_UP_RUNS or clock_ns() < end_ns:
        times_ms.append(_timed(run, clock_ns)[0])
    return median(times_ms[len(times_ms) // 2 :])


def _repeats(latency_ms: float) -> int:
    # The clock may read 0 for an empty run.
    return max(1, min(MOST_REPEATS, round(TURN_MS / max(latency_ms, 1e-6))))


def _turn(run: Run, latency_ms: float, clock_ns: Callable[[], int]) -> list[tuple[float, float | None]]:
    if latency_ms < WARMED_MS:
        run()
    return [_timed(run, clock_ns) for _ in range(_repeats(latency_ms))]


def _timed(run: Run, clock_ns: Callable[[], int]) -> tuple[float, float | None]:
    """The latency of one run, and its time on the device, in milliseconds."""
    start_ns = clock_ns()
    device_ms = run()
    return (clock_ns() - start_ns) / 1e6, device_ms
