"""How many tokens enter each block: what merging them costs the outputs, and the best schedule under a FLOP budget.

Damage D_l(n) of merging to n of all N tokens before block l is the trajectory loss (``criteria.loss``) of the network
in which nothing else happens, measured by running it. If the tokens that merge before an earlier block were those that
would merge first here, going on from m to n would cost D_l(n) − D_l(m). If those that are left were as alike as all
were, which other partners and the blocks between bring about in part, it would cost D_l(N n / m), and many small steps
next to nothing. Charged is the geometric mean of both: either alone is far from the measured loss of whole schedules.

The schedule and the units are found together: at a price of λ per FLOP every block's best units are known for every
number of tokens, the best schedule is a shortest path through the blocks, and λ is bisected until the budget is met.
With that schedule, the units are then found exactly (``search``).
"""

from collections.abc import Mapping
from itertools import pairwise, product
from math import ceil

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optin_deploy.errors import UserError
from optin_deploy.search.knapsack import Budget, KnapsackItems, build_items, kept_score, search_all, sizes_of
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.tokens.costs import TokenCosts
from optin_deploy.tokens.merge_loss import MergeLoss

# Numbers of tokens that a block may get: so many steps from all to an eighth.
_LEVELS, _LEAST = 48, 1 / 8
_BISECTIONS = 60
# Between two schedules it is looked for one in so many steps.
_BETWEEN = 64
# Times the price at which the budget is met: where schedules are tried with the units that are then the best.
_NEAR = tuple(2 ** (step / 4) for step in range(-8, 9))
# Of the sum of all scores, what leaving no token would cost without damage.
_SPARED = 1e-6


def best_schedule(
    structure: Structure,
    scores: Mapping[str, Tensor],
    costs: TokenCosts,
    fraction: float,
    align: int,
    merge_loss: MergeLoss,
) -> tuple[int, ...]:
    """The schedule that, with the best units for it, loses least at ``fraction`` of the dense FLOPs.

    Args:
        costs: at any schedule.
        damage: in the unit of ``scores``.
    """
    path = _Path(build_items(structure, scores, sizes_of(structure, align)), costs, merge_loss)
    within, above, tried = _around(path, fraction * costs.total)

    def worth(schedule: tuple[int, ...]) -> float:
        try:
            plan = search_all(structure, scores, [Budget(costs.at(schedule), fraction)], align)
        except UserError:
            return -np.inf
        return kept_score(structure, scores, plan) - merge_loss.of(schedule, costs.stack.prefix)

    return max([_used_up(costs, fraction, within, above), *tried], key=worth)


def share_schedule(structure: Structure, costs: TokenCosts, fraction: float, merge_loss: MergeLoss) -> tuple[int, ...]:
    """The schedule of the least damage that alone, with all units, comes down to ``fraction`` of the dense FLOPs.

    Raises:
        UserError: merging alone does not come down so far.
    """
    whole = {g.name: [g.units] for g in structure.groups}
    # With one choice for each group, what it is worth does not matter.
    alike = {g.name: torch.ones(g.units) for g in structure.groups}
    path = _Path(build_items(structure, alike, whole), costs, merge_loss)
    within, above, _ = _around(path, fraction * costs.total)
    schedule = _used_up(costs, fraction, within, above)
    least = costs.at(schedule).of(Plan({})) / costs.total
    if least > fraction:
        raise UserError(
            f"merging tokens alone comes down to {least:.3f} of the FLOPs, not to {fraction:.3f}: give a smaller "
            "--tokens-share"
        )
    return schedule


def _around(path: "_Path", limit: float) -> tuple[tuple[int, ...], tuple[int, ...], list[tuple[int, ...]]]:
    """The schedule at the lowest price per FLOP at which the budget is met, that at the highest at which it is not, and
    all that are the best at a price in between or not far from it: what is best under the budget lies at no price of
    its own where losses are not convex."""
    low, high = 0.0, 1.0
    within, above = path.at_multiplier(high / limit), path.at_multiplier(0.0)
    while within[1] > limit and high < 1e30:
        high *= 4
        within = path.at_multiplier(high / limit)
    for _ in range(_BISECTIONS):
        multiplier = (low + high) / 2
        found = path.at_multiplier(multiplier / limit)
        if found[1] > limit:
            low, above = multiplier, found
        else:
            high, within = multiplier, found
    near = [path.at_multiplier(high * factor / limit)[0] for factor in _NEAR]
    return within[0], above[0], list(dict.fromkeys([above[0], *near]))


def _used_up(costs: TokenCosts, fraction: float, within: tuple[int, ...], above: tuple[int, ...]) -> tuple[int, ...]:
    """``within``, or where it leaves much of the budget unused with all units, the schedule between it and ``above``
    that does not: where the first tokens cost most, none between them is the best at any price."""
    limit, found = fraction * costs.total, within
    for step in range(_BETWEEN + 1):
        part = step / _BETWEEN
        schedule = tuple(ceil(part * high + (1 - part) * low) for low, high in zip(within, above, strict=True))
        if costs.stack.possible(schedule) and costs.at(schedule).of(Plan({})) <= limit:
            found = schedule
    return found


class _Path:
    """Schedules as paths through the blocks; values and damage are parts of the sum of all scores."""

    def __init__(self, items: KnapsackItems, costs: TokenCosts, merge_loss: MergeLoss) -> None:
        self.costs, self.items = costs, items
        stack = costs.stack
        least = stack.prefix + max(1, round(_LEAST * (stack.tokens - stack.prefix)))
        levels = np.unique(np.linspace(least, stack.tokens, _LEVELS).round().astype(int))[::-1]
        self.levels = levels
        # [i, j]: going from level i to level j.
        self.possible = np.array([[stack.least_behind(int(a)) <= b <= a for b in levels] for a in levels])
        scale = items.scale
        # Merging what is padding only costs nothing: of schedules without damage more tokens are a little better, the
        # more so the fewer there are, for all of them to be the best at some price.
        spared = _SPARED * (1 - levels / stack.tokens) ** 2
        before, after = np.meshgrid(levels.astype(float), levels.astype(float), indexing="ij")
        steps = [merge_loss.step(i, stack.prefix, before, np.minimum(before, after)) for i in range(len(stack.blocks))]
        self.lost = np.stack(steps) / scale + np.maximum(spared[None, :] - spared[:, None], 0)
        # Wherever tokens merge they are compared by whole heads here; the units then found may have narrower ones.
        features = [costs.widths[key.group] if key else 0 for key in stack.keys]
        self.merging = np.zeros((len(stack.blocks), len(levels), len(levels)))
        for block, (i, a), (j, b) in product(range(len(stack.blocks)), enumerate(levels), enumerate(levels)):
            if b < a:
                step = int(a), int(b)
                keyed = costs.comparing(block, *step, features[block]) if stack.keys[block] else 0.0
                self.merging[block, i, j] = costs.merging(block, *step) + keyed
        self.option_costs = [
            np.array([costs.base.option(g.name, n, w) for n, w in choices])
            for g, choices in zip(items.groups, items.choices, strict=True)
        ]

    def at_multiplier(self, multiplier: float) -> tuple[tuple[int, ...], float]:
        """The best schedule at a price per FLOP, and what the network then costs."""
        gain, cost = self._blocks(multiplier)
        start = int(np.argmax(self.levels))
        value = np.full(len(self.levels), -np.inf)
        value[start] = 0.0
        came: list[NDArray[np.int64]] = []
        for block in range(len(gain)):
            step = value[:, None] - self.lost[block] - multiplier * self.merging[block] + gain[block][None, :]
            step[~self.possible] = -np.inf
            came.append(step.argmax(axis=0))
            value = step.max(axis=0)
        levels = [int(value.argmax())]
        for block in reversed(range(1, len(gain))):
            levels.append(int(came[block][levels[-1]]))
        levels.reverse()
        schedule = tuple(int(self.levels[i]) for i in levels)
        merging = sum(self.merging[b][i][j] for b, (i, j) in enumerate(pairwise([start, *levels])))
        inside = sum(cost[b][i] for b, i in enumerate(levels))
        return schedule, float(self._outside(multiplier) + merging + inside)

    def _blocks(self, multiplier: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of every block at every number of tokens: the most that its units are worth less their price, and their
        FLOPs together with those that belong to no unit."""
        shape = (len(self.costs.stack.blocks), len(self.levels))
        gain, cost = np.zeros(shape), np.zeros(shape)
        for block in range(shape[0]):
            for column, tokens in enumerate(self.levels):
                rest = self.costs.rest_at(block, int(tokens))
                gain[block, column] -= multiplier * rest
                cost[block, column] += rest
        for group, values, flops in zip(self.items.groups, self.items.values, self.option_costs, strict=True):
            inside = self.costs.block_of.get(group.name)
            if inside is None:
                continue
            for column, tokens in enumerate(self.levels):
                factor = self.costs.at((int(tokens),) * shape[0]).factor(group.name)
                taken = int(np.argmax(values - multiplier * factor * flops))
                gain[inside, column] += values[taken] - multiplier * factor * flops[taken]
                cost[inside, column] += factor * flops[taken]
        return gain, cost

    def _outside(self, multiplier: float) -> float:
        """FLOPs outside the stack: those that nothing changes, and those of the best units there."""
        full = self.costs.stack.tokens
        fixed = self.costs.base.floor - sum(self.costs.rest_at(b, full) for b in range(len(self.costs.stack.blocks)))
        for group, values, flops in zip(self.items.groups, self.items.values, self.option_costs, strict=True):
            if group.name not in self.costs.block_of:
                fixed += float(flops[int(np.argmax(values - multiplier * flops))])
        return float(fixed)
