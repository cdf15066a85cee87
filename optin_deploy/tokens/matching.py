"""Token merging as plain tensor functions that export: shapes depend on counts, not on data.

Bipartite soft matching (Bolya et al., "Token Merging: Your ViT But Faster", ICLR 2023, section 3). The tokens after the
protected prefix (class, distillation and register tokens) are dealt in turn into sets A and B. The ``count`` tokens of
A that are most similar to one of B merge into it; averages are weighted by the number of tokens each one holds. Among
equals the earlier token merges. The result is ordered prefix, rest of A, B, each in its old order: in an order by
similarity, rounding would swap neighbours and so change A for the next merge.

Tokens are looked up as rows of a table, added by products with 0-1 matrices, and ranked by comparing all pairs. Every
runtime has fast lookups and products. Few have a fast scatter, and sorting leaves the order of equals open.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from optin_deploy.tokens.choices import Choice, choose


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
    """Return how many of ``tokens`` can merge at once: the size of A."""
    return (tokens - prefix) // 2


def match_tokens(metric: Tensor, prefix: int, count: int) -> Matching:
    """Match ``count`` tokens, at least 1 and at most `most_mergeable`, by the cosine of their ``metric``.

    Args:
        metric: ``(batch, tokens, features)``.
        prefix: number of protected tokens at the beginning.
    """
    return match_choice(choose(similarities(metric, prefix), count), metric.shape[1], prefix, count, metric.dtype)


def similarities(metric: Tensor, prefix: int) -> Tensor:
    """Return the cosines ``(batch, |A|, |B|)`` of the tokens after the ``prefix``, in float32 at least."""
    # In half precision most similar tokens would tie.
    exact = metric[:, prefix:].to(torch.promote_types(metric.dtype, torch.float32))
    directions = F.normalize(exact, dim=-1)
    # B gets the last of an odd number, so that every token of A has a neighbour on both sides.
    return directions[:, 1::2] @ directions[:, 0::2].transpose(1, 2)


def match_choice(choice: Choice, tokens: int, prefix: int, count: int, dtype: torch.dtype) -> Matching:
    """Return the matching of a choice of ``count`` tokens of A; ``tokens`` counts all, ``dtype`` is that of weights."""
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


def merge_tokens(x: Tensor, sizes: Tensor, match: Matching) -> tuple[Tensor, Tensor]:
    """Merge: return tokens ``(batch, tokens - count, width)`` and the number of tokens that each holds.

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


def merge_positions(places: Tensor, match: Matching) -> Tensor:
    """Return per-patch values ``(batch, patches, features)`` after merging; a merged token has the value of its B."""
    p = match.prefix
    return torch.cat([_rows(places, match.staying[:, p:] - p), places[:, 0::2]], dim=1)


def merge_original_positions(at: Tensor, match: Matching) -> Tensor:
    """Return the original positions, int64 ``(batch, tokens)``, of the tokens after merging."""
    return torch.cat([at.gather(1, match.staying), at[:, match.prefix :: 2]], dim=1)


def biases_between(biases: Tensor, at: Tensor) -> Tensor:
    """Return attention biases ``(batch, heads, tokens, tokens)`` between the remaining tokens.

    Args:
        biases: ``([1,] heads, places, places)``, from all queries to all keys.
        at: int64 ``(batch, tokens)``, the original position of each token.
    """
    # A table by pairs of positions: runtimes look up rows faster than they index by two tensors.
    pairs = at[:, :, None] * biases.shape[-1] + at[:, None, :]
    return F.embedding(pairs, biases.flatten(-2).flatten(0, -2).t()).permute(0, 3, 1, 2)


def unmerge_tokens(x: Tensor, where: Tensor) -> Tensor:
    """Return ``(batch, tokens, width)``: for each original token the one it was merged into.

    Args:
        where: int64 ``(batch, tokens)``, the token of ``x`` that holds each original token.
    """
    return _rows(x, where)


def matching_flops(tokens: int, prefix: int, features: int) -> float:
    """Return the FLOPs of `match_tokens` for one sample: all similarities."""
    a, b = _sides(tokens, prefix)
    return 2.0 * a * b * features


def merging_flops(tokens: int, prefix: int, count: int, width: int) -> float:
    """Return the FLOPs of `merge_tokens` for one sample."""
    return 2.0 * _sides(tokens, prefix)[1] * count * (width + 1)


def _sides(tokens: int, prefix: int) -> tuple[int, int]:
    """Return the sizes of A and B."""
    a = most_mergeable(tokens, prefix)
    return a, tokens - prefix - a


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """Return the tokens ``(batch, n, width)`` of ``x`` at int64 ``index``, ``(batch, n)``."""
    first = x.shape[1] * torch.arange(x.shape[0], device=x.device)
    return F.embedding(first[:, None] + index, x.flatten(0, 1))


def _dealt(a: Tensor, b: Tensor) -> Tensor:
    """Return values ``(batch, tokens)`` of A and B in the order before they were dealt."""
    pairs = torch.stack([b[:, : a.shape[1]], a], dim=2).flatten(1)
    return torch.cat([pairs, b[:, a.shape[1] :]], dim=1)
