"""The change of the outputs by merging tokens before each block, measured by running the network."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from optin_deploy.nn.partial_forward import replay_blocks
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.tokens.merging import with_merging
from optin_deploy.tokens.stack import TokenStack
from optin_deploy.utils.progress import track

# Fractions of the tokens after the prefix at which the loss is measured.
_MEASURED = (0.9, 0.75, 0.6, 0.5)


@dataclass(frozen=True)
class MergeLoss:
    """``loss[l, i]`` is the loss of continuing with ``tokens[i]`` tokens (descending) from block l."""

    tokens: tuple[int, ...]
    loss: NDArray[np.float64]

    def to_dict(self) -> dict[str, object]:
        """Return the value as plain JSON data."""
        return {"tokens": list(self.tokens), "loss": self.loss.tolist()}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "MergeLoss":
        """Return the value from the data of `to_dict`."""
        return cls(tuple(data["tokens"]), np.array(data["loss"], dtype=np.float64))

    def at(self, block: int, tokens: NDArray[np.float64]) -> NDArray[np.float64]:
        """Return the loss at numbers of tokens between and beyond the measured ones.

        It is linear between them, and extrapolated linearly below the fewest. Above the second most it is a power of
        the number of merged tokens, since the most similar tokens merge first.
        """
        known, loss = np.array(self.tokens[::-1], dtype=float), self.loss[block][::-1]
        values = np.interp(tokens, known, loss)
        slope = (loss[0] - loss[1]) / (known[1] - known[0])
        values = np.where(tokens < known[0], loss[0] + slope * (known[0] - tokens), values)
        if len(known) < 3 or loss[-2] <= 0:
            return values
        first, second = known[-1] - known[-2], known[-1] - known[-3]
        power = max(1.0, float(np.log(loss[-3] / loss[-2]) / np.log(second / first)))
        return np.where(tokens > known[-2], loss[-2] * ((known[-1] - tokens) / first) ** power, values)

    def step(
        self, block: int, prefix: int, before: NDArray[np.float64], after: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        """Return the loss of merging ``before`` tokens to ``after`` at a block; ``prefix`` tokens never merge."""
        less = np.maximum(self.at(block, after) - self.at(block, before), 0)
        anew = self.at(block, prefix + (self.tokens[0] - prefix) * (after - prefix) / (before - prefix))
        return np.sqrt(less * np.maximum(anew, 0))

    def of(self, schedule: Sequence[int], prefix: int) -> float:
        """Return the loss of all steps of a schedule."""
        steps = enumerate(pairwise((self.tokens[0], *schedule)))
        return sum(float(self.step(i, prefix, np.array(before), np.array(after))) for i, (before, after) in steps)


@torch.no_grad()
def measure_task_loss(
    network: Network,
    structure: Structure,
    stack: TokenStack,
    batches: Sequence[Mapping[str, Tensor]],
    factors: Mapping[str, float],
) -> MergeLoss:
    """Measure the loss of merging before each block, summed over ``batches``. It never falls with fewer tokens.

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
            # The outputs of blocks before the first merge are those of the dense network.
            known = {name: blocks[name] for name in stack.blocks[:block] if name in blocks}
            for column, tokens in enumerate(track(counts), 1):
                schedule = (stack.tokens,) * block + (tokens,) * (len(stack.blocks) - block)
                with _merging(network, structure, stack, schedule), replay_blocks(network.module, known):
                    changed = network.forward(inputs)
                for name, factor in factors.items():
                    if factor:
                        loss[block, column] += factor * trajectory.task_change(name, dense[name], changed[name], 1)[0]
    total = ranks_of(batches).all_reduce({"loss": loss})["loss"].numpy()
    return MergeLoss((stack.tokens, *counts), np.maximum.accumulate(np.maximum(total, 0), axis=1))


def _measured_counts(stack: TokenStack) -> list[int]:
    patches = stack.tokens - stack.prefix
    wanted = {max(stack.fewest_after(stack.tokens), stack.prefix + round(share * patches)) for share in _MEASURED}
    return sorted(wanted - {stack.tokens}, reverse=True)


@contextmanager
def _merging(network: Network, structure: Structure, stack: TokenStack, schedule: tuple[int, ...]) -> Iterator[None]:
    """Let the network merge tokens by a schedule; restore its list of blocks afterwards."""
    parent, _, name = stack.name.rpartition(".")
    holder, blocks = network.module.get_submodule(parent), network.module.get_submodule(stack.name)
    try:
        with_merging(network.module, structure, stack, Plan({}, schedule))
        yield
    finally:
        setattr(holder, name, blocks)


# Merging runs once per block and number of tokens, so only on this many samples.
_MERGED_SAMPLES = 32


def measure_merge_loss(
    network: Network,
    structure: Structure,
    stack: TokenStack,
    batches: Batches,
    scoring: Scoring,
) -> MergeLoss:
    """Return the loss of merging tokens before each block, in the unit of trajectory-OBS scores on the same batches.

    Only outputs are compared, since Gram matrices need all tokens. If scores also have a manifold term, it has the same
    weight over all units (`task_factors`), and is assumed to be as large here.

    Raises:
        UserError: the scores have no task term.
    """
    manifold, task = scoring.weights(network, structure)
    if not task:
        raise UserError("--task-weight 0: the loss of merging tokens is measured at the outputs; give --tokens numbers")
    ready, factors = output_factors(network, structure, batches, scoring)
    sample = _merged_batches(batches)
    measured = measure_task_loss(ready, structure, stack, sample, factors)
    scale = sum(map(batch_size, batches)) / sum(map(batch_size, sample))
    return MergeLoss(measured.tokens, measured.loss * scale * (1 + manifold / task))


def _merged_batches(batches: Batches) -> Batches:
    """Return the first batches, with `_MERGED_SAMPLES` samples or a little more."""
    samples = 0
    for index, batch in enumerate(batches):
        samples += batch_size(batch)
        if samples >= _MERGED_SAMPLES:
            return batches[: index + 1]
    return batches
