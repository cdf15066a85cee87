"""Masks on units: forward pre-hooks on the projection behind them. Slicing is held against them, scores use them."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.structure.groups import Group, Structure


@contextmanager
def masked(module: nn.Module, structure: Structure, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the activations of units by ``masks`` while the context lasts.

    Args:
        masks: group name -> factors, of shape ``(units,)`` or, for several copies of a batch stacked along the first
            axis, ``(copies, units)``. Gradients flow into them: the gradient of a loss for a factor is the sum over
            tokens of gradient times activation.
    """
    with ExitStack() as stack:
        for name, mask in masks.items():
            group = structure.group(name)
            place = module.get_submodule(group.mask_at or group.output)
            stack.callback(place.register_forward_pre_hook(_hook(group, mask)).remove)
            if group.norm_over_units is not None:
                norm = module.get_submodule(group.norm_over_units)
                stack.callback(norm.register_forward_pre_hook(_hook(group, mask)).remove)
            if group.kind == "width":
                stack.enter_context(masked_queries(module, group, mask))
        yield


@contextmanager
def masked_queries(module: nn.Module, group: Group, mask: Tensor) -> Iterator[None]:
    """Multiply the dimensions of all heads' queries by ``mask`` (as for `masked`) while the context lasts."""
    assert group.qkv is not None
    rows = group.qkv.queries

    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        part = rows.of(output.shape[-1])
        factors = _tiled(mask, part.stop - part.start)
        before, after = factors.new_ones(part.start), factors.new_ones(output.shape[-1] - part.stop)
        wide = [before.expand(*factors.shape[:-1], -1), factors, after.expand(*factors.shape[:-1], -1)]
        return _multiplied(output, torch.cat(wide, dim=-1), -1)

    handle = module.get_submodule(rows.module).register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def _hook(group: Group, mask: Tensor) -> Any:
    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        features = _tiled(mask.repeat_interleave(group.width, dim=-1), x.shape[group.axis])
        return (_multiplied(x, features, group.axis), *args[1:])

    return hook


def _tiled(mask: Tensor, features: int) -> Tensor:
    """``mask`` repeated along its last axis to so many features: the width of heads is masked in each head alike."""
    return mask.repeat(*[1] * (mask.dim() - 1), features // mask.shape[-1])


def _multiplied(x: Tensor, features: Tensor, axis: int) -> Tensor:
    """``x`` times ``(features,)`` along ``axis``, or ``(copies, features)`` where copies of a batch are stacked."""
    along = [1] * x.dim()
    along[axis] = -1
    if features.dim() == 1:
        return x * features.reshape(along)
    copies = features.shape[0]
    stacked = x.reshape(copies, -1, *x.shape[1:]) * features.reshape(copies, *along)
    return stacked.reshape(x.shape)
