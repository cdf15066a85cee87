"""Attentions of timm whose own forward requires that all heads together are as wide as the input.

When heads are removed, each gets a subclass that computes the same and takes the width from its weights.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import apply_rot_embed_cat
from timm.models import beit, cait, eva, pvt_v2, swin_transformer_v2, twins, xcit
from torch import Tensor, nn


def _split(x: Tensor, heads: int) -> Tensor:
    """Return ``(…, tokens, heads · width)`` as ``(…, heads, tokens, width)``."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def _join_heads(x: Tensor) -> Tensor:
    return x.transpose(-2, -3).flatten(-2)


def _fused(module: Any, x: Tensor) -> list[Tensor]:
    """Return queries, keys and values ``(…, heads, tokens, width)``. Their biases are parameters of the attention."""
    if getattr(module, "q_bias", None) is None:
        qkv = module.qkv(x)
    else:
        bias = torch.cat((module.q_bias, module.k_bias, module.v_bias))
        separate = getattr(module, "qkv_bias_separate", False)
        qkv = module.qkv(x) + bias if separate else F.linear(x, module.qkv.weight, bias)
    return [_split(part, module.num_heads) for part in qkv.chunk(3, -1)]


def _project(module: Any, x: Tensor) -> Tensor:
    projected: Tensor = module.proj_drop(module.proj(x))
    return projected


def _pool(module: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Return the tokens for keys and values, fewer of them if there is a convolution."""
    if module.sr is None:
        return x
    x = x.transpose(1, 2).unflatten(2, tuple(size))
    pool = getattr(module, "pool", None)
    x = module.norm(module.sr(x if pool is None else pool(x)).flatten(2).transpose(1, 2))
    return x if pool is None else module.act(x)


def _attend_to_fewer(module: Any, x: Tensor, size: tuple[int, int]) -> Tensor:
    """Attend to fewer keys and values than queries."""
    q = _split(module.q(x), module.num_heads)
    k, v = (_split(part, module.num_heads) for part in module.kv(_pool(module, x, size)).chunk(2, -1))
    return _project(module, _join_heads(F.scaled_dot_product_attention(q, k, v, scale=module.scale)))


class BeitAttention(beit.Attention):
    """Attention with biases of relative positions, its own and shared ones."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        return self.attend(x, self.biases(shared_rel_pos_bias))

    def biases(self, shared: Tensor | None) -> Tensor | None:
        """Return the biases ``(1, heads, tokens, tokens)`` of all queries for all keys."""
        if self.relative_position_bias_table is None:
            return shared
        own: Tensor = self._get_rel_pos_bias()
        return own if shared is None else own + shared

    def attend(self, x: Tensor, biases: Tensor | None) -> Tensor:
        q, k, v = _fused(self, x)
        return _project(self, _join_heads(F.scaled_dot_product_attention(q, k, v, biases, scale=self.scale)))


class PlacedBeitAttention(BeitAttention):
    """`BeitAttention` that only uses the biases it is called with, because its tokens have changed positions."""

    def forward(self, x: Tensor, shared_rel_pos_bias: Tensor | None = None) -> Tensor:
        return self.attend(x, shared_rel_pos_bias)


class EvaAttention(eva.EvaAttention):
    """Attention with rotary positions, norms of queries and keys, and a gate."""

    def forward(
        self, x: Tensor, rope: Tensor | None = None, attn_mask: Tensor | None = None, is_causal: bool = False
    ) -> Tensor:
        if self.qkv is not None:
            q, k, v = _fused(self, x)
        else:
            q, k, v = (_split(layer(x), self.num_heads) for layer in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = (self._turned(part, rope).type_as(v) for part in (q, k))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask, is_causal=is_causal, scale=self.scale)
        attended = self.norm(_join_heads(attended))
        gate = getattr(self, "gate", None)
        return _project(self, attended if gate is None else attended * gate(x).sigmoid())

    def _turned(self, part: Tensor, rope: Tensor) -> Tensor:
        before, turning = part.tensor_split((self.num_prefix_tokens,), dim=-2)
        half = {"half": True} if getattr(self, "rotate_half", False) else {}
        return torch.cat((before, apply_rot_embed_cat(turning, rope, **half)), dim=-2)


class SwinV2Attention(swin_transformer_v2.WindowAttention):
    """Cosine attention with biases that a small network computes from relative positions."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = _fused(self, x)
        tokens = x.shape[-2]
        attention = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
        attention = attention * self.logit_scale.clamp(max=math.log(100.0)).exp()
        table = self.cpb_mlp(self.relative_coords_table).flatten(0, -2)[self.relative_position_index.flatten()]
        bias = 16 * table.unflatten(0, (tokens, tokens)).permute(2, 0, 1).sigmoid()
        attention = attention + bias
        if mask is not None:
            windows = attention.unflatten(0, (-1, len(mask))) + mask[:, None]
            attention = windows.flatten(0, 1)
        return _project(self, _join_heads(self.attn_drop(attention.softmax(-1)) @ v))


class PvtAttention(pvt_v2.Attention):
    """Attention with fewer keys and values than queries."""

    def forward(self, x: Tensor, feat_size: tuple[int, int]) -> Tensor:
        return _attend_to_fewer(self, x, feat_size)


class TwinsGlobalAttention(twins.GlobalSubSampleAttn):
    """Attention with fewer keys and values than queries."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        return _attend_to_fewer(self, x, size)


class TwinsLocalAttention(twins.LocallyGroupedAttn):
    """Attention inside windows of ``ws`` pixels. The map is padded to whole windows."""

    def forward(self, x: Tensor, size: tuple[int, int]) -> Tensor:
        (height, width), side = size, self.ws
        padded = F.pad(x.unflatten(1, (height, width)), (0, 0, 0, -width % side, 0, -height % side))
        rows, columns = padded.shape[1] // side, padded.shape[2] // side
        windows = padded.unflatten(2, (columns, side)).unflatten(1, (rows, side)).transpose(2, 3).flatten(3, 4)
        q, k, v = _fused(self, windows)
        attended = _join_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scale))
        joined = attended.unflatten(3, (side, side)).transpose(2, 3).flatten(3, 4).flatten(1, 2)
        return _project(self, joined[:, :height, :width].flatten(1, 2))


class CrossCovarianceAttention(xcit.XCA):
    """Attention between the dimensions of a head, not between tokens."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.transpose(-2, -1) for part in _fused(self, x))
        attention = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1) * self.temperature
        attended = self.attn_drop(attention.softmax(-1)) @ v
        return _project(self, _join_heads(attended.transpose(-2, -1)))


class ClassAttention(cait.ClassAttn):
    """Attention of the first token only."""

    def forward(self, x: Tensor) -> Tensor:
        q = _split(self.q(x[:, 0]).unsqueeze(1), self.num_heads)
        k, v = _split(self.k(x), self.num_heads), _split(self.v(x), self.num_heads)
        return _project(self, _join_heads(F.scaled_dot_product_attention(q, k, v, scale=self.scale)))


RESIZABLE: dict[type[nn.Module], type[nn.Module]] = {
    cls.__mro__[1]: cls
    for cls in (
        BeitAttention,
        EvaAttention,
        SwinV2Attention,
        PvtAttention,
        TwinsGlobalAttention,
        TwinsLocalAttention,
        CrossCovarianceAttention,
        ClassAttention,
    )
}

# Attention class with biases between positions -> its class for tokens that merge.
PLACED: dict[type[nn.Module], type[PlacedBeitAttention]] = {
    beit.Attention: PlacedBeitAttention,
    BeitAttention: PlacedBeitAttention,
}
