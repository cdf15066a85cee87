"""Masks on units: forward pre-hooks on the projection behind them. Slicing is held against them, scores use them."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor, nn

from optin_deploy.structure.groups import Group, Structure


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No gradients for parameters while the context lasts."""
    wanted = [p for p in module.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)


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
            handle = module.get_submodule(group.output).register_forward_pre_hook(_hook(group, mask))
            stack.callback(handle.remove)
        yield


def _hook(group: Group, mask: Tensor) -> Any:
    features = mask.repeat_interleave(group.width, dim=-1)

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        x = args[0]
        if features.dim() == 1:
            return (x * features, *args[1:])
        copies = features.shape[0]
        stacked = x.reshape(copies, -1, x.shape[-1]) * features[:, None, :]
        return (stacked.reshape(x.shape), *args[1:])

    return hook
