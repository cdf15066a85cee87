"""Which units to keep under a budget: a multiple-choice knapsack over groups.

Each group offers a few sizes; choosing a size keeps the group's best units of that number. The value is the sum of
scores kept, the cost that of the units kept plus the part that cannot be removed. Costs may be FLOPs or milliseconds.
"""

from collections.abc import Mapping

import numpy as np
from torch import Tensor

from optin_deploy.costs import Costs
from optin_deploy.errors import UserError
from optin_deploy.plan import Plan
from optin_deploy.structure.groups import Group, Structure

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


def check_budget(costs: Costs, fraction: float, what: str = "FLOPs") -> None:
    """Raise UserError, naming the floor, when ``fraction`` of the dense cost cannot be reached."""
    floor = costs.floor / costs.total
    if fraction < floor:
        raise UserError(
            f"a budget of {fraction:g} of the {what} cannot be reached: with every prunable unit removed "
            f"{floor:.3f} are left; ask for more than that"
        )


def search(structure: Structure, scores: Mapping[str, Tensor], costs: Costs, fraction: float, align: int) -> Plan:
    """The plan with the largest score kept whose cost is at most ``fraction`` of the dense cost, and near it.

    Args:
        scores: group name -> one number per unit, at least 0; a higher one matters more.
        align: neurons are kept in multiples of this number (finer in groups narrower than 8 such steps); heads whole.
            Where such steps are too coarse to come within 0.01 of ``fraction``, they are halved until they are not.

    Raises:
        UserError: the budget is below the floor.
    """
    check_budget(costs, fraction)
    while True:
        plan = _best_plan(structure, scores, costs, fraction, align)
        if align == 1 or costs.of(plan) >= (fraction - BUDGET_WINDOW) * costs.total:
            return plan
        align //= 2


def _best_plan(structure: Structure, scores: Mapping[str, Tensor], costs: Costs, fraction: float, align: int) -> Plan:
    values = {g.name: scores[g.name].double().cpu().numpy() for g in structure.groups}
    # Scores of different networks differ by orders of magnitude; the small constant prefers more units among equals.
    scale = max(sum(float(v.sum()) for v in values.values()), 1e-300)
    best = {g.name: _ranked(g, values[g.name]) for g in structure.groups}
    gained = {n: np.concatenate([[0.0], np.cumsum(values[n][order] / scale + 1e-12)]) for n, order in best.items()}
    groups = [g for g in structure.groups if g.kind != "width"]
    choices = []
    for group in groups:
        width = structure.narrowing(group.name)
        sizes = candidate_sizes(group, align)
        narrowed = candidate_sizes(width, align) if width is not None else [0]
        # Heads that all leave have no width.
        choices.append([(n, w) for n in sizes for w in narrowed if n or w == narrowed[-1]])
    options = []
    for group, choice in zip(groups, choices, strict=True):
        width = structure.narrowing(group.name)
        full = costs.per_unit[group.name]
        if width is None:
            options.append([(gained[group.name][n], n * full) for n, _ in choice])
        else:
            # Narrower heads lose their part of what narrowing all heads loses.
            lost = gained[width.name][-1] - gained[width.name]
            options.append(
                [(gained[group.name][n] - lost[w] * n / group.units, n * full * w / width.units) for n, w in choice]
            )
    chosen = knapsack(options, fraction * costs.total - costs.floor)
    kept = {}
    for group, choice, option in zip(groups, choices, chosen, strict=True):
        units, dimensions = choice[option]
        kept[group.name] = tuple(sorted(int(i) for i in best[group.name][:units]))
        width = structure.narrowing(group.name)
        if width is not None:
            kept[width.name] = tuple(range(dimensions))
    return Plan(kept)


def _ranked(group: Group, values: np.ndarray) -> np.ndarray:
    """Units from the best on. Dimensions of heads are in order as they are."""
    return np.arange(group.units) if group.kind == "width" else np.argsort(-values, kind="stable")


def candidate_sizes(group: Group, align: int) -> list[int]:
    """The numbers of units that may be kept of ``group``, from 0 to all; of dimensions of heads, from one step on."""
    if group.kind == "width":
        step = _fitting(min(align, _WIDTH_STEP), group.units, _MIN_WIDTH_STEPS)
        return sorted({*range(step, group.units, step), group.units})
    step = 1 if group.kind == "head" else _fitting(align, group.units, _MIN_STEPS)
    return sorted({*range(0, group.units, step), group.units})


def _fitting(step: int, units: int, steps: int) -> int:
    """``step``, halved until so many of them fit."""
    while step > 1 and units < steps * step:
        step = (step + 1) // 2
    return step


def knapsack(options: list[list[tuple[float, float]]], budget: float) -> list[int]:
    """For each list of ``(value, cost)`` the index of the option taken, one each, with the largest total value.

    Exact dynamic programming with costs rounded up to a 50,000th of the budget. Every list needs an option of cost 0.
    """
    step = max(budget, 1e-30) / _GRID
    best = np.zeros(_GRID + 1)
    choices = []
    for group in options:
        new = np.full(_GRID + 1, -np.inf)
        choice = np.zeros(_GRID + 1, dtype=np.int32)
        for index, (value, cost) in enumerate(group):
            cells = int(np.ceil(cost / step - 1e-9))
            if cells > _GRID:
                continue
            candidate = np.concatenate([np.full(cells, -np.inf), best[: _GRID + 1 - cells] + value])
            better = candidate > new
            new[better], choice[better] = candidate[better], index
        best = new
        choices.append((choice, [int(np.ceil(cost / step - 1e-9)) for _, cost in group]))
    cell, taken = _GRID, []
    for choice, cells_of in reversed(choices):
        taken.append(int(choice[cell]))
        cell -= cells_of[taken[-1]]
    return taken[::-1]
