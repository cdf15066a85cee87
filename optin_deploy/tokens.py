"""Merging tokens that are alike, as plain tensor functions that export: no shape depends on data, only on counts.

Bipartite soft matching (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3): the tokens behind
the protected prefix (class, distillation and register tokens) are dealt in turn into sets A and B; the ``count`` tokens
of A that are most similar to one of B are merged into it, averages being weighted by how many tokens each one stands
for. Among equals the earlier token is taken. What is left stands in the order prefix, rest of A, B.

Tokens are picked and added up by products with matrices of zeros and ones, and ranked by comparing each with each:
every runtime has fast products, few have a fast scatter, and sorting leaves the order of equals open.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Matching:
    """Which tokens merge.

    Attributes:
        staying: ``(batch, |A| - count, |A|)``, 1 at the token of A that stays, the most similar first.
        joining: ``(batch, |A|, |B|)``, 1 at the token of B that one of A merges into; rows of those that stay are 0.
        moved: int64 ``(batch, tokens)``, where each token is afterwards.
    """

    prefix: int
    staying: Tensor
    joining: Tensor
    moved: Tensor


def most_mergeable(tokens: int, prefix: int) -> int:
    """How many of ``tokens`` can merge at once: those of A."""
    return (tokens - prefix) // 2


def matching(metric: Tensor, prefix: int, count: int) -> Matching:
    """Match ``count`` tokens, at least 1 and at most `most_mergeable`, by the cosine of their ``metric``.

    Args:
        metric: ``(batch, tokens, features)``.
        prefix: so many tokens at the beginning are protected.
    """
    batch, device, dtype = metric.shape[0], metric.device, metric.dtype
    directions = F.normalize(metric[:, prefix:], dim=-1)
    # Of an odd number of tokens B gets the last one, so that every token of A has a neighbour on both sides.
    a, b = directions[:, 1::2], directions[:, 0::2]
    similarity, nearest = (a @ b.transpose(1, 2)).max(dim=-1)
    rank = ranks(similarity)
    kept = a.shape[1] - count
    leaves = rank < count
    joining = (nearest[:, :, None] == torch.arange(b.shape[1], device=device)) & leaves[:, :, None]
    staying = rank[:, None, :] == torch.arange(count, a.shape[1], device=device)[:, None]
    a_moved = prefix + torch.where(leaves, kept + nearest, rank - count)
    b_moved = (prefix + kept + torch.arange(b.shape[1], device=device)).expand(batch, -1)
    before = torch.arange(prefix, device=device).expand(batch, -1)
    moved = torch.cat([before, _dealt(a_moved, b_moved)], dim=1)
    return Matching(prefix, staying.to(dtype), joining.to(dtype), moved)


def merged(x: Tensor, sizes: Tensor, match: Matching) -> tuple[Tensor, Tensor]:
    """Tokens ``(batch, tokens - count, width)`` after merging, and how many each stands for.

    Args:
        x: ``(batch, tokens, width)``.
        sizes: ``(batch, tokens, 1)``.
    """
    p = match.prefix
    a, b, size_a, size_b = x[:, p + 1 :: 2], x[:, p::2], sizes[:, p + 1 :: 2], sizes[:, p::2]
    gathered = match.joining.transpose(1, 2)
    size_joined = size_b + gathered @ size_a
    joined = (b * size_b + gathered @ (a * size_a)) / size_joined
    tokens = torch.cat([x[:, :p], match.staying @ a, joined], dim=1)
    return tokens, torch.cat([sizes[:, :p], match.staying @ size_a, size_joined], dim=1)


def placed(places: Tensor, match: Matching) -> Tensor:
    """What belongs to the places of patches, ``(batch, patches, features)``, after merging: a token is where that of B
    was that others merged into."""
    return torch.cat([match.staying @ places[:, 1::2], places[:, 0::2]], dim=1)


def places_left(at: Tensor, match: Matching) -> Tensor:
    """Where the tokens stood in the beginning, int64 ``(batch, tokens)``, after merging, as in `placed`."""
    p = match.prefix
    left = at[:, p + 1 :: 2].gather(1, match.staying.argmax(-1))
    return torch.cat([at[:, :p], left, at[:, p::2]], dim=1)


def between(biases: Tensor, at: Tensor) -> Tensor:
    """Biases ``(batch, heads, tokens, tokens)`` between the tokens that are left.

    Args:
        biases: ``([1,] heads, places, places)``, of all queries for all keys.
        at: int64 ``(batch, tokens)``, where each token stood in the beginning.
    """
    # As a table by pairs of places: runtimes look rows up faster than they index by two tensors.
    pairs = at[:, :, None] * biases.shape[-1] + at[:, None, :]
    return F.embedding(pairs, biases.flatten(-2).flatten(0, -2).t()).permute(0, 3, 1, 2)


def unmerged(x: Tensor, where: Tensor) -> Tensor:
    """Every token of the beginning gets what it was merged into: ``(batch, tokens, width)``.

    Args:
        where: int64 ``(batch, tokens)``, the token of ``x`` that each one is in.
    """
    return x.gather(1, where[:, :, None].expand(-1, -1, x.shape[-1]))


def comparing_flops(tokens: int, prefix: int, features: int) -> float:
    """FLOPs of `matching` for one sample: all similarities."""
    a, b = _sides(tokens, prefix)
    return 2.0 * a * b * features


def merging_flops(tokens: int, prefix: int, count: int, width: int, places: int = 0) -> float:
    """FLOPs of `merged` for one sample, and of `placed` for so many features: those that stay are picked, with their
    sizes, and those that leave added up."""
    a, b = _sides(tokens, prefix)
    return 2.0 * ((a - count) * a * (width + 1 + places) + a * b * (width + 1)) if count else 0.0


def _sides(tokens: int, prefix: int) -> tuple[int, int]:
    """How many tokens are in A and in B."""
    a = most_mergeable(tokens, prefix)
    return a, tokens - prefix - a


def _dealt(a: Tensor, b: Tensor) -> Tensor:
    """``(batch, tokens)`` of the tokens of A and B, in the order before they were dealt."""
    pairs = torch.stack([b[:, : a.shape[1]], a], dim=2).flatten(1)
    return torch.cat([pairs, b[:, a.shape[1] :]], dim=1)


def ranks(values: Tensor) -> Tensor:
    """How many of a row's ``values`` come before each: larger ones, and equal ones that stand before it."""
    index = torch.arange(values.shape[1], device=values.device)
    earlier = index[None, :] < index[:, None]
    mine, others = values[:, :, None], values[:, None, :]
    return ((others > mine) | ((others == mine) & earlier)).sum(-1)
