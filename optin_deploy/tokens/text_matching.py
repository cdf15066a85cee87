"""Merging the words of texts, of any length and padded: bipartite soft matching (see ``tokens``) that minds padding.

Padding stands for no token: its size is 0, it leaves before any word does, and no word merges with it. The words behind
the protected prefix are dealt in turn into sets A and B, and those of A that are most similar to a word of B merge into
it, averages being weighted by how many words each stands for. What is left keeps its order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from optin_deploy.tokens.choices import BEYOND, Choice, chosen


def word_matching(metric: Tensor, sizes: Tensor, prefix: int, count: int) -> Tensor:
    """Where each token is when ``count`` are gone: int64 ``(batch, tokens)``, by the cosine of their ``metric``.

    Args:
        metric: ``(batch, tokens, features)``; there are two tokens behind the prefix at least.
        sizes: ``(batch, tokens, 1)``, how many words each token stands for; 0 at padding, which the prefix has none of.
        prefix: so many tokens at the beginning are protected.
        count: at most half of those behind the prefix.
    """
    real = real_words(sizes, prefix)
    return words_matched(chosen(word_similarities(metric, real, prefix), count, real), real, prefix)


def real_words(sizes: Tensor, prefix: int) -> Tensor:
    """Bool ``(batch, n)``, of the n tokens behind the prefix those that are no padding."""
    return sizes[:, prefix:, 0] > 0


def word_similarities(metric: Tensor, real: Tensor, prefix: int) -> Tensor:
    """Cosines ``(batch, n, n)`` of the n tokens behind the ``prefix``, in float32 at least; -2 where a token cannot
    merge into another, that is, from B, into A and into padding."""
    # In half precision most similar words would tie.
    exact = metric[:, prefix:].to(torch.promote_types(metric.dtype, torch.float32))
    directions = F.normalize(exact, dim=-1)
    index = torch.arange(directions.shape[1], device=metric.device)
    in_a = index % 2 == 1
    possible = in_a[:, None] & ~in_a & real[:, None, :]
    return (directions @ directions.transpose(1, 2)).masked_fill(~possible, -BEYOND)


def words_matched(choice: Choice, real: Tensor, prefix: int) -> Tensor:
    """What `word_matching` gives, of a choice among the tokens behind the prefix."""
    leaves, nearest = choice.leaves, choice.nearest
    index = torch.arange(leaves.shape[1], device=leaves.device)
    staying = (~leaves[:, None, :] & (index < index[:, None])).sum(-1)
    moved = torch.where(leaves, staying.gather(1, nearest), staying)
    # Padding adds nothing wherever it goes.
    moved = torch.where(leaves & ~real, 0, moved + prefix)
    before = torch.arange(prefix, device=leaves.device).expand(moved.shape[0], -1)
    return torch.cat([before, moved], dim=1)


def words_merged(x: Tensor, sizes: Tensor, moved: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """Tokens ``(batch, left, width)`` after merging, and how many words each stands for.

    Args:
        x: ``(batch, tokens, width)``.
        sizes: ``(batch, tokens, 1)``.
        moved: what `word_matching` gave.
    """
    joining = (moved[:, None, :] == torch.arange(left, device=x.device)[:, None]).to(x.dtype)
    together = joining @ sizes
    return joining @ (x * sizes) / together.clamp_min(1), together


def word_comparing_flops(tokens: int, prefix: int, features: int) -> float:
    """FLOPs of `word_matching` for one sample: all similarities."""
    return 2.0 * (tokens - prefix) ** 2 * features


def word_merging_flops(tokens: int, count: int, width: int) -> float:
    """FLOPs of `words_merged` for one sample."""
    return 2.0 * (tokens - count) * tokens * (width + 1) if count else 0.0
