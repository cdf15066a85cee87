"""Token merging in padded texts of any length: bipartite soft matching (see ``matching``) that respects padding.

Padding has size 0, leaves before any token does, and no token merges with it. The tokens after the protected prefix are
dealt in turn into sets A and B. Those of A that are most similar to one of B merge into it; averages are weighted by
the number of tokens that each one holds. The remaining tokens keep their order.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from optin_deploy.tokens.choices import BEYOND, Choice, choose


def match_text_tokens(metric: Tensor, sizes: Tensor, prefix: int, count: int) -> Tensor:
    """Return the position of each token after ``count`` have merged, by the cosine of their ``metric``.

    Args:
        metric: ``(batch, tokens, features)``, with at least two tokens after the prefix.
        sizes: ``(batch, tokens, 1)``, the number of original tokens in each; 0 at padding, not in the prefix.
        prefix: number of protected tokens at the beginning.
        count: at most half of the tokens after the prefix.

    Returns:
        int64 ``(batch, tokens)``.
    """
    real = real_text_tokens(sizes, prefix)
    return match_text_choice(choose(text_similarities(metric, real, prefix), count, real), real, prefix)


def real_text_tokens(sizes: Tensor, prefix: int) -> Tensor:
    """Return bool ``(batch, n)``, False at padding, for the n tokens after the prefix."""
    return sizes[:, prefix:, 0] > 0


def text_similarities(metric: Tensor, real: Tensor, prefix: int) -> Tensor:
    """Return the cosines ``(batch, n, n)`` of the n tokens after the ``prefix``, in float32 at least.

    They are -2 for pairs that cannot merge: from B, into A, and into padding.
    """
    # In half precision most similar tokens would tie.
    exact = metric[:, prefix:].to(torch.promote_types(metric.dtype, torch.float32))
    directions = F.normalize(exact, dim=-1)
    index = torch.arange(directions.shape[1], device=metric.device)
    in_a = index % 2 == 1
    possible = in_a[:, None] & ~in_a & real[:, None, :]
    return (directions @ directions.transpose(1, 2)).masked_fill(~possible, -BEYOND)


def match_text_choice(choice: Choice, real: Tensor, prefix: int) -> Tensor:
    """Return `match_text_tokens` for a choice among the tokens after the prefix."""
    leaves, nearest = choice.leaves, choice.nearest
    index = torch.arange(leaves.shape[1], device=leaves.device)
    staying = (~leaves[:, None, :] & (index < index[:, None])).sum(-1)
    moved = torch.where(leaves, staying.gather(1, nearest), staying)
    # Padding has size 0, so its position does not matter.
    moved = torch.where(leaves & ~real, 0, moved + prefix)
    before = torch.arange(prefix, device=leaves.device).expand(moved.shape[0], -1)
    return torch.cat([before, moved], dim=1)


def merge_text_tokens(x: Tensor, sizes: Tensor, moved: Tensor, left: int) -> tuple[Tensor, Tensor]:
    """Merge: return tokens ``(batch, left, width)`` and the number of original tokens in each.

    Args:
        x: ``(batch, tokens, width)``.
        sizes: ``(batch, tokens, 1)``.
        moved: the result of `match_text_tokens`.
    """
    joining = (moved[:, None, :] == torch.arange(left, device=x.device)[:, None]).to(x.dtype)
    together = joining @ sizes
    return joining @ (x * sizes) / together.clamp_min(1), together


def text_matching_flops(tokens: int, prefix: int, features: int) -> float:
    """Return the FLOPs of `match_text_tokens` for one sample: all similarities."""
    return 2.0 * (tokens - prefix) ** 2 * features


def text_merging_flops(tokens: int, count: int, width: int) -> float:
    """Return the FLOPs of `merge_text_tokens` for one sample."""
    return 2.0 * (tokens - count) * tokens * (width + 1) if count else 0.0
