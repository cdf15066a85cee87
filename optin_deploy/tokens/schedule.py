"""Search how many tokens enter each block under a FLOP budget.

The merge loss D_l(n) of merging to n of all N tokens before block l is the trajectory loss (``criteria``) of the
network with this merge alone, measured by running it. The loss of a further merge from m to n tokens lies between two
extremes. If an earlier block merged the tokens that would merge first here, it is D_l(n) − D_l(m). If the remaining
tokens are as alike as all were, it is D_l(N n / m), and many small steps cost almost nothing. The search charges the
geometric mean: each extreme alone is far from the measured loss of whole schedules.

Schedule and units are searched together. For a Lagrange multiplier λ per FLOP, the best units of each block are known
for every number of tokens, so the best schedule is a shortest path through the blocks. λ is bisected until the budget
is met. For this schedule the units are then searched exactly (``search``).
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

# Candidate numbers of tokens of a block: this many, from all to an eighth.
_LEVELS, _LEAST = 48, 1 / 8
_BISECTIONS = 60
# Steps of the interpolation between two schedules.
_BETWEEN = 64
# Multipliers around the one that meets the budget, at which schedules are tried with their best units.
_NEAR = tuple(2 ** (step / 4) for step in range(-8, 9))
# Loss of merging all tokens that have no merge loss, as a fraction of the sum of all scores.
_SPARED = 1e-6


def best_schedule(
    structure: Structure,
    scores: Mapping[str, Tensor],
    costs: TokenCosts,
    fraction: float,
    align: int,
    merge_loss: MergeLoss,
) -> tuple[int, ...]:
    """Return the schedule that, with its best units, loses least at ``fraction`` of the dense FLOPs.

    Args:
        costs: at any schedule.
        merge_loss: in the unit of ``scores``.
    """
    path = _Path(build_items(structure, scores, sizes_of(structure, align)), costs, merge_loss)
    within, above, tried = _bracket_budget(path, fraction * costs.total)

    def worth(schedule: tuple[int, ...]) -> float:
        try:
            plan = search_all(structure, scores, [Budget(costs.at(schedule), fraction)], align)
        except UserError:
            return -np.inf
        return kept_score(structure, scores, plan) - merge_loss.of(schedule, costs.stack.prefix)

    return max([_use_up_budget(costs, fraction, within, above), *tried], key=worth)


def share_schedule(structure: Structure, costs: TokenCosts, fraction: float, merge_loss: MergeLoss) -> tuple[int, ...]:
    """Return the schedule of the least merge loss that reaches ``fraction`` of the dense FLOPs with all units kept.

    Raises:
        UserError: merging alone cannot reach it.
    """
    whole = {g.name: [g.units] for g in structure.groups}
    # With one choice per group, scores do not matter.
    alike = {g.name: torch.ones(g.units) for g in structure.groups}
    path = _Path(build_items(structure, alike, whole), costs, merge_loss)
    within, above, _ = _bracket_budget(path, fraction * costs.total)
    schedule = _use_up_budget(costs, fraction, within, above)
    least = costs.at(schedule).of(Plan({})) / costs.total
    if least > fraction:
        raise UserError(
            f"merging tokens alone comes down to {least:.3f} of the FLOPs, not to {fraction:.3f}: give a smaller "
            "--tokens-share"
        )
    return schedule


def _bracket_budget(path: "_Path", limit: float) -> tuple[tuple[int, ...], tuple[int, ...], list[tuple[int, ...]]]:
    """Bisect the Lagrange multiplier.

    Returns:
        the feasible and the infeasible schedule that bracket the budget, and the optimal schedules at nearby
        multipliers. They are needed because the loss is not convex: the best schedule may be optimal at no multiplier.
    """
    low, high = 0.0, 1.0
    within, above = path.at_multiplier(high / limit), path.at_multiplier(0.0)
    while within[1] > limit and high < 1e30:
        high *= 4
        within = path.at_multiplier(high / limit)
    for _ in range(_BISECTIONS):
        multiplier = (low + high) / 2
        solution = path.at_multiplier(multiplier / limit)
        if solution[1] > limit:
            low, above = multiplier, solution
        else:
            high, within = multiplier, solution
    near = [path.at_multiplier(high * factor / limit)[0] for factor in _NEAR]
    return within[0], above[0], list(dict.fromkeys([above[0], *near]))


def _use_up_budget(
    costs: TokenCosts, fraction: float, within: tuple[int, ...], above: tuple[int, ...]
) -> tuple[int, ...]:
    """Return the schedule between ``within`` and ``above`` that uses most of the budget with all units kept.

    If the first merged tokens cost most, no schedule between the two is optimal at any multiplier.
    """
    limit, best = fraction * costs.total, within
    for step in range(_BETWEEN + 1):
        share = step / _BETWEEN
        schedule = tuple(ceil(share * high + (1 - share) * low) for low, high in zip(within, above, strict=True))
        if costs.stack.possible(schedule) and costs.at(schedule).of(Plan({})) <= limit:
            best = schedule
    return best


class _Path:
    """Schedules as paths through the blocks; values and losses are fractions of the sum of all scores."""

    def __init__(self, items: KnapsackItems, costs: TokenCosts, merge_loss: MergeLoss) -> None:
        self.costs, self.items = costs, items
        stack = costs.stack
        least = stack.prefix + max(1, round(_LEAST * (stack.tokens - stack.prefix)))
        levels = np.unique(np.linspace(least, stack.tokens, _LEVELS).round().astype(int))[::-1]
        self.levels = levels
        # [i, j]: whether level i can merge to level j.
        self.possible = np.array([[stack.fewest_after(int(a)) <= b <= a for b in levels] for a in levels])
        scale = items.scale
        # Merging padding has no loss. A small strictly convex loss prefers more tokens among such schedules, so that
        # each is optimal at some multiplier.
        spared = _SPARED * (1 - levels / stack.tokens) ** 2
        before, after = np.meshgrid(levels.astype(float), levels.astype(float), indexing="ij")
        steps = [merge_loss.step(i, stack.prefix, before, np.minimum(before, after)) for i in range(len(stack.blocks))]
        self.lost = np.stack(steps) / scale + np.maximum(spared[None, :] - spared[:, None], 0)
        # The cost of comparing tokens assumes whole heads; the units searched later may have narrower ones.
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
        """Return the best schedule at a multiplier per FLOP, and the FLOPs of the network."""
        gain, cost = self._blocks(multiplier)
        start = int(np.argmax(self.levels))
        value = np.full(len(self.levels), -np.inf)
        value[start] = 0.0
        predecessors: list[NDArray[np.int64]] = []
        for block in range(len(gain)):
            step = value[:, None] - self.lost[block] - multiplier * self.merging[block] + gain[block][None, :]
            step[~self.possible] = -np.inf
            predecessors.append(step.argmax(axis=0))
            value = step.max(axis=0)
        levels = [int(value.argmax())]
        for block in reversed(range(1, len(gain))):
            levels.append(int(predecessors[block][levels[-1]]))
        levels.reverse()
        schedule = tuple(int(self.levels[i]) for i in levels)
        merging = sum(self.merging[b][i][j] for b, (i, j) in enumerate(pairwise([start, *levels])))
        inside = sum(cost[b][i] for b, i in enumerate(levels))
        return schedule, float(self._outside(multiplier) + merging + inside)

    def _blocks(self, multiplier: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Return two arrays ``(blocks, levels)``: gains and FLOPs.

        A gain is the best value of the block's units minus their charged FLOPs.
        """
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
        """Return the FLOPs outside the stack: the fixed ones, and those of the best units."""
        full = self.costs.stack.tokens
        fixed = self.costs.base.floor - sum(self.costs.rest_at(b, full) for b in range(len(self.costs.stack.blocks)))
        for group, values, flops in zip(self.items.groups, self.items.values, self.option_costs, strict=True):
            if group.name not in self.costs.block_of:
                fixed += float(flops[int(np.argmax(values - multiplier * flops))])
        return float(fixed)
