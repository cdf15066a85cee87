from collections.abc import Callable, Iterator
from contextlib import contextmanager

from profilers.interleave import FEWEST_ROUNDS, MOST_REPEATS, WARM_UP_RUNS, WARMED_MS, RoundPlan, Samples, interleave


class Machine:
    """A pretended machine: runs take the time they are told to, and are written down."""

    def __init__(self) -> None:
        self.now_ns = 0
        self.runs: list[str] = []

    def clock_ns(self) -> int:
        return self.now_ns

    def network(self, name: str, latency_ms: float) -> Callable[[], None]:
        def run() -> None:
            self.now_ns += round(latency_ms * 1e6)
            self.runs.append(name)

        return run

    def measure(
        self, latencies_ms: dict[str, float], seconds: float, settled: Callable[[Samples], bool], seed: int = 0
    ) -> tuple[Samples, bool]:
        networks = {name: [self.network(name, latency)] for name, latency in latencies_ms.items()}
        self.fractions: list[float] = []
        found = interleave(networks, RoundPlan(seconds, settled, seed, self.clock_ns), self.fractions.append)
        assert all(not any(turns) for turns in found.device_ms.values())
        return found.samples_ms, found.converged


def never(samples: Samples) -> bool:
    return False


def test_turns_take_about_40_ms_and_hold_what_the_clock_says() -> None:
    samples, converged = Machine().measure({"a": 10.0, "b": 0.01, "c": 70.0}, 2.0, never)
    assert not converged
    assert {name: {len(turn) for turn in turns} for name, turns in samples.items()} == {
        "a": {4},
        "b": {MOST_REPEATS},
        "c": {1},
    }
    assert {value for turn in samples["a"] for value in turn} == {10.0}
    assert len({len(turns) for turns in samples.values()}) == 1


def test_rounds_end_with_the_time_limit() -> None:
    machine = Machine()
    samples, _ = machine.measure({"a": 50.0, "b": 50.0}, 4.0, never)
    assert len(samples["a"]) == 20
    assert machine.fractions == sorted(machine.fractions)
    assert machine.fractions[-1] == 1.0


def test_a_slow_network_still_gets_the_fewest_rounds() -> None:
    samples, _ = Machine().measure({"a": 1e4}, 1.0, never)
    assert len(samples["a"]) == FEWEST_ROUNDS


def test_rounds_end_when_settled() -> None:
    samples, converged = Machine().measure({"a": 40.0, "b": 20.0}, 100.0, lambda samples: len(samples["a"]) >= 12)
    assert converged
    assert 12 <= len(samples["a"]) <= 13


def test_warm_up_lasts_long_enough_and_is_not_counted() -> None:
    machine = Machine()
    samples, _ = machine.measure({"fast": 30.0, "slow": 400.0}, 1.0, never)
    assert machine.runs[: 10 + WARM_UP_RUNS] == ["fast"] * 10 + ["slow"] * WARM_UP_RUNS
    assert machine.runs.count("slow") == WARM_UP_RUNS + len(samples["slow"])


def test_a_turn_begins_with_a_run_that_is_not_counted_unless_runs_are_slow() -> None:
    machine = Machine()
    samples, _ = machine.measure({"warmed": WARMED_MS - 1, "slow": WARMED_MS}, 4.0, never)
    rounds = len(samples["slow"])
    assert {name: machine.runs.count(name) - WARM_UP_RUNS for name in samples} == {
        "warmed": 2 * rounds,
        "slow": rounds,
    }


def test_all_loads_of_a_variant_take_turns() -> None:
    machine = Machine()
    loads = {"a": [machine.network(f"a{i}", 250.0 + i) for i in range(3)], "b": [machine.network("b", 250.0)]}
    samples = interleave(loads, RoundPlan(5.0, never, clock_ns=machine.clock_ns)).samples_ms
    assert [turn[0] for turn in samples["a"][:6]] == [250.0, 251.0, 252.0] * 2
    assert {turn[0] for turn in samples["b"]} == {250.0}
    # Each is warmed up for its part of the time.
    assert machine.runs[: 3 * WARM_UP_RUNS] == [f"a{i}" for i in range(3) for _ in range(WARM_UP_RUNS)]


def test_each_of_many_builds_has_a_turn_whatever_the_limit() -> None:
    machine = Machine()
    builds = {"a": [machine.network(f"a{i}", 250.0 + i) for i in range(9)]}
    found = interleave(builds, RoundPlan(0.1, never, clock_ns=machine.clock_ns))
    assert [turn[0] for turn in found.samples_ms["a"]] == [250.0 + i for i in range(9)]


def test_each_round_runs_every_variant_in_a_shuffled_order_of_the_seed() -> None:
    latencies = {"a": 300.0, "b": 300.0, "c": 300.0}

    def orders(seed: int) -> list[tuple[str, ...]]:
        machine = Machine()
        samples, _ = machine.measure(latencies, 18.0, never, seed)
        counted = machine.runs[-3 * len(samples["a"]) :]
        return list(zip(counted[::3], counted[1::3], counted[2::3], strict=True))

    assert all(sorted(order) == ["a", "b", "c"] for order in orders(0))
    assert len(set(orders(0))) > 3
    assert orders(0) == orders(0) != orders(1)


def test_times_on_the_device_are_kept_beside_the_latencies() -> None:
    machine = Machine()

    def run() -> float:
        machine.now_ns += 30_000_000
        machine.runs.append("a")
        return float(len(machine.runs))

    both = {"a": [run], "b": [machine.network("b", 30.0)]}
    found = interleave(both, RoundPlan(1.0, never, clock_ns=machine.clock_ns))
    counted = [[number + 1.0] for number, name in enumerate(machine.runs) if name == "a"]
    # The turns hold the counted runs: each comes after one that is not counted, and that after the warm-up.
    assert found.device_ms["a"] == counted[-2 * len(found.samples_ms["a"]) :][1::2]
    assert found.device_ms["b"] == [[]] * len(found.samples_ms["b"])
    assert {value for turn in found.samples_ms["a"] for value in turn} == {30.0}


def test_what_is_done_during_the_rounds_begins_after_the_warm_up() -> None:
    machine = Machine()
    seen: list[int] = []

    @contextmanager
    def during() -> Iterator[None]:
        seen.append(len(machine.runs))
        yield
        seen.append(len(machine.runs))

    networks = {"a": [machine.network("a", 300.0)]}
    interleave(networks, RoundPlan(1.0, never, clock_ns=machine.clock_ns), during_rounds=during())
    assert seen == [WARM_UP_RUNS, len(machine.runs)]
