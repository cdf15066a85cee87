"""torch's own attention.

``nn.MultiheadAttention`` uses its weights without calling its modules, and the fast path of
``nn.TransformerEncoderLayer`` calls neither. So it is replaced by `Attention`, which has the same parameters and
computes the same through four linear layers. At padding, where the fast path of ``nn.TransformerEncoder`` returns
zeros, the output is what its layers compute, as in training and in an exported file.
"""

from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy.nn.batches import PyTree
from optin_deploy.nn.copies import copy_module, shared_tensors
from optin_deploy.nn.names import join
from optin_deploy.structure.adapters.registry import adapter
from optin_deploy.structure.groups import (
    CostModules,
    Group,
    LayerAxis,
    LeftDense,
    OutputSlice,
    Placeholder,
    Projections,
    TensorAxis,
)
from optin_deploy.structure.slicing import change_class


class Attention(nn.Module):
    """An ``nn.MultiheadAttention`` with linear layers for queries, keys, values and output.

    Its parameters are views of the original's. It is called in the same way and returns the same.
    """

    # torch's encoder layers read these before they take their fast path, which needs packed weights.
    in_proj_weight = in_proj_bias = None
    _qkv_same_embed_dim = True

    def __init__(self, dense: nn.MultiheadAttention) -> None:
        super().__init__()
        packed: Any = dense.in_proj_weight
        weights = (dense.q_proj_weight, dense.k_proj_weight, dense.v_proj_weight) if packed is None else packed.chunk(3)
        biases = (None,) * 3 if dense.in_proj_bias is None else dense.in_proj_bias.chunk(3)
        self.q_proj, self.k_proj, self.v_proj = (_linear(w, b) for w, b in zip(weights, biases, strict=True))
        self.out_proj = _linear(dense.out_proj.weight, dense.out_proj.bias)
        self.num_heads, self.head_dim, self.embed_dim = dense.num_heads, dense.head_dim, dense.embed_dim
        self.scale = dense.head_dim**-0.5
        self.dropout, self.batch_first = dense.dropout, dense.batch_first
        self.dense_heads = dense.num_heads
        # The heads left of the dense module, because masks may differ between heads.
        self.register_buffer("heads", torch.arange(dense.num_heads, device=weights[0].device), persistent=False)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """See ``nn.MultiheadAttention``. ``is_causal`` only describes ``attn_mask`` and is ignored."""
        if not isinstance(self.out_proj, nn.Linear):
            # No head is left.
            return self.out_proj(query), None
        single = query.dim() == 2
        if single:
            query, key, value = (x.unsqueeze(0) for x in (query, key, value))
            key_padding_mask = None if key_padding_mask is None else key_padding_mask.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = (self._split(x) for x in (self.q_proj(query), self.k_proj(key), self.v_proj(value)))
        mask = self._mask(attn_mask, key_padding_mask, q)
        weights, dropout = None, self.dropout if self.training else 0.0
        if need_weights:
            logits = q @ k.transpose(-2, -1) * self.scale
            weights = F.dropout((logits if mask is None else logits + mask).softmax(-1), dropout)
            attended = weights @ v
            weights = weights.mean(1) if average_attn_weights else weights
        else:
            attended = F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=self.scale)
        output = self.out_proj(attended.transpose(1, 2).flatten(2))
        if single:
            return output[0], None if weights is None else weights[0]
        return output if self.batch_first else output.transpose(0, 1), weights

    def _split(self, features: Tensor) -> Tensor:
        return features.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)

    def _mask(self, of_pairs: Tensor | None, of_keys: Tensor | None, like: Tensor) -> Tensor | None:
        """Return the mask to add to the logits ``(batch, heads, queries, keys)``, broadcast; None if there is none."""
        mask = None
        if of_pairs is not None:
            mask = _additive(of_pairs, like)
            if mask.dim() == 3:
                mask = mask.unflatten(0, (-1, self.dense_heads))[:, self.heads]
        if of_keys is not None:
            keys = _additive(of_keys, like)[:, None, None]
            mask = keys if mask is None else mask + keys
        return mask


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=weight.requires_grad)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=bias.requires_grad)
    return layer


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask.to(like.dtype)
    return torch.zeros_like(mask, dtype=like.dtype).masked_fill(mask, float("-inf"))


def replace_torch_attention(module: nn.Module) -> nn.Module:
    """Return a copy of ``module`` that shares its tensors, with `Attention` instead of torch's; itself without any."""
    plain = [m for m in module.modules() if _is_plain(m)]
    if not plain:
        return module
    memo = shared_tensors(module)
    # A module with several names is one module in the copy, too.
    memo |= {id(m): Attention(m).train(m.training) for m in plain}
    replaced = copy_module(module, memo)
    for child in replaced.modules():
        if isinstance(child, nn.TransformerEncoder):
            child.use_nested_tensor = False
    return _with_samples_first(replaced)


class _Encoder(nn.TransformerEncoder):
    """Takes and returns sequences first, and runs its layers with samples first."""

    def forward(self, src: Tensor, *args: PyTree, **kwargs: PyTree) -> Tensor:
        return super().forward(src.transpose(0, 1), *args, **kwargs).transpose(0, 1)


class _Decoder(nn.TransformerDecoder):
    """Takes and returns sequences first, and runs its layers with samples first."""

    def forward(self, tgt: Tensor, memory: Tensor, *args: PyTree, **kwargs: PyTree) -> Tensor:
        return super().forward(tgt.transpose(0, 1), memory.transpose(0, 1), *args, **kwargs).transpose(0, 1)


_SAMPLES_FIRST: dict[type[nn.Module], type[nn.Module]] = {
    nn.TransformerEncoder: _Encoder,
    nn.TransformerDecoder: _Decoder,
}


def _with_samples_first(module: nn.Module) -> nn.Module:
    """Return ``module`` with stacks of layers that run with samples first, as masks on units require.

    The module is changed in place, unless it is a stack itself.
    """
    made: dict[int, nn.Module] = {}
    for name, child in list(module.named_modules(remove_duplicate=False)):
        attentions = [m for m in child.modules() if isinstance(m, Attention)]
        if id(child) not in made:
            if type(child) not in _SAMPLES_FIRST or not attentions or any(m.batch_first for m in attentions):
                continue
            made[id(child)] = change_class(child, _SAMPLES_FIRST[type(child)])
            for attention in attentions:
                attention.batch_first = True
        if not name:
            module = made[id(child)]
        else:
            module.set_submodule(name, made[id(child)])
    return module


def _is_plain(attention: nn.Module) -> TypeGuard[nn.MultiheadAttention]:
    """Return whether ``attention`` is torch's own class, without learned keys and values."""
    return type(attention) is nn.MultiheadAttention and attention.bias_k is None and not attention.add_zero_attn


@adapter
def attention(name: str, module: nn.Module, parent_name: str, parent: nn.Module) -> Group | LeftDense | None:
    """Heads of ``torch.nn.MultiheadAttention``, self- or cross-attention, in ``torch.nn.Transformer`` or elsewhere."""
    if isinstance(module, nn.MultiheadAttention):
        if _is_plain(module):
            return LeftDense(name, "computes past its modules: make the network by custom_network, which mends that")
        return LeftDense(name, "is a subclass, or has keys and values of its own (bias_k, add_zero_attn)")
    if type(module) is not Attention or not isinstance(module.out_proj, nn.Linear):
        return None
    queries, keys, values, output = (join(name, n) for n in ("q_proj", "k_proj", "v_proj", "out_proj"))
    passes: list[tuple[str, Placeholder]] = [(n, "pass") for n in (queries, keys, values)]
    return Group(
        name=name,
        kind="head",
        units=module.num_heads,
        width=module.head_dim,
        output=output,
        sides=(*(LayerAxis(n, "out") for n in (queries, keys, values)), LayerAxis(output, "in")),
        cost=CostModules((name,)),
        placeholders=(*passes, (output, "constant")),
        attributes=((name, "num_heads"),),
        qkv=Projections(OutputSlice(queries), OutputSlice(keys), OutputSlice(values)),
        entries=(TensorAxis(join(name, "heads"), 0),),
    )
