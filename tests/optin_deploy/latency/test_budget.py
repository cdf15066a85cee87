from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from optin_deploy.costs import flop_costs
from optin_deploy.errors import UserError
from optin_deploy.latency import budget
from optin_deploy.latency.budget import AIM, LOWEST, Met, edges_of, meet
from optin_deploy.latency.costs import Curve, LatencyCosts
from optin_deploy.latency.measure import Measured, Target
from optin_deploy.network import Network
from optin_deploy.plan import Plan
from optin_deploy.search import Budget
from optin_deploy.slicing import sliced
from profilers.isolated import Measured as Sampled

TARGET = Target("ort-cpu", 1, 1)
DENSE_MS, FIXED = 20.0, 0.2


def wide_vit() -> Network:
    """Enough units for a budget to be met closely."""
    return tiny.vit(embed_dim=32, num_heads=4, mlp_ratio=16, depth=3)


NETWORK = wide_vit()
STRUCTURE = tiny.describe(NETWORK.module, NETWORK.inputs)
SCORES = {g.name: torch.rand(g.units, generator=torch.Generator().manual_seed(i)).double() for i, g in
          enumerate(STRUCTURE.groups)}  # fmt: skip


def costs(steepness: float) -> LatencyCosts:
    """All groups alike; they save ``steepness`` of what the true latency (see `fake_lab`) saves."""
    curves = {}
    prunable = [g for g in STRUCTURE.groups if g.kind != "width"]
    each = steepness * (1 - FIXED) * DENSE_MS / len(prunable)
    for group in prunable:
        narrowing = STRUCTURE.narrowing(group.name)
        widths = (narrowing.units // 2, narrowing.units) if narrowing else (None,)
        part = np.array([1.0] if narrowing is None else [0.5, 1.0])
        curves[group.name] = Curve(
            (0, group.units), widths, np.array([[-each for _ in part], [(p - 1) * each for p in part]])
        )
    units = {g.name: g.units for g in STRUCTURE.groups}
    return LatencyCosts(DENSE_MS, units, {g.heads: g.name for g in STRUCTURE.groups if g.heads}, curves)


@pytest.fixture
def fake_lab(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """In place of files and clocks: latencies by `costs(1)`, twice as slow today as when the tables were made."""
    built: list[Plan] = []

    def build(module: Any, structure: Any, plan: Plan) -> Any:
        built.append(plan)
        return sliced(module, structure, plan)

    def measure(files: Mapping[str, Path], *_: Any) -> Sampled:
        true_ms = {"dense": DENSE_MS, "pruned": costs(1.0).of(built[-1])}
        return Sampled({name: [[2 * true_ms[name]] * 3] * 3 for name in files}, True, 1.0, 1)

    monkeypatch.setattr(budget, "sliced", build)
    monkeypatch.setattr(budget, "export_network", lambda *args: args[-1])
    monkeypatch.setattr(budget, "measure_files", measure)
    return built


def run(table: LatencyCosts, fraction: float, others: list[Budget] | None = None, align: int | None = 8) -> Met:
    measured = Measured(table, (), (), ())
    return meet(NETWORK, STRUCTURE, SCORES, measured, fraction, others or [], TARGET, align)


@pytest.mark.parametrize("fraction", [0.8, 0.65, 0.5])
@pytest.mark.parametrize("align", [8, None])
def test_a_true_table_meets_the_budget_at_once(fake_lab: list[Plan], fraction: float, align: int | None) -> None:
    met = run(costs(1.0), fraction, align=align)
    assert len(met.rounds) == len(fake_lab) == 1
    assert met.rounds[0].error == pytest.approx(0.0, abs=1e-9)
    assert LOWEST * fraction <= costs(1.0).of(met.plan) / DENSE_MS <= AIM * fraction + 1e-9


@pytest.mark.parametrize("steepness", [0.7, 0.9, 1.15])
def test_a_wrong_table_is_corrected(fake_lab: list[Plan], steepness: float) -> None:
    met = run(costs(steepness), 0.6)
    assert 2 <= len(met.rounds) <= 3
    assert met.taken == len(met.rounds) - 1
    assert abs(met.rounds[-1].error) < abs(met.rounds[0].error)
    assert LOWEST * 0.6 <= costs(1.0).of(met.plan) / DENSE_MS <= 0.6
    assert met.plan == fake_lab[-1]


def test_another_budget_holds_beside(fake_lab: list[Plan]) -> None:
    flops = Budget(flop_costs(NETWORK.module, STRUCTURE, NETWORK.inputs), 0.5)
    met = run(costs(1.0), 0.9, [flops])
    assert flops.costs.of(met.plan) <= flops.limit
    assert met.rounds[0].flops == pytest.approx(flops.costs.of(met.plan) / flops.costs.total)
    # It is the tighter one, so that the latency may end far below what was asked for.
    assert len(met.rounds) == 1
    met = run(costs(1.0), 0.4, [Budget(flops.costs, 0.95)])
    assert costs(1.0).of(met.plan) <= 0.4 * DENSE_MS


def test_a_budget_below_the_floor_is_told(fake_lab: list[Plan]) -> None:
    with pytest.raises(UserError, match=r"0\.1 of the latency cannot be reached.* 0\.200 are left"):
        run(costs(1.0), 0.1)
    assert not fake_lab


@pytest.mark.parametrize(
    ("latencies", "limit", "expected"), [([5.0, 3.0, 4.0], 4.5, 2), ([5.0, 6.0], 4.5, 0), ([4.5], 4.5, 0)]
)
def test_the_slowest_within_the_limit_is_taken(latencies: list[float], limit: float, expected: int) -> None:
    assert budget._best(latencies, limit) == expected


def test_edges_are_the_ends_of_the_levels() -> None:
    name = next(g.name for g in STRUCTURE.groups if g.kind == "neuron")
    units = STRUCTURE.group(name).units
    steps = Curve((0, units // 2, units // 2 + 1, units), (None,), np.array([[-4.0], [-4.0], [0.0], [0.0]]))
    table = costs(1.0)
    curves = {**table.curves, name: steps}
    found = edges_of(STRUCTURE, Measured(LatencyCosts(DENSE_MS, table.units, table.widths, curves), (), (), ()))
    assert found[name] == [0, units // 2, units]


def test_scores_are_what_decides(fake_lab: list[Plan]) -> None:
    worthless: dict[str, Tensor] = {n: s * (1e-6 if n.startswith("blocks.1") else 1.0) for n, s in SCORES.items()}
    plan = meet(NETWORK, STRUCTURE, worthless, Measured(costs(1.0), (), (), ()), 0.7, [], TARGET, 8).plan
    kept = {n: len(u) / STRUCTURE.group(n).units for n, u in plan.kept.items() if STRUCTURE.group(n).kind != "width"}
    assert max(kept["blocks.1.attn"], kept["blocks.1.mlp"]) < min(kept["blocks.0.attn"], kept["blocks.0.mlp"])
