"""Where the residual stream runs, found by what happens in a forward pass and not by names.

Compensation needs to know to which stream a projection's output is added. In a pre-norm block that is the input of the
norm before the sublayer, in a post-norm block the input of the sublayer itself; blocks with LayerScale put a factor
between. Here the pair of tensors that differ by just that output is looked for.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

# How far `after - before` may be from the (scaled) output, relative to it, for the two to be the residual stream.
_RELATIVE_TOLERANCE = 1e-3


@dataclass(frozen=True)
class Call:
    """One module's call in a forward pass; ``given`` and ``returned`` are its first tensor input and output."""

    name: str
    module: nn.Module
    given: Tensor | None
    returned: Tensor | None


def first_tensor(value: Any) -> Tensor | None:
    """``value`` itself or its first element if that is a tensor, else None."""
    if isinstance(value, tuple | list) and value:
        value = value[0]
    return value if isinstance(value, Tensor) else None


def trial_forward(module: nn.Module, inputs: Mapping[str, Tensor]) -> list[Call]:
    """Run ``module`` once; every submodule's call, in the order in which the calls end."""
    calls: list[Call] = []

    def record(name: str) -> Any:
        def hook(submodule: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            given = first_tensor(args if args else list(kwargs.values()))
            calls.append(Call(name, submodule, given, first_tensor(output)))

        return hook

    handles = [m.register_forward_hook(record(n), with_kwargs=True) for n, m in module.named_modules() if n]
    try:
        with torch.no_grad():
            module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls


def residual_stream(calls: list[Call], block: str, projection: str) -> tuple[str | None, str | None]:
    """``(module whose first input is the stream, LayerScale parameter)`` for one output projection in ``block``.

    Either may be None: no stream when something else than LayerScale stands between projection and addition.
    """
    end = next(i for i, call in enumerate(calls) if call.name == projection)
    inside = [i for i, call in enumerate(calls) if call.name == block or call.name.startswith(block + ".")]
    update = calls[end].returned
    assert update is not None
    scale = None
    for i in inside:
        if i > end and (parameter := _layer_scale(calls[i], update)):
            scale, update = f"{calls[i].name}.{parameter}", calls[i].returned
            break
    assert update is not None
    # A module that encloses the projection ends after it but was given its input before.
    # Outer modules come first: they still stand where a whole sublayer is replaced.
    before = [calls[i] for i in inside if i < end or projection.startswith(calls[i].name + ".")]
    before.sort(key=lambda call: call.name.count("."))
    after = [t for i in inside if i > end for t in (calls[i].given, calls[i].returned)]
    best, best_error = None, _RELATIVE_TOLERANCE
    for call in before:
        for later in after:
            if call.given is None or later is None or not call.given.shape == later.shape == update.shape:
                continue
            error = float((later - call.given - update).norm() / update.norm().clamp_min(1e-6 * float(later.norm())))
            if error < best_error:
                best, best_error = call.name, error
    return best, scale


def _layer_scale(call: Call, update: Tensor) -> str | None:
    """Name of the one parameter by which ``call`` multiplies ``update`` channel by channel, or None."""
    if call.given is None or call.returned is None or call.given.shape != update.shape:
        return None
    parameters = list(call.module.named_parameters(recurse=False))
    if len(parameters) != 1 or parameters[0][1].shape != update.shape[-1:] or not torch.equal(call.given, update):
        return None
    name, gamma = parameters[0]
    return name if torch.allclose(call.returned, update * gamma.detach(), rtol=1e-4) else None
