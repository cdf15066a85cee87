"""Attentions with an output projection ``proj`` and projections to queries, keys and values.

timm's attentions and those built like them: one projection for all three, for keys and values, or for each; linear
layers or 1×1 convolutions, followed by batch norms; gates; tables of relative positions, temperatures and other tensors
with an entry for each head.
"""

from collections.abc import Collection, Iterator, Sequence

import timm.layers
from torch import Tensor, nn

from optin_deploy.nn.names import join
from optin_deploy.structure.adapters.feed_forward import is_map, map_sizes
from optin_deploy.structure.adapters.registry import adapter
from optin_deploy.structure.adapters.resizable_attention import RESIZABLE
from optin_deploy.structure.groups import CostModules, Group, LayerAxis, LeftDense, OutputSlice, Projections, TensorAxis
from optin_deploy.structure.partial_norms import can_shrink

_HEADS = ("num_heads", "heads")
# Attributes that store the width of all heads together.
_WIDTHS = ("attn_dim", "kv_dim", "dim_out", "key_attn_dim", "val_attn_dim")
# How many of queries, keys and values a projection of that name returns.
_PARTS = {"qkv": 3, "kv": 2, "q": 1, "k": 1, "v": 1, "q_proj": 1, "k_proj": 1, "v_proj": 1, "gate": 1}
_BIASES = ("q_bias", "k_bias", "v_bias")


@adapter
def attention(name: str, module: nn.Module, parent_name: str, parent: nn.Module) -> Group | LeftDense | None:
    """Heads of an attention with ``num_heads``, ``qkv`` (or ``q`` and ``kv``, or one each) and ``proj``."""
    heads = next((h for h in _HEADS if isinstance(getattr(module, h, None), int)), None)
    inputs = {n: layers for n in _PARTS if (layers := list(_maps_of(module, n)))}
    outputs = list(_maps_of(module, "proj"))
    if heads is None or len(outputs) != 1 or not {"qkv", "kv", "v", "v_proj"} & inputs.keys():
        return None
    output, projection = outputs[0]
    number = getattr(module, "num_kv_heads", None) or getattr(module, heads)
    attributes = [heads] + ["num_kv_heads"] * hasattr(module, "num_kv_heads")
    features = map_sizes(projection)[0]
    if reason := _reason(module, getattr(module, heads), features):
        return LeftDense(name, reason)
    sides: list[LayerAxis] = []
    for child, layers in inputs.items():
        for layer_name, layer in layers:
            outputs_of_layer = map_sizes(layer)[1]
            if outputs_of_layer % number:
                return LeftDense(name, f"{layer_name} gives {outputs_of_layer} features for {number} heads")
            in_parts = outputs_of_layer == _PARTS[child] * features and not getattr(module, "head_first", False)
            widths = () if in_parts else (outputs_of_layer // number,)
            norms = [n for n, m in _inside(module, child) if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
            sides += [LayerAxis(join(name, n), "out", widths) for n in (layer_name, *norms)]
    sides.insert(1, LayerAxis(join(name, output), "in"))
    sides += _maps_to_heads(name, module, number, {*inputs, "proj"})
    excluded = tuple(_excluded(name, module, sides, features // getattr(module, heads)))
    norm = _mixing(module)
    plain = type(module) is timm.layers.Attention and _is_plain(module)
    return Group(
        name=name,
        kind="head",
        units=number,
        width=features // number,
        output=join(name, output),
        sides=tuple(sides),
        cost=CostModules((name,), excluded=excluded),
        # Without heads, a placeholder would also remove the excluded modules, but their cost does not depend on heads.
        placeholders=() if excluded else ((name, "constant"),),
        attributes=(*((name, a) for a in attributes), *_attributes(name, module)),
        axis=1 if isinstance(projection, nn.Conv2d) else -1,
        qkv=_fused(name, join(name, "qkv")) if plain else None,
        entries=tuple(_entries(name, module, number, features, {*inputs, "proj"})),
        resizable=RESIZABLE.get(type(module)),
        norm_over_units=join(name, norm) if norm is not None else None,
    )


def _inside(module: nn.Module, child: str) -> list[tuple[str, nn.Module]]:
    holder = getattr(module, child, None)
    return [(join(child, n), m) for n, m in holder.named_modules()] if isinstance(holder, nn.Module) else []


def _maps_of(module: nn.Module, child: str) -> Iterator[tuple[str, nn.Module]]:
    return ((n, m) for n, m in _inside(module, child) if is_map(m))


def _reason(module: nn.Module, heads: int, features: int) -> str | None:
    """Return why heads cannot be removed from the attention, None if its modules show no reason."""
    mixing = [n for n, m in module.named_modules() if is_map(m) and map_sizes(m) == (heads, heads)]
    if mixing:
        return f"{mixing[0]} mixes the heads (talking heads)"
    if (norm := _mixing(module)) and not can_shrink(module.get_submodule(norm)):
        return "a norm over all heads comes before the output projection (scale_norm)"
    return f"{features} features for {heads} heads" if features % heads else None


def _mixing(module: nn.Module) -> str | None:
    """Return the name of the norm over all heads, None without one. A norm before keys and values does not count."""
    norm = getattr(module, "norm", None)
    held = isinstance(norm, nn.Module) and any(True for _ in norm.parameters())
    return "norm" if held and not hasattr(module, "sr") else None


def _attributes(name: str, module: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield attributes proportional to the number of heads, in the attention or in modules that compute its biases."""
    for child, layer in module.named_modules():
        for attribute in (*_WIDTHS, "bias_shape", *(_HEADS if child else ())):
            if isinstance(getattr(layer, attribute, None), int | tuple):
                yield join(name, child), attribute


def _maps_to_heads(name: str, module: nn.Module, heads: int, projections: Collection[str]) -> list[LayerAxis]:
    """Return the maps other than the projections that return a number for each head."""
    maps = [(n, m) for n, m in module.named_modules() if is_map(m) and n.split(".")[0] not in projections]
    return [LayerAxis(join(name, n), "out", (1,)) for n, m in maps if map_sizes(m)[1] == heads]


def _excluded(name: str, module: nn.Module, sides: Sequence[LayerAxis], width: int) -> Iterator[str]:
    """Yield the layers that are not sliced, like a convolution that pools the input of keys.

    A convolution over the dimensions of a head runs for each head and is not among them.
    """
    cut = {side.module for side in sides}
    for child, layer in module.named_modules():
        for_each_head = isinstance(layer, nn.Conv2d) and layer.in_channels == width
        if isinstance(layer, nn.Linear | nn.Conv2d) and join(name, child) not in cut and not for_each_head:
            yield join(name, child)


def _entries(
    name: str, module: nn.Module, heads: int, features: int, projections: Collection[str]
) -> Iterator[TensorAxis]:
    """Yield other tensors with entries for each head: separate biases, tables, temperatures."""
    for bias in _BIASES:
        if isinstance(getattr(module, bias, None), Tensor):
            yield TensorAxis(join(name, bias), 0, (features // heads,))
    for child, layer in module.named_modules():
        if is_map(layer) or child.split(".")[0] in projections:
            continue
        for parameter, tensor in layer.named_parameters(recurse=False):
            # The last dimension of several, because tables have one row for each position.
            dims = [dim for dim in reversed(range(tensor.dim())) if tensor.shape[dim] == heads]
            if tensor.dim() > 1 and dims:
                yield TensorAxis(join(name, child, parameter), dims[0])


def _fused(name: str, qkv: str) -> Projections:
    queries, keys, values = (OutputSlice(qkv, part, 3) for part in range(3))
    return Projections(queries, keys, values, scale=(name, "scale"))


def _is_plain(attention: nn.Module) -> bool:
    """Return whether only products come between queries, keys, values and the output projection."""
    norms = [getattr(attention, n, None) for n in ("q_norm", "k_norm", "norm")]
    return all(isinstance(n, nn.Identity | None) for n in norms) and getattr(attention, "gate", None) is None
