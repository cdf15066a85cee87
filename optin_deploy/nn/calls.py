"""Every call of every module in one forward pass."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from optin_deploy.nn.hooks import forward_hooks

# How far a tensor may move, relative to its norm, to count as the same in two forward passes.
_SAME_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Call:
    """One module's call in a forward pass.

    ``input`` and ``output`` are copies of its first tensor input and output. ``changed`` is whether the network changed
    the output in place later.
    """

    name: str
    module: nn.Module
    input: Tensor | None
    output: Tensor | None
    changed: bool


def trace_calls(module: nn.Module, inputs: Mapping[str, Tensor]) -> list[Call]:
    """Run ``module`` once and return the calls of its submodules in the order in which they end."""
    copies = _Copies()
    started: dict[str, list[Tensor | None]] = {name: [] for name, _ in module.named_modules()}
    ended: list[tuple[Call, Tensor | None, int]] = []

    def before(name: str, _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        started[name].append(copies.of(first_tensor(args if args else list(kwargs.values()))))

    def after(name: str, submodule: nn.Module, _: object, output: object) -> None:
        tensor = first_tensor(output)
        call = Call(name, submodule, started[name].pop(), copies.of(tensor), False)
        ended.append((call, tensor, _version(tensor)))

    with forward_hooks(module, filter(None, started), before=before, after=after), torch.no_grad():
        module(**inputs)
    return [replace(call, changed=_version(tensor) != version) for call, tensor, version in ended]


def first_tensor(value: object) -> Tensor | None:
    """Return ``value``, its first element or its first entry if that is a tensor, else None."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def same_tensor(a: Tensor, b: Tensor) -> bool:
    """Return whether tensors of two forward passes are equal within rounding. NaN equals everything."""
    return a.shape == b.shape and not bool((a - b).norm() > _SAME_TOLERANCE * b.norm())


class _Copies:
    """Copies of tensors in their present state, one copy for each state of each tensor."""

    def __init__(self) -> None:
        # Holding the tensors keeps their ids from being used again.
        self.seen: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def of(self, tensor: Tensor | None) -> Tensor | None:
        if tensor is None or tensor.is_inference():
            return tensor if tensor is None else tensor.clone()
        key = (id(tensor), tensor._version)
        if key not in self.seen:
            self.seen[key] = (tensor, tensor.detach().clone())
        return self.seen[key][1]


def _version(tensor: Tensor | None) -> int:
    """Return a number that grows with every change of ``tensor`` in place."""
    return 0 if tensor is None or tensor.is_inference() else tensor._version
