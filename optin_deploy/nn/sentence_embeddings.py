"""Sentence embeddings: pooling and projection of token features, and similarity of two embeddings.

The arithmetic is that of the sentence-transformers library (Reimers and Gurevych, 2019).
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

logger = logging.getLogger(__name__)
FEATURES = "last_hidden_state"
"""The output of an encoder that is pooled."""
EMBEDDING = "sentence_embedding"
"""The name of the pooled output."""
PoolingMode = Literal["cls", "max", "mean", "mean_sqrt_len_tokens", "weightedmean", "lasttoken"]
Similarity = Literal["cosine", "dot", "euclidean", "manhattan"]


class Pooling(nn.Module):
    """Pools token features ``(batch, tokens, width)`` to one vector per text, ``(batch, modes × width)``.

    Args:
        modes: Pooling modes, whose vectors are concatenated.
        skipped_tokens: How many tokens at the beginning do not count: those of a prompt that is not pooled.
    """

    def __init__(self, modes: Sequence[PoolingMode], skipped_tokens: int = 0) -> None:
        super().__init__()
        self.modes, self.skipped_tokens = tuple(modes), skipped_tokens

    def forward(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Pool ``features``. ``mask`` ``(batch, tokens)`` is 0 at padding after the text, None if all tokens count."""
        valid = torch.ones_like(features[..., 0]) if mask is None else mask.to(features.dtype)
        position = torch.arange(features.shape[1], device=features.device)[None]
        if self.skipped_tokens:
            valid = valid * (position >= self.skipped_tokens).to(valid.dtype)
        return torch.cat([_pool(mode, features, valid, position) for mode in self.modes], dim=-1)


def _pool(mode: PoolingMode, features: Tensor, valid: Tensor, position: Tensor) -> Tensor:
    if mode == "max":
        return features.masked_fill(valid[..., None] == 0, -torch.inf).amax(1)
    if mode in ("cls", "lasttoken"):
        # The first or the last token that counts.
        rank = valid if mode == "cls" else position.to(valid.dtype) * valid
        index = rank.argmax(1, keepdim=True)
        return features.gather(1, index[..., None].expand(-1, -1, features.shape[-1]))[:, 0]
    weights = valid * (position + 1).to(valid.dtype) if mode == "weightedmean" else valid
    total, count = (features * weights[..., None]).sum(1), weights.sum(1, keepdim=True).clamp(min=1e-9)
    return total / (count.sqrt() if mode == "mean_sqrt_len_tokens" else count)


class Dense(nn.Module):
    """A linear layer, an activation and, if ``residual`` is set, the input or a projection of it added."""

    def __init__(self, inputs: int, outputs: int, activation: nn.Module, *, bias: bool, residual: bool) -> None:
        super().__init__()
        self.linear = nn.Linear(inputs, outputs, bias=bias)
        self.activation = activation
        self.adds_input = residual
        self.residual = nn.Linear(inputs, outputs, bias=False) if residual and inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, inputs)`` to ``(batch, outputs)``."""
        y: Tensor = self.activation(self.linear(x))
        if not self.adds_input:
            return y
        return y + (x if self.residual is None else self.residual(x))


class LayerNorm(nn.Module):
    """A layer norm with the parameter names of sentence-transformers."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, width)`` to the same shape."""
        normed: Tensor = self.norm(x)
        return normed


class Normalize(nn.Module):
    """Scales vectors to length 1."""

    def forward(self, x: Tensor) -> Tensor:
        """``(batch, width)`` to the same shape."""
        return F.normalize(x, dim=-1)


class SentenceHead(nn.Module):
    """The layers after an encoder: pooling in float32 at least, then the layers of the model."""

    def __init__(self, pooling: Pooling, layers: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.pooling, self.layers = pooling, nn.Sequential(*layers)

    def forward(self, features: Tensor, mask: Tensor | None) -> Tensor:
        """Token features ``(batch, tokens, width)`` to embeddings ``(batch, size)`` of the same type."""
        low = features.dtype in (torch.float16, torch.bfloat16)
        pooled = self.pooling(features.float() if low else features, mask).to(features.dtype)
        embedding: Tensor = self.layers(pooled)
        return embedding


@dataclass(frozen=True)
class Sentences:
    """How a network makes sentence embeddings, and how they are compared.

    Attributes:
        head: In eval mode, on the CPU, in float32.
        files: Name -> content of the sentence-transformers files that define it; none for a plain encoder.
    """

    head: SentenceHead = field(default_factory=lambda: SentenceHead(Pooling(["mean"])).eval())
    similarity: Similarity = "cosine"
    files: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def is_default(self) -> bool:
        """Whether no file defines it: the mean over tokens, compared by cosine."""
        return not self.files


def tell_default(name: str) -> None:
    """Log that no file defines the sentence embeddings of the network ``name``."""
    logger.warning(
        "%s has no modules.json of sentence-transformers: its sentence embeddings are the mean over tokens, compared "
        "by cosine",
        name,
    )


def similarity(kind: Similarity, a: Tensor, b: Tensor) -> Tensor:
    """Return the similarity ``(n,)`` of the rows of two matrices ``(n, size)``; distances are negated."""
    if kind == "cosine":
        return (F.normalize(a, dim=-1) * F.normalize(b, dim=-1)).sum(-1)
    if kind == "dot":
        return (a * b).sum(-1)
    return -torch.linalg.vector_norm(a - b, ord=2 if kind == "euclidean" else 1, dim=-1)
