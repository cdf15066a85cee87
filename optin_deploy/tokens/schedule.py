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

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from math import ceil
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optin_deploy.criteria.trajectory_loss import Trajectory
from optin_deploy.distributed.ranks import own_indices, ranks_of
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.nn.partial_forward import resumed
from optin_deploy.search.knapsack import Budget, Offers, kept_score, offers, search_all, sizes_of
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.tokens.costs import TokenCosts
from optin_deploy.tokens.merging import with_merging
from optin_deploy.tokens.stack import TokenStack

# Parts of the tokens behind the prefix that are left where damage is measured.
_MEASURED = (0.9, 0.75, 0.6, 0.5)
# Numbers of tokens that a block may get: so many steps from all to an eighth.
_LEVELS, _LEAST = 48, 1 / 8
_BISECTIONS = 60
# Between two schedules it is looked for one in so many steps.
_BETWEEN = 64
# Times the price at which the budget is met: where schedules are tried with the units that are then the best.
_NEAR = tuple(2 ** (step / 4) for step in range(-8, 9))
# Of the sum of all scores, what leaving no token would cost without damage.
_SPARED = 1e-6

Advance = Callable[[int], None]


@dataclass(frozen=True)
class Damages:
    """What merging costs: ``loss[l, i]`` of going on with ``tokens[i]`` tokens (descending) from block l."""

    tokens: tuple[int, ...]
    loss: NDArray[np.float64]

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"tokens": list(self.tokens), "loss": self.loss.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Damages":
        """What `to_dict` gave."""
        return cls(tuple(data["tokens"]), np.array(data["loss"], dtype=np.float64))

    def at(self, block: int, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Between the measured numbers linear; beyond the fewest it goes on as it came there; where fewer are gone than
        was measured, a power of how many, since the first are the most alike."""
        known, loss = np.array(self.tokens[::-1], dtype=float), self.loss[block][::-1]
        found = np.interp(tokens, known, loss)
        slope = (loss[0] - loss[1]) / (known[1] - known[0])
        found = np.where(tokens < known[0], loss[0] + slope * (known[0] - tokens), found)
        if len(known) < 3 or loss[-2] <= 0:
            return found
        first, second = known[-1] - known[-2], known[-1] - known[-3]
        power = max(1.0, float(np.log(loss[-3] / loss[-2]) / np.log(second / first)))
        return np.where(tokens > known[-2], loss[-2] * ((known[-1] - tokens) / first) ** power, found)

    def step(
        self, block: int, prefix: int, before: NDArray[np.float64], after: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Of going on from ``before`` tokens, ``prefix`` of which never merge, to ``after`` of them at a block."""
        less = np.maximum(self.at(block, after) - self.at(block, before), 0)
        anew = self.at(block, prefix + (self.tokens[0] - prefix) * (after - prefix) / (before - prefix))
        return np.sqrt(less * np.maximum(anew, 0))

    def of(self, schedule: Sequence[int], prefix: int) -> float:
        """Of all steps of a schedule."""
        steps = enumerate(pairwise((self.tokens[0], *schedule)))
        return sum(float(self.step(i, prefix, np.array(before), np.array(after))) for i, (before, after) in steps)


@torch.no_grad()
def damages(
    network: Network,
    structure: Structure,
    stack: TokenStack,
    batches: Sequence[Mapping[str, Tensor]],
    factors: Mapping[str, float],
    advance: Advance = lambda _: None,
) -> Damages:
    """Measure the damage of merging before each block, summed over ``batches``, the running maximum over tokens.

    Args:
        factors: weights of the outputs' task terms, by output name.
        advance: called with 1 after every schedule that was run, `damage_steps` in all.
    """
    counts = _measured_counts(stack)
    loss = torch.zeros(len(stack.blocks), 1 + len(counts), dtype=torch.float64)
    for index in own_indices(batches):
        inputs = batches[index]
        trajectory = Trajectory(network, structure, inputs, 0)
        blocks, dense = trajectory.run()
        for block in range(len(stack.blocks)):
            # Blocks before the first that merges give what they give in the dense network.
            known = {name: blocks[name] for name in stack.blocks[:block] if name in blocks}
            for column, tokens in enumerate(counts, 1):
                schedule = (stack.tokens,) * block + (tokens,) * (len(stack.blocks) - block)
                changed = _merging_outputs(network, structure, stack, schedule, inputs, known)
                for name, factor in factors.items():
                    if factor:
                        loss[block, column] += factor * trajectory.task_change(name, dense[name], changed[name], 1)[0]
                advance(1)
    total = ranks_of(batches).total({"loss": loss})["loss"].numpy()
    return Damages((stack.tokens, *counts), np.maximum.accumulate(np.maximum(total, 0), axis=1))


def damage_steps(stack: TokenStack, batches: int) -> int:
    """How often `damages` will advance its progress."""
    return len(_measured_counts(stack)) * len(stack.blocks) * batches


def _measured_counts(stack: TokenStack) -> list[int]:
    patches = stack.tokens - stack.prefix
    wanted = {max(stack.least_behind(stack.tokens), stack.prefix + round(part * patches)) for part in _MEASURED}
    return sorted(wanted - {stack.tokens}, reverse=True)


def _merging_outputs(
    network: Network,
    structure: Structure,
    stack: TokenStack,
    schedule: tuple[int, ...],
    inputs: Mapping[str, Tensor],
    known: Mapping[str, Tensor],
) -> dict[str, Tensor]:
    """Outputs of the network with the tokens of a schedule; its list of blocks is put back afterwards."""
    parent, _, name = stack.name.rpartition(".")
    holder, blocks = network.module.get_submodule(parent), network.module.get_submodule(stack.name)
    try:
        with_merging(network.module, structure, stack, Plan({}, schedule))
        with resumed(network.module, known):
            return network.forward(inputs)
    finally:
        setattr(holder, name, blocks)


def best_schedule(
    structure: Structure,
    scores: Mapping[str, Tensor],
    costs: TokenCosts,
    fraction: float,
    align: int,
    damage: Damages,
) -> tuple[int, ...]:
    """The schedule that, with the best units for it, loses least at ``fraction`` of the dense FLOPs.

    Args:
        costs: at any schedule.
        damage: in the unit of ``scores``.
    """
    path = _Path(offers(structure, scores, sizes_of(structure, align)), costs, damage)
    within, above, tried = _around(path, fraction * costs.total)

    def worth(schedule: tuple[int, ...]) -> float:
        try:
            plan = search_all(structure, scores, [Budget(costs.at(schedule), fraction)], align)
        except UserError:
            return -np.inf
        return kept_score(structure, scores, plan) - damage.of(schedule, costs.stack.prefix)

    return max([_used_up(costs, fraction, within, above), *tried], key=worth)


def share_schedule(structure: Structure, costs: TokenCosts, fraction: float, damage: Damages) -> tuple[int, ...]:
    """The schedule of the least damage that alone, with all units, comes down to ``fraction`` of the dense FLOPs.

    Raises:
        UserError: merging alone does not come down so far.
    """
    whole = {g.name: [g.units] for g in structure.groups}
    # With one choice for each group, what it is worth does not matter.
    alike = {g.name: torch.ones(g.units) for g in structure.groups}
    path = _Path(offers(structure, alike, whole), costs, damage)
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
    within, above = path.at_price(high / limit), path.at_price(0.0)
    while within[1] > limit and high < 1e30:
        high *= 4
        within = path.at_price(high / limit)
    for _ in range(_BISECTIONS):
        price = (low + high) / 2
        found = path.at_price(price / limit)
        if found[1] > limit:
            low, above = price, found
        else:
            high, within = price, found
    near = [path.at_price(high * factor / limit)[0] for factor in _NEAR]
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

    def __init__(self, offered: Offers, costs: TokenCosts, damage: Damages) -> None:
        self.costs, self.offered = costs, offered
        stack = costs.stack
        least = stack.prefix + max(1, round(_LEAST * (stack.tokens - stack.prefix)))
        levels = np.unique(np.linspace(least, stack.tokens, _LEVELS).round().astype(int))[::-1]
        self.levels = levels
        # [i, j]: going from level i to level j.
        self.possible = np.array([[stack.least_behind(int(a)) <= b <= a for b in levels] for a in levels])
        scale = offered.scale
        # Merging what is padding only costs nothing: of schedules without damage more tokens are a little better, the
        # more so the fewer there are, for all of them to be the best at some price.
        spared = _SPARED * (1 - levels / stack.tokens) ** 2
        before, after = np.meshgrid(levels.astype(float), levels.astype(float), indexing="ij")
        steps = [damage.step(i, stack.prefix, before, np.minimum(before, after)) for i in range(len(stack.blocks))]
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
            for g, choices in zip(offered.groups, offered.choices, strict=True)
        ]

    def at_price(self, price: float) -> tuple[tuple[int, ...], float]:
        """The best schedule at a price per FLOP, and what the network then costs."""
        gain, cost = self._blocks(price)
        start = int(np.argmax(self.levels))
        value = np.full(len(self.levels), -np.inf)
        value[start] = 0.0
        came: list[NDArray[np.int64]] = []
        for block in range(len(gain)):
            step = value[:, None] - self.lost[block] - price * self.merging[block] + gain[block][None, :]
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
        return schedule, float(self._outside(price) + merging + inside)

    def _blocks(self, price: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Of every block at every number of tokens: the most that its units are worth less their price, and their
        FLOPs together with those that belong to no unit."""
        shape = (len(self.costs.stack.blocks), len(self.levels))
        gain, cost = np.zeros(shape), np.zeros(shape)
        for block in range(shape[0]):
            for column, tokens in enumerate(self.levels):
                rest = self.costs.rest_at(block, int(tokens))
                gain[block, column] -= price * rest
                cost[block, column] += rest
        for group, values, flops in zip(self.offered.groups, self.offered.values, self.option_costs, strict=True):
            inside = self.costs.block_of.get(group.name)
            if inside is None:
                continue
            for column, tokens in enumerate(self.levels):
                factor = self.costs.at((int(tokens),) * shape[0]).factor(group.name)
                taken = int(np.argmax(values - price * factor * flops))
                gain[inside, column] += values[taken] - price * factor * flops[taken]
                cost[inside, column] += factor * flops[taken]
        return gain, cost

    def _outside(self, price: float) -> float:
        """FLOPs outside the stack: those that nothing changes, and those of the best units there."""
        full = self.costs.stack.tokens
        fixed = self.costs.base.floor - sum(self.costs.rest_at(b, full) for b in range(len(self.costs.stack.blocks)))
        for group, values, flops in zip(self.offered.groups, self.offered.values, self.option_costs, strict=True):
            if group.name not in self.costs.block_of:
                fixed += float(flops[int(np.argmax(values - price * flops))])
        return float(fixed)
