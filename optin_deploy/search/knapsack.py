"""Which units to keep under a budget: a multiple-choice knapsack over groups.

Each group offers a few sizes; choosing a size keeps the group's best units of that number. The value is the sum of
scores kept, the cost that of the units kept plus the part that cannot be removed. Costs may be FLOPs or milliseconds.
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

# A budget is met when the cost is at most the budget and no further below it than this part of the dense cost.
BUDGET_WINDOW = 0.01
# Costs are rounded up to this many steps of the budget: the budget always holds, and with tens of groups at most
# about a thousandth of it is left unused.
_GRID = 50_000
# A group narrower than this many alignment steps is cut in finer steps, so that small networks can be pruned at all.
_MIN_STEPS = 8
# Heads get narrower in multiples of this number, and of less where fewer than four such steps make the whole width.
_WIDTH_STEP = 8
_MIN_WIDTH_STEPS = 4
# Two budgets: weights and prices are halved so often.
_BISECTIONS, _DOUBLINGS = 16, 8


@dataclass(frozen=True)
class Budget:
    """A part of the dense network's cost that may be kept; ``what`` names the cost in messages.

    A plan is near the budget when its cost is less than ``window`` of the dense cost below it.
    """

    costs: CostModel
    fraction: float
    what: str = "FLOPs"
    window: float = BUDGET_WINDOW

    @property
    def limit(self) -> float:
        """The same in the unit of the cost."""
        return self.fraction * self.costs.total


def check_budget(structure: Structure, costs: CostModel, fraction: float, what: str = "FLOPs") -> None:
    """Raise UserError, naming the floor, when ``fraction`` of the dense cost cannot be reached."""
    _check_floor(lowest(structure, costs), fraction, what)


def lowest(structure: Structure, costs: CostModel) -> float:
    """The part of the dense cost that is left when all is removed that may be."""
    floor = costs.floor
    for group in structure.groups:
        if group.parent is None and group.min_units:
            floor += costs.option(group.name, group.min_units, 1 if structure.child(group.name) else None)
    return floor / costs.total


def kept_score(structure: Structure, scores: Mapping[str, Tensor], plan: Plan) -> float:
    """The score that ``plan`` keeps, which the search makes as large as it can. Narrower heads lose their part of what
    narrowing all heads loses."""
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
    """The plan with the largest score kept whose cost is at most ``fraction`` of the dense cost, and near it.

    Args:
        scores: group name -> one number per unit, at least 0; a higher one matters more.
        align: neurons are kept in multiples of this number (finer in groups narrower than 8 such steps); heads whole.
            Where such steps are too coarse to come within 0.01 of ``fraction``, they are halved until they are not.

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
    """`search` under several budgets, all of which hold.

    Args:
        edges: group name -> numbers of units worth keeping, in place of multiples of ``align`` where they come near
            enough to a budget.

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
    return {group.name: candidate_sizes(group, align) for group in structure.groups}


def _is_near(plan: Plan, budgets: Sequence[Budget]) -> bool:
    """Whether one of the budgets is nearly used up."""
    return any(b.costs.of(plan) >= (b.fraction - b.window) * b.costs.total for b in budgets)


@dataclass(frozen=True)
class KnapsackItems:
    """What may be kept of each group that is not inner to another, and what that is worth.

    Attributes:
        choices: of each group, pairs of units kept of it and of its inner group, None where it has none.
        values: the score that each choice keeps, as a part of all scores.
        scale: the sum of all scores.
        best: group name -> its units from the best on.
    """

    groups: tuple[Group, ...]
    choices: tuple[tuple[tuple[int, int | None], ...], ...]
    values: tuple[NDArray[np.float64], ...]
    scale: float
    best: Mapping[str, NDArray[np.int64]]

    def plan(self, structure: Structure, taken: Sequence[int]) -> Plan:
        """The plan of one choice of each group."""
        kept = {}
        for group, choices, option in zip(self.groups, self.choices, taken, strict=True):
            for of, units in zip((group, structure.child(group.name)), choices[option], strict=True):
                if of is not None and units is not None:
                    kept[of.name] = tuple(sorted(int(i) for i in self.best[of.name][:units]))
        return Plan(kept)


def build_items(
    structure: Structure, scores: Mapping[str, Tensor], sizes: Mapping[str, Sequence[int]]
) -> KnapsackItems:
    """What may be kept when groups come in ``sizes``."""
    values = {g.name: scores[g.name].double().cpu().numpy() for g in structure.groups}
    # Scores of different networks differ by orders of magnitude; the small constant prefers more units among equals.
    scale = max(sum(float(v.sum()) for v in values.values()), 1e-300)
    best = {g.name: _ranked(g, values[g.name]) for g in structure.groups}
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
        # Where all units leave there is no inner group.
        narrowed = sizes[inner.name]
        pairs = [(n, w) for n in sizes[group.name] for w in narrowed if n or w == narrowed[-1]]
        choices.append((*pairs,))
        kept_values.append(np.array(_values_of_pairs(group, inner, gained, pairs)))
    return KnapsackItems(groups, tuple(choices), tuple(kept_values), scale, best)


def _best_plan(
    structure: Structure, scores: Mapping[str, Tensor], budgets: Sequence[Budget], sizes: Mapping[str, Sequence[int]]
) -> Plan:
    items = build_items(structure, scores, sizes)
    return items.plan(structure, _chosen(items.groups, items.choices, items.values, budgets))


def _values_of_pairs(
    group: Group, inner: Group, gained: Mapping[str, NDArray[np.float64]], pairs: Sequence[tuple[int, int]]
) -> list[float]:
    """The scores kept with so many units of a group and so many of its inner one: of channels both, and none of either
    where no unit is left; narrower heads lose their part of what narrowing all heads loses."""
    if inner.kind != "width":
        return [gained[group.name][n] + gained[inner.name][w] if n else 0.0 for n, w in pairs]
    lost = gained[inner.name][-1] - gained[inner.name]
    return [gained[group.name][n] - lost[w] * n / group.units for n, w in pairs]


def _chosen(
    groups: Sequence[Group],
    choices: Sequence[Sequence[tuple[int, int | None]]],
    values: Sequence[NDArray[np.float64]],
    budgets: Sequence[Budget],
) -> list[int]:
    """For each group the index of the choice taken."""
    parts = [_parts(budget, groups, choices) for budget in budgets]
    ends = np.cumsum([len(c) for c in choices])
    starts = np.concatenate([[0], ends[:-1]]).astype(np.int64)

    def solve(worth: NDArray[np.float64], cost: NDArray[np.float64]) -> NDArray[np.int64]:
        split = [list(zip(*pair, strict=True)) for pair in zip(_split(worth, ends), _split(cost, ends), strict=True)]
        return starts + np.array(knapsack(split, 1.0))

    value = np.concatenate(values)
    taken = solve(value, parts[0]) if len(budgets) == 1 else _under_both(solve, value, parts[0], parts[1])
    return [int(i) for i in taken - starts]


def _parts(
    budget: Budget, groups: Sequence[Group], choices: Sequence[Sequence[tuple[int, int | None]]]
) -> NDArray[np.float64]:
    """What all choices, one after the other, cost beyond the least of their group, where the budget's room is 1."""
    costs = [np.array([budget.costs.option(g.name, n, w) for n, w in c]) for g, c in zip(groups, choices, strict=True)]
    floor = budget.costs.floor + sum(float(cost.min()) for cost in costs)
    _check_floor(floor / budget.costs.total, budget.fraction, budget.what)
    return np.concatenate([cost - cost.min() for cost in costs]) / max(budget.limit - floor, 1e-30)


def _split(flat: NDArray[np.float64], ends: NDArray[np.int64]) -> list[NDArray[np.float64]]:
    return np.split(flat, ends[:-1])


Solve = Callable[[NDArray[np.float64], NDArray[np.float64]], NDArray[np.int64]]


def _under_both(
    solve: Solve, value: NDArray[np.float64], first: NDArray[np.float64], second: NDArray[np.float64]
) -> NDArray[np.int64]:
    """A choice that leaves no more than 1 of either cost.

    The two are weighed into one, which any choice within both also meets (surrogate relaxation, Glover 1975), and the
    weight is bisected until both hold: then no choice within both is worth more. Where a step over both is too wide for
    any weight, one stays a limit and the other gets a price (Lagrange's relaxation), dear enough to hold.
    """
    low, high = 0.0, 1.0
    for _ in range(_BISECTIONS):
        weight = (low + high) / 2
        taken = solve(value, weight * first + (1 - weight) * second)
        over_first, over_second = (part[taken].sum() > 1 + 1e-9 for part in (first, second))
        if not (over_first or over_second):
            return taken
        low, high = (weight, high) if over_first else (low, weight)
    charged = [_solve_lagrangian(solve, value, *pair) for pair in ((first, second), (second, first))]
    return max(charged, key=lambda taken: float(value[taken].sum()))


def _solve_lagrangian(
    solve: Solve, value: NDArray[np.float64], limited: NDArray[np.float64], charged: NDArray[np.float64]
) -> NDArray[np.int64]:
    """The choice within the first limit at the lowest price of the second cost for which that holds as well."""
    low, high, multiplier = 0.0, 0.0, 1.0
    best: NDArray[np.int64] | None = None
    for _ in range(_DOUBLINGS + _BISECTIONS):
        taken = solve(value - multiplier * charged, limited)
        if charged[taken].sum() > 1 + 1e-9:
            low, multiplier = multiplier, 2 * multiplier if best is None else (multiplier + high) / 2
        else:
            high, best = multiplier, taken
            multiplier = (low + high) / 2
    # What is free is always a choice.
    return solve(-charged, limited) if best is None else best


def _ranked(group: Group, values: np.ndarray) -> np.ndarray:
    """Units from the best on, those that leave together in a row. Dimensions of heads are in order as they are."""
    if group.kind == "width":
        return np.arange(group.units)
    if group.together is None:
        return np.argsort(-values, kind="stable")
    tuples = np.array(group.tuples)
    return tuples[np.argsort(-values[tuples].sum(axis=1), kind="stable")].reshape(-1)


def candidate_sizes(group: Group, align: int) -> list[int]:
    """Return how many units of ``group`` can be kept, from `Group.min_units` to all; head widths start at one step."""
    if group.kind == "width":
        step = _fitting(min(align, _WIDTH_STEP), group.units, _MIN_WIDTH_STEPS)
        return sorted({*range(step, group.units, step), group.units})
    step = 1 if group.kind == "head" else _fitting(align, group.units, _MIN_STEPS)
    # Multiples of both where there is room, else the next multiple of the units that leave together.
    both = math.lcm(step, group.step)
    step = both if group.units >= _MIN_STEPS * both else -(-step // group.step) * group.step
    return sorted({group.min_units, *range(step, group.units, step), group.units})


def _fitting(step: int, units: int, steps: int) -> int:
    """``step``, halved until so many of them fit."""
    while step > 1 and units < steps * step:
        step = (step + 1) // 2
    return step


def knapsack(options: Sequence[Sequence[tuple[float, float]]], budget: float) -> list[int]:
    """For each list of ``(value, cost)`` the index of the option taken, one each, with the largest total value.

    Exact dynamic programming with costs rounded up to a 50,000th of the budget. Every list needs an option of cost 0.
    """
    step = max(budget, 1e-30) / _GRID
    best = np.zeros(_GRID + 1)
    choices = []
    for group in options:
        new = np.full(_GRID + 1, -np.inf)
        choice = np.zeros(_GRID + 1, dtype=np.int32)
        cells_of = [int(np.ceil(cost / step - 1e-9)) for _, cost in group]
        for index in _undominated(group, cells_of):
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


def _undominated(options: Sequence[tuple[float, float]], cells_of: Sequence[int]) -> list[int]:
    """Indices of the options worth more than all that cost less or as much: of hundreds of pairs few are."""
    found: list[int] = []
    for index in sorted(range(len(options)), key=lambda i: (cells_of[i], -options[i][0], i)):
        if not found or options[index][0] > options[found[-1]][0]:
            found.append(index)
    return found
