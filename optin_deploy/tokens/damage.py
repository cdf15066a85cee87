"""What merging tokens before each block costs the outputs, measured by running the network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from optin_deploy.criteria.scoring import Scoring, output_factors
from optin_deploy.criteria.trajectory_loss import Trajectory
from optin_deploy.distributed.ranks import own_indices, ranks_of
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.nn.batches import Batches, batch_size
from optin_deploy.nn.partial_forward import resumed
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.tokens.merging import with_merging
from optin_deploy.tokens.stack import TokenStack
from optin_deploy.utils.progress import track

# Parts of the tokens behind the prefix that are left where damage is measured.
_MEASURED = (0.9, 0.75, 0.6, 0.5)


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
) -> Damages:
    """Measure the damage of merging before each block, summed over ``batches``, the running maximum over tokens.

    Args:
        factors: weights of the outputs' task terms, by output name.
    """
    counts = _measured_counts(stack)
    loss = torch.zeros(len(stack.blocks), 1 + len(counts), dtype=torch.float64)
    for index in track(own_indices(batches)):
        inputs = batches[index]
        trajectory = Trajectory(network, structure, inputs, 0)
        blocks, dense = trajectory.run()
        for block in track(range(len(stack.blocks))):
            # Blocks before the first that merges give what they give in the dense network.
            known = {name: blocks[name] for name in stack.blocks[:block] if name in blocks}
            for column, tokens in enumerate(track(counts), 1):
                schedule = (stack.tokens,) * block + (tokens,) * (len(stack.blocks) - block)
                changed = _merging_outputs(network, structure, stack, schedule, inputs, known)
                for name, factor in factors.items():
                    if factor:
                        loss[block, column] += factor * trajectory.task_change(name, dense[name], changed[name], 1)[0]
    total = ranks_of(batches).all_reduce({"loss": loss})["loss"].numpy()
    return Damages((stack.tokens, *counts), np.maximum.accumulate(np.maximum(total, 0), axis=1))


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


# Merging is tried on so many samples: it is run once for each block and number of tokens.
_MERGED_SAMPLES = 32


def token_damages(
    network: Network,
    structure: Structure,
    stack: TokenStack,
    batches: Batches,
    scoring: Scoring,
) -> Damages:
    """What merging tokens before each block costs, in the unit of the scores of trajectory-OBS on the same batches.

    Only outputs are compared, since Gram matrices need all tokens; where scores have a manifold part as well, that is
    as large over all units (`task_factors`), and is taken to be as large here.

    Raises:
        UserError: outputs do not count in these scores.
    """
    manifold, task = scoring.weights(network, structure)
    if not task:
        raise UserError("--task-weight 0: what merging tokens costs is measured at the outputs; give --tokens numbers")
    ready, factors = output_factors(network, structure, batches, scoring)
    some = _merged_batches(batches)
    found = damages(ready, structure, stack, some, factors)
    part = sum(map(batch_size, batches)) / sum(map(batch_size, some))
    return Damages(found.tokens, found.loss * part * (1 + manifold / task))


def _merged_batches(batches: Batches) -> Batches:
    samples = 0
    for index, batch in enumerate(batches):
        samples += batch_size(batch)
        if samples >= _MERGED_SAMPLES:
            return batches[: index + 1]
    return batches
