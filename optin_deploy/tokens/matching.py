"""Merging tokens that are alike, as plain tensor functions that export: no shape depends on data, only on counts.

Bipartite soft matching (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3): the tokens behind
the protected prefix (class, distillation and register tokens) are dealt in turn into sets A and B; the ``count`` tokens
of A that are most similar to one of B are merged into it, averages being weighted by how many tokens each one stands
for. Among equals the earlier token is taken. What is left stands in the order prefix, rest of A, B, each as it stood:
in an order by similarity, rounding would swap neighbours, and other tokens would be dealt into A the next time.

Tokens are looked up as rows of a table, added up by products with matrices of zeros and ones, and ranked by comparing
each with each: every runtime has fast lookups and products, few have a fast scatter or gather whole tokens by elements,
and sorting leaves the order of equals open.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from optin_deploy.tokens.choices import Choice, chosen


@dataclass(frozen=True)
class Matching:
    """Which tokens merge.

    Attributes:
        staying: int64 ``(batch, prefix + |A| - count)``, the prefix and what stays of A.
        leaving: int64 ``(batch, count)``, the tokens of A that merge.
        joining: ``(batch, |B|, count)``, 1 at the token of B that each of those merges into.
        moved: int64 ``(batch, tokens)``, where each token is afterwards.
    """

    prefix: int
    staying: Tensor
    leaving: Tensor
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
    return matched(chosen(similarities(metric, prefix), count), metric.shape[1], prefix, count, metric.dtype)


def similarities(metric: Tensor, prefix: int) -> Tensor:
    """Cosines ``(batch, |A|, |B|)`` of the tokens behind the ``prefix``, dealt into A and B, in float32 at least."""
    # In half precision most similar tokens would tie.
    exact = metric[:, prefix:].to(torch.promote_types(metric.dtype, torch.float32))
    directions = F.normalize(exact, dim=-1)
    # Of an odd number of tokens B gets the last one, so that every token of A has a neighbour on both sides.
    return directions[:, 1::2] @ directions[:, 0::2].transpose(1, 2)


def matched(choice: Choice, tokens: int, prefix: int, count: int, dtype: torch.dtype) -> Matching:
    """The matching of a choice among the tokens of A, ``count`` of ``tokens`` in all; weights are of ``dtype``."""
    leaves, nearest = choice.leaves, choice.nearest
    batch, device = leaves.shape[0], leaves.device
    size_a = leaves.shape[1]
    kept, size_b = size_a - count, tokens - prefix - size_a
    index_a, index_b = torch.arange(size_a, device=device), torch.arange(size_b, device=device)
    gone = (leaves[:, None, :] & (index_a < index_a[:, None])).sum(-1)
    place = torch.where(leaves, gone, count + index_a - gone)
    placed_a = (place[:, None, :] == index_a[:, None]).to(dtype).argmax(-1)
    joining = nearest.gather(1, placed_a[:, :count])[:, None, :] == index_b[:, None]
    a_moved = prefix + torch.where(leaves, kept + nearest, place - count)
    b_moved = (prefix + kept + index_b).expand(batch, -1)
    before = torch.arange(prefix, device=device).expand(batch, -1)
    moved = torch.cat([before, _dealt(a_moved, b_moved)], dim=1)
    tokens_a = prefix + 1 + 2 * placed_a
    staying = torch.cat([before, tokens_a[:, count:]], dim=1)
    return Matching(prefix, staying, tokens_a[:, :count], joining.to(dtype), moved)


def merged(x: Tensor, sizes: Tensor, match: Matching) -> tuple[Tensor, Tensor]:
    """Tokens ``(batch, tokens - count, width)`` after merging, and how many each stands for.

    Args:
        x: ``(batch, tokens, width)``.
        sizes: ``(batch, tokens, 1)``.
    """
    b, size_b = x[:, match.prefix :: 2], sizes[:, match.prefix :: 2]
    size_leaving = _rows(sizes, match.leaving)
    size_joined = size_b + match.joining @ size_leaving
    joined = (b * size_b + match.joining @ (_rows(x, match.leaving) * size_leaving)) / size_joined
    tokens = torch.cat([_rows(x, match.staying), joined], dim=1)
    return tokens, torch.cat([_rows(sizes, match.staying), size_joined], dim=1)


def placed(places: Tensor, match: Matching) -> Tensor:
    """What belongs to the places of patches, ``(batch, patches, features)``, after merging: a token is where that of B
    was that others merged into."""
    p = match.prefix
    return torch.cat([_rows(places, match.staying[:, p:] - p), places[:, 0::2]], dim=1)


def places_left(at: Tensor, match: Matching) -> Tensor:
    """Where the tokens stood in the beginning, int64 ``(batch, tokens)``, after merging, as in `placed`."""
    return torch.cat([at.gather(1, match.staying), at[:, match.prefix :: 2]], dim=1)


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
    return _rows(x, where)


def comparing_flops(tokens: int, prefix: int, features: int) -> float:
    """FLOPs of `matching` for one sample: all similarities."""
    a, b = _sides(tokens, prefix)
    return 2.0 * a * b * features


def merging_flops(tokens: int, prefix: int, count: int, width: int) -> float:
    """FLOPs of `merged` for one sample: those that leave added up, and their sizes."""
    return 2.0 * _sides(tokens, prefix)[1] * count * (width + 1)


def _sides(tokens: int, prefix: int) -> tuple[int, int]:
    """How many tokens are in A and in B."""
    a = most_mergeable(tokens, prefix)
    return a, tokens - prefix - a


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Tokens ``(batch, n, width)`` of ``x`` that int64 ``index``, ``(batch, n)``, names in each sample."""
    first = x.shape[1] * torch.arange(x.shape[0], device=x.device)
    return F.embedding(first[:, None] + index, x.flatten(0, 1))


def _dealt(a: Tensor, b: Tensor) -> Tensor:
    """``(batch, tokens)`` of the tokens of A and B, in the order before they were dealt."""
    pairs = torch.stack([b[:, : a.shape[1]], a], dim=2).flatten(1)
    return torch.cat([pairs, b[:, a.shape[1] :]], dim=1)
