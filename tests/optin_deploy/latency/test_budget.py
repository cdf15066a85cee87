from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor

from optin_deploy.errors import UserError
from optin_deploy.latency import budget
from optin_deploy.latency.budget import (
    AIM,
    LOWEST,
    Iteration,
    LatencySearch,
    LatencySolution,
    find_step_sizes,
    solve_latency_budget,
)
from optin_deploy.latency.costs import Curve, LatencyCosts
from optin_deploy.latency.tables import LatencyModel
from optin_deploy.latency.target import Target
from optin_deploy.network import Network
from optin_deploy.search.costs import flop_costs
from optin_deploy.search.knapsack import kept_score
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network
from optin_deploy.tokens.costs import token_costs
from optin_deploy.tokens.find_stack import token_stack
from profilers import RawSamples

pytestmark = pytest.mark.slow


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
        narrowing = STRUCTURE.child(group.name)
        widths = (narrowing.units // 2, narrowing.units) if narrowing else (None,)
        part = np.array([1.0] if narrowing is None else [0.5, 1.0])
        curves[group.name] = Curve(
            (0, group.units), widths, np.array([[-each for _ in part], [(p - 1) * each for p in part]])
        )
    units = {g.name: g.units for g in STRUCTURE.groups}
    return LatencyCosts(DENSE_MS, units, {g.parent: g.name for g in STRUCTURE.groups if g.parent}, curves)


@pytest.fixture
def fake_lab(monkeypatch: pytest.MonkeyPatch) -> list[Plan]:
    """In place of files and clocks: latencies by `costs(1)`, twice as slow today as when the tables were made."""
    built: list[Plan] = []

    def build(module: Any, structure: Any, plan: Plan) -> Any:
        built.append(plan)
        return slice_network(module, structure, plan)

    def measure(files: Mapping[str, Path], *_: Any) -> RawSamples:
        plans = built[len(built) - len(files) + 1 :]
        true_ms = [DENSE_MS, *(costs(1.0).of(plan) for plan in plans)]
        samples = {name: [[2 * ms] * 3] * 3 for name, ms in zip(files, true_ms, strict=True)}
        return RawSamples(samples, True, 1.0, 1)

    monkeypatch.setattr(budget, "slice_network", build)
    monkeypatch.setattr(budget, "write_network", lambda *args: args[-1])
    monkeypatch.setattr(budget, "measure_files", measure)
    return built


FLOPS = flop_costs(NETWORK.module, STRUCTURE, NETWORK.inputs)


def run(
    table: LatencyCosts,
    fraction: float,
    flops: float | None = None,
    align: int | None = 8,
    scores: Mapping[str, Tensor] = SCORES,
) -> LatencySolution:
    model = LatencyModel(TARGET, table)
    return solve_latency_budget(LatencySearch(NETWORK, STRUCTURE, scores, model, FLOPS, fraction, flops, align))


@pytest.mark.parametrize("fraction", [0.8, 0.65, 0.5])
@pytest.mark.parametrize("align", [8, None])
def test_a_true_table_meets_the_budget_at_once(fake_lab: list[Plan], fraction: float, align: int | None) -> None:
    solution = run(costs(1.0), fraction, align=align)
    # Both ways may lead to one plan, which is built once.
    assert [r.objective for r in solution.iterations] in (["latency"], ["latency", "FLOPs"])
    assert len(fake_lab) == len(solution.iterations)
    assert all(abs(r.error) < 1e-9 for r in solution.iterations)
    assert LOWEST * fraction <= costs(1.0).of(solution.plan) / DENSE_MS <= AIM * fraction + 1e-9


@pytest.mark.parametrize("steepness", [0.7, 0.9, 1.15])
def test_a_wrong_table_is_corrected(fake_lab: list[Plan], steepness: float) -> None:
    solution = run(costs(steepness), 0.6)
    for objective in ("latency", "FLOPs"):
        errors = [abs(r.error) for r in solution.iterations if r.objective == objective]
        assert 2 <= len(errors) <= 3 or (objective == "FLOPs" and not errors)
        assert not errors or errors[-1] < errors[0]
    assert LOWEST * 0.6 <= costs(1.0).of(solution.plan) / DENSE_MS <= 0.6
    assert solution.plan == fake_lab[solution.taken]


def test_of_networks_within_the_budget_the_one_that_keeps_most_is_taken(fake_lab: list[Plan]) -> None:
    """Tables that take FFNs for cheaper than they are lead to a worse plan than FLOPs do."""
    wrong = costs(1.0)
    curves = {n: replace(c, ms=c.ms * (0.8 if n.endswith("mlp") else 1.2)) for n, c in wrong.curves.items()}
    solution = run(replace(wrong, curves=curves), 0.6)
    near = [r for r in solution.iterations if LOWEST * 0.6 <= r.measured_ms / DENSE_MS <= 0.6]
    assert {r.objective for r in solution.iterations} == {"latency", "FLOPs"}
    assert solution.iterations[solution.taken].score == max(r.score for r in near)
    for iteration, plan in zip(solution.iterations, fake_lab, strict=True):
        assert iteration.score == pytest.approx(kept_score(STRUCTURE, SCORES, plan))
        assert iteration.flops == pytest.approx(FLOPS.of(plan) / FLOPS.total)


@pytest.mark.parametrize("merged_ms", [-4.0, 1.0])
def test_merged_tokens_count_in_the_tables_and_in_what_is_built(
    fake_lab: list[Plan], monkeypatch: pytest.MonkeyPatch, merged_ms: float
) -> None:
    """Whatever merging takes beyond the tables is known before the search from the network with all units."""
    stack = token_stack(NETWORK.module, NETWORK.inputs, STRUCTURE)
    schedule = (stack.tokens, stack.tokens - 1, stack.tokens - 2)
    tokens = token_costs(NETWORK.module, STRUCTURE, FLOPS, stack, NETWORK.inputs).at(schedule)
    parts = {name: tokens.factor(name) for name in costs(1.0).curves}
    merging: list[Plan] = []
    monkeypatch.setattr(budget, "with_merging", lambda *args: merging.append(args[-1]))

    def measure(files: Mapping[str, Path], *_: Any) -> RawSamples:
        plans = fake_lab[len(fake_lab) - len(files) + 1 :]
        true_ms = [DENSE_MS, *(replace(costs(1.0), parts=parts, merged_ms=merged_ms).of(plan) for plan in plans)]
        return RawSamples({n: [[ms] * 3] * 3 for n, ms in zip(files, true_ms, strict=True)}, True, 1.0, 1)

    monkeypatch.setattr(budget, "measure_files", measure)
    model = LatencyModel(TARGET, costs(1.0))
    search = LatencySearch(NETWORK, STRUCTURE, SCORES, model, FLOPS, 0.6, align=8, tokens=tokens)
    solution = solve_latency_budget(search)
    assert solution.plan.tokens == schedule and [plan.tokens for plan in merging] == [schedule] * len(fake_lab)
    assert all(abs(r.error) < 1e-9 for r in solution.iterations) and len(fake_lab) == 1 + len(solution.iterations)
    assert replace(costs(1.0), parts=parts, merged_ms=merged_ms).of(solution.plan) / DENSE_MS <= AIM * 0.6 + 1e-9
    # Tokens that have merged leave more units for the same time, unless merging itself takes longer.
    without = run(costs(1.0), 0.6)
    if merged_ms < 0:
        assert kept_score(STRUCTURE, SCORES, solution.plan) > kept_score(STRUCTURE, SCORES, without.plan)


def test_another_budget_holds_beside(fake_lab: list[Plan]) -> None:
    solution = run(costs(1.0), 0.9, 0.5)
    assert FLOPS.of(solution.plan) <= 0.5 * FLOPS.total
    # It is the tighter one, so that the latency may end far below what was asked for.
    assert len(solution.iterations) <= 2
    solution = run(costs(1.0), 0.4, 0.95)
    assert costs(1.0).of(solution.plan) <= 0.4 * DENSE_MS


def test_a_budget_below_the_floor_is_told(fake_lab: list[Plan]) -> None:
    with pytest.raises(UserError, match=r"0\.1 of the latency cannot be reached.* 0\.200"):
        run(costs(1.0), 0.1)
    assert not fake_lab


@pytest.mark.parametrize(
    ("measured", "expected"),
    [
        ([(9.9, 3.0), (9.8, 5.0), (9.0, 7.0)], 1),
        ([(9.0, 3.0), (9.5, 2.0), (11.0, 9.0)], 1),
        ([(10.5, 3.0), (10.2, 2.0)], 1),
        ([(10.0, 1.0)], 0),
    ],
)
def test_near_the_limit_scores_decide_and_else_latency(measured: list[tuple[float, float]], expected: int) -> None:
    iterations = [Iteration("latency", Plan({}), ms, ms, 0.5, score) for ms, score in measured]
    assert budget._best(iterations, 10.0) == expected


def test_edges_are_the_ends_of_the_levels() -> None:
    name = next(g.name for g in STRUCTURE.groups if g.kind == "neuron")
    units = STRUCTURE.group(name).units
    steps = Curve((0, units // 2, units // 2 + 1, units), (None,), np.array([[-4.0], [-4.0], [0.0], [0.0]]))
    table = costs(1.0)
    curves = {**table.curves, name: steps}
    found = find_step_sizes(STRUCTURE, LatencyCosts(DENSE_MS, table.units, table.widths, curves))
    assert found[name] == [0, units // 2, units]


def test_scores_are_what_decides(fake_lab: list[Plan]) -> None:
    worthless: dict[str, Tensor] = {n: s * (1e-6 if n.startswith("blocks.1") else 1.0) for n, s in SCORES.items()}
    plan = run(costs(1.0), 0.7, scores=worthless).plan
    kept = {n: len(u) / STRUCTURE.group(n).units for n, u in plan.kept.items() if STRUCTURE.group(n).kind != "width"}
    assert max(kept["blocks.1.attn"], kept["blocks.1.mlp"]) < min(kept["blocks.0.attn"], kept["blocks.0.mlp"])
