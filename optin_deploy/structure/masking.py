"""Mask units with hooks on the projection after them, for scoring and to verify slicing."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn

from optin_deploy.nn.hooks import Args, Hook, Kwargs, forward_hooks
from optin_deploy.structure.groups import Group, Structure, projections


@contextmanager
def mask_units(module: nn.Module, structure: Structure, masks: Mapping[str, Tensor]) -> Iterator[None]:
    """Multiply the activations of units by ``masks`` while the context lasts.

    Args:
        masks: Group name -> factors ``(units,)``, or ``(copies, units)`` for copies of a batch stacked along the first
            axis. They receive gradients: that of a factor is the sum over tokens of gradient times activation.
    """
    with ExitStack() as stack:
        for name, mask in masks.items():
            group = structure.group(name)
            places = [group.mask_at or group.output]
            if group.norm_over_units is not None:
                places.append(group.norm_over_units)
            stack.enter_context(forward_hooks(module, places, before=_mask_input(group, mask)))
            if group.kind == "width":
                stack.enter_context(mask_queries(module, group, mask))
        yield


@contextmanager
def mask_queries(module: nn.Module, group: Group, mask: Tensor) -> Iterator[None]:
    """Multiply the dimensions of all heads' queries by ``mask`` (as for `mask_units`) while the context lasts."""
    queries = projections(group).queries

    def after(_: str, __: nn.Module, ___: object, output: Tensor) -> Tensor:
        rows = queries.of(output.shape[-1])
        factors = _tiled(mask, rows.stop - rows.start)
        others = [
            factors.new_ones(n).expand(*factors.shape[:-1], -1) for n in (rows.start, output.shape[-1] - rows.stop)
        ]
        return _multiplied(output, torch.cat([others[0], factors, others[1]], dim=-1), -1)

    with forward_hooks(module, [queries.module], after=after):
        yield


def _mask_input(group: Group, mask: Tensor) -> Hook:
    def before(_: str, __: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        x = args[0]
        features = _tiled(mask.repeat_interleave(group.width, dim=-1), x.shape[group.axis])
        return (_multiplied(x, features, group.axis), *args[1:]), kwargs

    return before


def _tiled(mask: Tensor, features: int) -> Tensor:
    """Return ``mask`` repeated along its last axis to ``features``: a width has the same mask in every head."""
    return mask.repeat(*[1] * (mask.dim() - 1), features // mask.shape[-1])


def _multiplied(x: Tensor, features: Tensor, axis: int) -> Tensor:
    """Return ``x`` times ``(features,)`` along ``axis``, or ``(copies, features)`` for stacked copies of a batch."""
    along = [1] * x.dim()
    along[axis] = -1
    if features.dim() == 1:
        return x * features.reshape(along)
    copies = features.shape[0]
    stacked = x.reshape(copies, -1, *x.shape[1:]) * features.reshape(copies, *along)
    return stacked.reshape(x.shape)
