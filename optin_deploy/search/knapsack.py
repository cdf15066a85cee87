"""Choose the units to keep under a budget: a multiple-choice knapsack over groups.

Each group has a few candidate sizes. A size keeps that many of the group's best units. The value of a choice is the sum
of the kept scores. Its cost, in FLOPs or milliseconds, includes the part of the network that cannot be removed.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from optin_deploy.errors import UserError
from optin_deploy.search.costs import CostModel
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.plan import Plan

# A budget is met if the cost is below it by less than this fraction of the dense cost.
BUDGET_WINDOW = 0.01
# Costs are rounded up to this many steps of the budget. So the budget always holds, and with tens of groups at most
# about a thousandth of it stays unused.
_GRID = 50_000
# Groups narrower than this many alignment steps are cut in finer steps, so that small networks can be pruned.
_MIN_STEPS = 8
# Heads get narrower in multiples of this number, or of less if the width has fewer than four such steps.
_WIDTH_STEP = 8
_MIN_WIDTH_STEPS = 4
# Iterations under two budgets, for weights and multipliers.
_BISECTIONS, _DOUBLINGS = 16, 8


@dataclass(frozen=True)
class Budget:
    """The fraction of the dense network's cost that may be kept; ``what`` names the cost in messages.

    A plan is near the budget if its cost is below it by less than ``window`` of the dense cost.
    """

    costs: CostModel
    fraction: float
    what: str = "FLOPs"
    window: float = BUDGET_WINDOW

    @property
    def limit(self) -> float:
        """The budget in the unit of the cost."""
        return self.fraction * self.costs.total


def check_budget(structure: Structure, costs: CostModel, fraction: float, what: str = "FLOPs") -> None:
    """Raise UserError with the floor if ``fraction`` of the dense cost cannot be reached."""
    _check_floor(lowest(structure, costs), fraction, what)


def lowest(structure: Structure, costs: CostModel) -> float:
    """Return the fraction of the dense cost that remains after all removable units are removed."""
    floor = costs.floor
    for group in structure.groups:
        if group.parent is None and group.min_units:
            floor += costs.option(group.name, group.min_units, 1 if structure.child(group.name) else None)
    return floor / costs.total


def kept_score(structure: Structure, scores: Mapping[str, Tensor], plan: Plan) -> float:
    """Return the score that ``plan`` keeps; the search maximises it.

    Narrowing all heads loses the sum of the scores of the removed dimensions; if heads are removed too, the rest lose
    their share of it.
    """
    total = 0.0
    for group in structure.groups:
        if group.parent is not None:
            continue
        kept = list(plan.units(group))
        total += float(scores[group.name].double()[kept].sum())
        inner = structure.child(group.name)
        if inner is not None and kept:
            left = list(plan.units(inner))
            lost = scores[inner.name].double().clone()
            lost[left] = 0
            if inner.kind == "width":
                total -= float(lost.sum()) * len(kept) / group.units
            else:
                total += float(scores[inner.name].double().sum() - lost.sum())
    return total


def _check_floor(floor: float, fraction: float, what: str) -> None:
    if fraction < floor:
        raise UserError(
            f"a budget of {fraction:g} of the {what} cannot be reached: with every prunable unit removed "
            f"{floor:.3f} are left; ask for more than that"
        )


def search(structure: Structure, scores: Mapping[str, Tensor], costs: CostModel, fraction: float, align: int) -> Plan:
    """Return the plan that keeps the largest score at a cost of at most ``fraction`` of the dense cost, and near it.

    Args:
        scores: group name -> one number per unit, at least 0; units with higher scores matter more.
        align: neurons are kept in multiples of this number, finer in groups narrower than 8 such steps. The step is
            halved until the cost comes within 0.01 of ``fraction``.

    Raises:
        UserError: the budget is below the floor.
    """
    return search_all(structure, scores, [Budget(costs, fraction)], align)


def search_all(
    structure: Structure,
    scores: Mapping[str, Tensor],
    budgets: Sequence[Budget],
    align: int,
    step_sizes: Mapping[str, Sequence[int]] | None = None,
) -> Plan:
    """`search` under several budgets; the plan meets all of them.

    Args:
        step_sizes: group name -> candidate numbers of units. They replace the multiples of ``align`` if the plan comes
            near enough to a budget.

    Raises:
        UserError: a budget is below its floor.
    """
    for budget in budgets:
        check_budget(structure, budget.costs, budget.fraction, budget.what)
    if step_sizes is not None:
        plan = _best_plan(structure, scores, budgets, {**sizes_of(structure, align), **step_sizes})
        if _is_near(plan, budgets):
            return plan
    while True:
        plan = _best_plan(structure, scores, budgets, sizes_of(structure, align))
        if align == 1 or _is_near(plan, budgets):
            return plan
        align //= 2


def sizes_of(structure: Structure, align: int) -> dict[str, Sequence[int]]:
    """Return the candidate sizes of every group, see `candidate_sizes`."""
    return {group.name: candidate_sizes(group, align) for group in structure.groups}


def _is_near(plan: Plan, budgets: Sequence[Budget]) -> bool:
    """Return whether the plan is near one of the budgets."""
    return any(b.costs.of(plan) >= (b.fraction - b.window) * b.costs.total for b in budgets)


@dataclass(frozen=True)
class KnapsackItems:
    """The items of the knapsack: the candidate sizes of each group without a parent, and their values.

    Attributes:
        choices: for each group, pairs of kept units of it and of its child group (None without a child).
        values: the score that each choice keeps, as a fraction of all scores.
        scale: the sum of all scores.
        best: group name -> its units, best first.
    """

    groups: tuple[Group, ...]
    choices: tuple[tuple[tuple[int, int | None], ...], ...]
    values: tuple[NDArray[np.float64], ...]
    scale: float
    best: Mapping[str, NDArray[np.int64]]

    def plan(self, structure: Structure, taken: Sequence[int]) -> Plan:
        """Return the plan of one choice per group; ``taken`` holds their indices."""
        kept = {}
        for group, choices, option in zip(self.groups, self.choices, taken, strict=True):
            for member, units in zip((group, structure.child(group.name)), choices[option], strict=True):
                if member is not None and units is not None:
                    kept[member.name] = tuple(sorted(int(i) for i in self.best[member.name][:units]))
        return Plan(kept)


def build_items(
    structure: Structure, scores: Mapping[str, Tensor], sizes: Mapping[str, Sequence[int]]
) -> KnapsackItems:
    """Return the knapsack items for the candidate ``sizes`` of each group."""
    values = {g.name: scores[g.name].double().cpu().numpy() for g in structure.groups}
    # Scores of different networks differ by orders of magnitude. The small constant prefers more units among equals.
    scale = max(sum(float(v.sum()) for v in values.values()), 1e-300)
    best = {g.name: _rank_units(g, values[g.name]) for g in structure.groups}
    gained = {n: np.concatenate([[0.0], np.cumsum(values[n][order] / scale + 1e-12)]) for n, order in best.items()}
    groups = tuple(g for g in structure.groups if g.parent is None)
    choices: list[tuple[tuple[int, int | None], ...]] = []
    kept_values: list[NDArray[np.float64]] = []
    for group in groups:
        inner = structure.child(group.name)
        if inner is None:
            choices.append(tuple((n, None) for n in sizes[group.name]))
            kept_values.append(gained[group.name][list(sizes[group.name])])
            continue
        # Without units there is no child group.
        narrowed = sizes[inner.name]
        pairs = [(n, w) for n in sizes[group.name] for w in narrowed if n or w == narrowed[-1]]
        choices.append((*pairs,))
        kept_values.append(np.array(_values_of_pairs(group, inner, gained, pairs)))
    return KnapsackItems(groups, tuple(choices), tuple(kept_values), scale, best)


def _best_plan(
    structure: Structure, scores: Mapping[str, Tensor], budgets: Sequence[Budget], sizes: Mapping[str, Sequence[int]]
) -> Plan:
    items = build_items(structure, scores, sizes)
    return items.plan(structure, _choose(items.groups, items.choices, items.values, budgets))


def _values_of_pairs(
    group: Group, inner: Group, gained: Mapping[str, NDArray[np.float64]], pairs: Sequence[tuple[int, int]]
) -> list[float]:
    """Return the scores that pairs of sizes (group, child group) keep.

    Channels keep the scores of both. Heads lose, in proportion to the heads kept, the scores of the removed dimensions.
    """
    if inner.kind != "width":
        return [gained[group.name][n] + gained[inner.name][w] if n else 0.0 for n, w in pairs]
    lost = gained[inner.name][-1] - gained[inner.name]
    return [gained[group.name][n] - lost[w] * n / group.units for n, w in pairs]


def _choose(
    groups: Sequence[Group],
    choices: Sequence[Sequence[tuple[int, int | None]]],
    values: Sequence[NDArray[np.float64]],
    budgets: Sequence[Budget],
) -> list[int]:
    """Return the index of the best choice of each group."""
    costs = [_relative_costs(budget, groups, choices) for budget in budgets]
    ends = np.cumsum([len(c) for c in choices])
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)

    def solve(worth: NDArray[np.float64], cost: NDArray[np.float64]) -> NDArray[np.int64]:
        split = [list(zip(*pair, strict=True)) for pair in zip(_split(worth, ends), _split(cost, ends), strict=True)]
        return starts + np.array(knapsack(split, 1.0))

    value = np.concatenate(values)
    taken = solve(value, costs[0]) if len(budgets) == 1 else _solve_both(solve, value, costs[0], costs[1])
    return [int(i) for i in taken - starts]


def _relative_costs(
    budget: Budget, groups: Sequence[Group], choices: Sequence[Sequence[tuple[int, int | None]]]
) -> NDArray[np.float64]:
    """Return the cost of every choice above the cheapest of its group, in units of the budget above the floor."""
    costs = [np.array([budget.costs.option(g.name, n, w) for n, w in c]) for g, c in zip(groups, choices, strict=True)]
    floor = budget.costs.floor + sum(float(cost.min()) for cost in costs)
    _check_floor(floor / budget.costs.total, budget.fraction, budget.what)
    return np.concatenate([cost - cost.min() for cost in costs]) / max(budget.limit - floor, 1e-30)


def _split(flat: NDArray[np.float64], ends: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    return np.split(flat, ends[:-1])


Solve = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.int64]]


def _solve_both(
    solve: Solve, value: NDArray[np.float64], first: NDArray[np.float64], second: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return the best choice whose first and second costs are at most 1 each.

    The weighted mean of both costs is a single constraint that every feasible choice also meets (surrogate relaxation,
    Glover 1975). The weight is bisected until both budgets hold; then no feasible choice has a larger value. If no
    weight works, because one step exceeds both budgets, one cost stays a constraint and the other is charged with a
    Lagrange multiplier.
    """
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        weight = (low + high) / 2
        taken = solve(value, weight * first + (1 - weight) * second)
        over_first, over_second = (cost[taken].sum() > 1 + 1e-9 for cost in (first, second))
        if not (over_first or over_second):
            return taken
        low, high = (weight, high) if over_first else (low, weight)
    solutions = [_solve_lagrangian(solve, value, *pair) for pair in ((first, second), (second, first))]
    return max(solutions, key=lambda taken: float(value[taken].sum()))


def _solve_lagrangian(
    solve: Solve, value: NDArray[np.float64], limited: NDArray[np.float64], charged: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return the best choice under the first budget, at the lowest multiplier of the second cost that meets both."""
    low, high, multiplier = 0.0, 0.0, 1.0
    best: NDArray[np.int64] | None = None
    for _ in range(_DOUBLINGS + _BISECTIONS):
        taken = solve(value - multiplier * charged, limited)
        if charged[taken].sum() > 1 + 1e-9:
            low, multiplier = multiplier, 2 * multiplier if best is None else (multiplier + high) / 2
        else:
            high, best = multiplier, taken
            multiplier = (low + high) / 2
    # The cheapest choice is always feasible.
    return solve(-charged, limited) if best is None else best


def _rank_units(group: Group, values: np.ndarray) -> np.ndarray:
    """Return units, best first; units that are removed together are adjacent. Head dimensions keep their order."""
    if group.kind == "width":
        return np.arange(group.units)
    if group.together is None:
        return np.argsort(-values, kind="stable")
    tuples = np.array(group.tuples)
    return tuples[np.argsort(-values[tuples].sum(axis=1), kind="stable")].reshape(-1)


def candidate_sizes(group: Group, align: int) -> list[int]:
    """Return the candidate sizes of ``group``, from `Group.min_units` to all units; head widths start at one step."""
    if group.kind == "width":
        step = _halve_step(min(align, _WIDTH_STEP), group.units, _MIN_WIDTH_STEPS)
        return sorted({*range(step, group.units, step), group.units})
    step = 1 if group.kind == "head" else _halve_step(align, group.units, _MIN_STEPS)
    # Multiples of both if the group is wide enough; otherwise the next multiple of the units removed together.
    both = math.lcm(step, group.step)
    step = both if group.units >= _MIN_STEPS * both else -(-step // group.step) * group.step
    return sorted({group.min_units, *range(step, group.units, step), group.units})


def _halve_step(step: int, units: int, steps: int) -> int:
    """Return ``step``, halved until ``units`` has at least ``steps`` of them."""
    while step > 1 and units < steps * step:
        step = (step + 1) // 2
    return step


def knapsack(options: Sequence[Sequence[tuple[float, float]]], budget: float) -> list[int]:
    """Return the index of one option per list of ``(value, cost)`` options, with the largest total value.

    Exact dynamic programming, with costs rounded up to a 50,000th of the budget. Every list needs an option of cost 0.

    Example:
        ``knapsack([[(0, 0), (2, 1)], [(0, 0), (3, 1)]], budget=1)`` returns ``[0, 1]``.
    """
    step = max(budget, 1e-30) / _GRID
    best = np.zeros(_GRID + 1)
    choices = []
    for group in options:
        new = np.full(_GRID + 1, -np.inf)
        choice = np.zeros(_GRID + 1, dtype=np.int32)
        cells_of = [int(np.ceil(cost / step - 1e-9)) for _, cost in group]
        for index in _pareto_options(group, cells_of):
            value, cells = group[index][0], cells_of[index]
            if cells > _GRID:
                continue
            candidate = best[: _GRID + 1 - cells] + value
            better = candidate > new[cells:]
            np.copyto(new[cells:], candidate, where=better)
            choice[cells:][better] = index
        best = new
        choices.append((choice, cells_of))
    cell, taken = _GRID, []
    for choice, cells_of in reversed(choices):
        taken.append(int(choice[cell]))
        cell -= cells_of[taken[-1]]
    return taken[::-1]


def _pareto_options(options: Sequence[tuple[float, float]], cells_of: Sequence[int]) -> list[int]:
    """Return the indices of the options with a larger value than all that cost as much or less. Few of hundreds do."""
    indices: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: (cells_of[i], -options[i][0], i)):
        if not indices or options[index][0] > options[indices[-1]][0]:
            indices.append(index)
    return indices
