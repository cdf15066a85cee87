"""Which tokens merge, as a value of its own: made of similarities, or given by a file that has decided."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Further than any cosine.
BEYOND = 2.0


@dataclass(frozen=True)
class Choice:
    """Of the tokens that may leave, those that do, and what each of them would merge into.

    Attributes:
        leaves: bool ``(batch, candidates)``.
        nearest: int64 ``(batch, candidates)``, the column of the similarities.
    """

    leaves: Tensor
    nearest: Tensor


def chosen(similarity: Tensor, count: int, real: Tensor | None = None) -> Choice:
    """The ``count`` candidates that are most similar to a partner; among equals the earlier one.

    Args:
        similarity: ``(batch, candidates, partners)``, of those that cannot merge below -1.
        real: bool ``(batch, candidates)``, False at padding, which leaves first.
    """
    best, nearest = similarity.max(dim=-1)
    return Choice(ranks(_urgency(best, real)) < count, nearest)


def regret(similarity: Tensor, count: int, given: Choice, real: Tensor | None = None) -> Tensor:
    """By how much a choice is worse than `chosen`'s, ``(batch,)``: the largest difference of two similarities that it
    decides the other way. Infinite where it is no choice of ``count`` candidates."""
    best = similarity.max(dim=-1).values
    inside = (given.nearest >= 0) & (given.nearest < similarity.shape[-1])
    taken = similarity.gather(2, given.nearest.clamp(0, similarity.shape[-1] - 1)[:, :, None])[:, :, 0]
    counted = given.leaves if real is None else given.leaves & real
    partner = (best - taken).masked_fill(~counted, 0).amax(1)
    urgency = _urgency(best, real)
    last = urgency.masked_fill(~given.leaves, 2 * BEYOND).amin(1)
    first = urgency.masked_fill(given.leaves, -2 * BEYOND).amax(1)
    valid = (given.leaves.sum(1) == count) & (inside | ~counted).all(1)
    return torch.maximum(partner, first - last).clamp_min(0).masked_fill(~valid, torch.inf)


def _urgency(best: Tensor, real: Tensor | None) -> Tensor:
    return best if real is None else best.masked_fill(~real, BEYOND)


def ranks(values: Tensor) -> Tensor:
    """How many of a row's ``values`` come before each: larger ones, and equal ones that stand before it."""
    index = torch.arange(values.shape[1], device=values.device)
    earlier = index[None, :] < index[:, None]
    mine, others = values[:, :, None], values[:, None, :]
    return ((others > mine) | ((others == mine) & earlier)).sum(-1)
