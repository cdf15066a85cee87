import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from optin_deploy.latency.block_stacks import block_types
from optin_deploy.latency.costs import Curve, LatencyCosts, latency_costs
from optin_deploy.structure.plan import Plan
from profilers.latency_table import LatencyTable, Row

HEADS = Curve((0, 2, 4), (8, 16), np.array([[-2.0, -2.0], [-1.5, -1.0], [-0.5, 0.0]]))
NEURONS = Curve((0, 64, 128), (None,), np.array([[-3.0], [-1.0], [0.0]]))
UNITS = {"attn": 4, "width": 16, "mlp": 128}
COSTS = LatencyCosts(10.0, UNITS, {"attn": "width"}, {"attn": HEADS, "mlp": NEURONS})


def plan(heads: int, width: int, neurons: int) -> Plan:
    return Plan({"attn": tuple(range(heads)), "width": tuple(range(width)), "mlp": tuple(range(neurons))})


sizes = st.builds(plan, st.integers(0, 4), st.integers(1, 16), st.integers(0, 128))


def test_between_measured_sizes_costs_are_linear() -> None:
    assert NEURONS.at(32, None) == pytest.approx(-2.0)
    assert HEADS.at(3, 16) == pytest.approx(-0.5)
    assert HEADS.at(2, 12) == pytest.approx(-1.25)
    assert HEADS.at(3, 12) == pytest.approx(-0.75)


def test_narrower_than_measured_counts_as_the_narrowest() -> None:
    assert HEADS.at(4, 1) == HEADS.at(4, 8) == pytest.approx(-0.5)


def test_all_units_cost_the_dense_latency_and_none_the_floor() -> None:
    assert COSTS.of(Plan({})) == COSTS.of(plan(4, 16, 128)) == pytest.approx(10.0)
    assert COSTS.floor == COSTS.of(plan(0, 16, 0)) == pytest.approx(5.0)


@given(sizes)
def test_a_plan_costs_the_floor_and_its_options(found: Plan) -> None:
    kept = {name: len(units) for name, units in found.kept.items()}
    options = COSTS.option("attn", kept["attn"], kept["width"]) + COSTS.option("mlp", kept["mlp"], None)
    assert COSTS.of(found) == pytest.approx(COSTS.floor + options)
    assert min(COSTS.option("attn", kept["attn"], kept["width"]), COSTS.option("mlp", kept["mlp"], None)) >= -1e-12


@given(sizes, st.floats(0.6, 1.6))
def test_corrected_costs_agree_with_what_was_measured(found: Plan, factor: float) -> None:
    saved = COSTS.total - COSTS.of(found)
    measured_ms = COSTS.total - factor * saved
    corrected = COSTS.corrected(found, measured_ms)
    assert corrected.total == COSTS.total
    if saved > 0.02 * COSTS.total:
        assert corrected.of(found) == pytest.approx(measured_ms)
    else:
        assert corrected == COSTS


@given(sizes, st.floats(0.6, 1.6), st.floats(-2.0, 1.0))
def test_where_tokens_merge_costs_go_on_from_the_network_with_all_units(
    found: Plan, factor: float, besides: float
) -> None:
    whole_ms = 8.5 + besides
    merging = COSTS.merging({"attn": 0.5, "mlp": 0.7}, whole_ms)
    assert merging.of(Plan({})) == pytest.approx(whole_ms)
    # Half of what the attention saves, and 0.7 of what the neurons do.
    saved = [0.5 * -HEADS.at(len(found.kept["attn"]), len(found.kept["width"])),
             0.7 * -NEURONS.at(len(found.kept["mlp"]), None)]  # fmt: skip
    assert merging.of(found) == pytest.approx(whole_ms - sum(saved))
    measured_ms = whole_ms - factor * sum(saved)
    if sum(saved) > 0.2:
        again = merging.corrected(found, measured_ms)
        assert again.of(found) == pytest.approx(measured_ms) and again.of(Plan({})) == pytest.approx(whole_ms)


def test_noise_cannot_turn_savings_around() -> None:
    corrected = COSTS.corrected(plan(2, 8, 64), measured_ms=11.0)
    assert corrected.floor < corrected.total
    assert torch.isfinite(torch.tensor(corrected.floor))


@pytest.mark.parametrize(("dense_ms", "scale", "expected"), [(10.0, 1.0, 7.0), (10.0, 2.0, 4.0), (1.0, 1.0, 0.01)])
def test_costs_of_a_network_from_its_tables(dense_ms: float, scale: float, expected: float) -> None:
    network, structure = tiny.network("distilbert"), tiny.structure("distilbert").without_widths()
    (kind,) = block_types(network.module, structure, network.inputs)
    times = {"attention": {0: 3.0, 2: 4.5, 4: 6.0}, "ffn": {0: 4.5, 12: 6.0, 24: 6.0}}
    rows = [Row(part, n, None, [[ms], [ms]]) for part, sizes in times.items() for n, ms in sizes.items()]
    table = LatencyTable({}, 3, {1: [[2.0], [2.0]], 3: [[6.0], [6.0]]}, tuple(rows))
    assert kind.parts == tuple(times)
    costs = latency_costs(structure, [(kind, table)], dense_ms, [scale])
    # Two blocks, each 1 ms less without its attention and 0.5 ms less without its FFN.
    assert costs.total == dense_ms
    assert costs.floor == pytest.approx(expected)
    half = Plan({g.name: tuple(range(g.units // 2)) for g in structure.groups if g.kind == "neuron"})
    assert costs.of(half) == pytest.approx(dense_ms)
