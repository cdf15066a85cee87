"""Which tokens merge: chosen by similarity, or read from the outputs of a file that has chosen."""

from dataclasses import dataclass

import torch
from torch import Tensor

# Larger than any cosine.
BEYOND = 2.0


@dataclass(frozen=True)
class Choice:
    """Which of the candidates merge, and into which token.

    Attributes:
        leaves: bool ``(batch, candidates)``.
        nearest: int64 ``(batch, candidates)``, the partner of each, a column of the similarities.
    """

    leaves: Tensor
    nearest: Tensor


def choose(similarity: Tensor, count: int, real: Tensor | None = None) -> Choice:
    """Choose the ``count`` candidates that are most similar to a partner; among equals the earlier one.

    Args:
        similarity: ``(batch, candidates, partners)``, below -1 for pairs that cannot merge.
        real: bool ``(batch, candidates)``, False at padding, which is chosen first.
    """
    best, nearest = similarity.max(dim=-1)
    return Choice(ranks(_urgency(best, real)) < count, nearest)


def regret(similarity: Tensor, count: int, choice: Choice, real: Tensor | None = None) -> Tensor:
    """Return how much worse a choice is than that of `choose`, ``(batch,)``.

    That is the largest difference of two similarities that it orders the other way. Infinite if it does not choose
    ``count`` candidates.
    """
    best = similarity.max(dim=-1).values
    inside = (choice.nearest >= 0) & (choice.nearest < similarity.shape[-1])
    taken = similarity.gather(2, choice.nearest.clamp(0, similarity.shape[-1] - 1)[:, :, None])[:, :, 0]
    counted = choice.leaves if real is None else choice.leaves & real
    partner = (best - taken).masked_fill(~counted, 0).amax(1)
    urgency = _urgency(best, real)
    last = urgency.masked_fill(~choice.leaves, 2 * BEYOND).amin(1)
    first = urgency.masked_fill(choice.leaves, -2 * BEYOND).amax(1)
    valid = (choice.leaves.sum(1) == count) & (inside | ~counted).all(1)
    return torch.maximum(partner, first - last).clamp_min(0).masked_fill(~valid, torch.inf)


def _urgency(best: Tensor, real: Tensor | None) -> Tensor:
    return best if real is None else best.masked_fill(~real, BEYOND)


def ranks(values: Tensor) -> Tensor:
    """Return the rank of each value in its row, the largest first; among equals the earlier one first."""
    index = torch.arange(values.shape[1], device=values.device)
    earlier = index[None, :] < index[:, None]
    mine, others = values[:, :, None], values[:, None, :]
    return ((others > mine) | ((others == mine) & earlier)).sum(-1)
