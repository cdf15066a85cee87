"""The measuring loop: several variants take turns, round after round, until the figures settle or the time is up.

Existing tools do not fit: ``torch.utils.benchmark`` times one callable after the other, so a slow phase of the machine
hits one variant only, and it does not measure the noise between two loads of the same file (A/A).
"""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from statistics import median
from typing import NamedTuple

import numpy as np

from profilers.runners.base import Run

WARM_UP_RUNS = 3
WARM_UP_SECONDS = 0.3
# Long enough that the start of a turn does not matter, short enough that a slow phase hits several variants.
TURN_MS = 40.0
# Slower runs take so long that the contents of the caches after the previous run do not matter.
WARMED_MS = 200.0
# Bounds the samples stored for a model that takes microseconds.
MOST_REPEATS = 100
# With fewer rounds there is no interval, so they are made even if they exceed the time limit.
FEWEST_ROUNDS = 5

Samples = dict[str, list[list[float]]]
"""Variant name to its samples in milliseconds, rounds × repeats."""


class Interleaved(NamedTuple):
    """Latencies by the clock, times on the device (empty turns if runs do not report any), and whether they settled."""

    samples_ms: Samples
    device_ms: Samples
    converged: bool


@dataclass(frozen=True)
class RoundPlan:
    """When rounds end, and in which order the variants take their turns.

    Attributes:
        seconds: time limit of the rounds; warm-up comes on top. At least `FEWEST_ROUNDS` are made, and every callable
            has a turn, whatever the limit.
        settled: called now and then; returns whether the samples so far are enough.
        seed: of the order of turns.
        clock_ns: a monotonic clock in nanoseconds.
    """

    seconds: float
    settled: Callable[[Samples], bool]
    seed: int = 0
    clock_ns: Callable[[], int] = time.perf_counter_ns


def interleave(
    variants: Mapping[str, Sequence[Run]],
    plan: RoundPlan,
    progress: Callable[[float], None] = lambda _: None,
    during_rounds: AbstractContextManager[object] | None = None,
) -> Interleaved:
    """Warm the variants up, then time them in rounds.

    In each round every variant has one turn of as many runs as take about `TURN_MS` (from 1 to `MOST_REPEATS`). The
    order is shuffled anew in each round, so that no variant always follows the same one. A turn of runs below
    `WARMED_MS` begins with an uncounted run: it brings the weights back into the caches and lets the previous variant's
    threads go to sleep.

    Args:
        variants: name to callables that make one run, one for each time the variant was loaded or built. They take the
            variant's turns one after the other: in round r, callable r modulo their number. The place in memory makes
            a network a percent faster or slower; several loads average over it.
        plan: when to stop, and the order.
        progress: called after each round with the fraction of the time limit that has passed.
        during_rounds: entered after the warm-up, left after the last round.
    """
    latency_ms = {
        name: median(_warm_up_ms(run, WARM_UP_SECONDS / len(runs), plan.clock_ns) for run in runs)
        for name, runs in variants.items()
    }
    with during_rounds or nullcontext():
        return _make_rounds(variants, latency_ms, plan, progress)


def _make_rounds(
    variants: Mapping[str, Sequence[Run]],
    latency_ms: Mapping[str, float],
    plan: RoundPlan,
    progress: Callable[[float], None],
) -> Interleaved:
    samples: Samples = {name: [] for name in variants}
    device_ms: Samples = {name: [] for name in variants}
    names = list(variants)
    order = np.random.default_rng(plan.seed)
    start_ns = plan.clock_ns()
    fewest = max([FEWEST_ROUNDS, *map(len, variants.values())])
    rounds, next_check = 0, fewest
    while True:
        for index in order.permutation(len(names)):
            name = names[index]
            runs = variants[name]
            turn = _make_turn(runs[rounds % len(runs)], latency_ms[name], plan.clock_ns)
            samples[name].append([latency for latency, _ in turn])
            device_ms[name].append([ms for _, ms in turn if ms is not None])
        rounds += 1
        elapsed = (plan.clock_ns() - start_ns) / 1e9
        progress(min(1.0, elapsed / plan.seconds))
        late = elapsed >= plan.seconds and rounds >= fewest
        # The check takes milliseconds: after every round it would use up the time limit.
        if late or rounds >= next_check:
            if plan.settled(samples):
                return Interleaved(samples, device_ms, True)
            if late:
                return Interleaved(samples, device_ms, False)
            next_check = rounds + max(1, rounds // 8)


def _warm_up_ms(run: Run, seconds: float, clock_ns: Callable[[], int]) -> float:
    """Run until caches, thread pools and clocks are warm; return the median latency of the later half."""
    times_ms: list[float] = []
    end_ns = clock_ns() + seconds * 1e9
    while len(times_ms) < WARM_UP_RUNS or clock_ns() < end_ns:
        times_ms.append(_time_run(run, clock_ns)[0])
    return median(times_ms[len(times_ms) // 2 :])


def _repeats(latency_ms: float) -> int:
    # The clock may read 0 for an empty run.
    return max(1, min(MOST_REPEATS, round(TURN_MS / max(latency_ms, 1e-6))))


def _make_turn(run: Run, latency_ms: float, clock_ns: Callable[[], int]) -> list[tuple[float, float | None]]:
    if latency_ms < WARMED_MS:
        run()
    return [_time_run(run, clock_ns) for _ in range(_repeats(latency_ms))]


def _time_run(run: Run, clock_ns: Callable[[], int]) -> tuple[float, float | None]:
    """Return the latency of one run and its time on the device, in milliseconds."""
    start_ns = clock_ns()
    device_ms = run()
    return (clock_ns() - start_ns) / 1e6, device_ms
