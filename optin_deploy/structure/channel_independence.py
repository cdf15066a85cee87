"""Whether channels stay apart from each other and from everything else between two modules, tried in forward passes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.nn.calls import Call, same_tensor
from optin_deploy.nn.outputs import named_outputs


@dataclass(frozen=True)
class Span:
    """From the output of the module ``start`` to the input of the module ``end``: that many units of channels."""

    start: str
    end: str
    units: int


@torch.no_grad()
def leaking(module: nn.Module, inputs: Mapping[str, Tensor], calls: Sequence[Call], spans: Sequence[Span]) -> set[str]:
    """The starts of the spans of which a unit reaches more than its own place at the end.

    In a forward pass every second unit of every span gives other values. At the span's end the other units must be as
    they were; with all put back there, so must be what the network gives. Where they are not, either half of the spans
    is tried by itself.

    Args:
        calls: of a forward pass of ``module`` on ``inputs``.
    """
    if not spans:
        return set()
    recorded = {call.name: call.input for call in calls}
    return _leaking(module, inputs, named_outputs(module(**inputs)), recorded, spans)


def _leaking(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    dense: Mapping[str, Tensor],
    recorded: Mapping[str, Tensor | None],
    spans: Sequence[Span],
) -> set[str]:
    if _all_apart(module, inputs, dense, recorded, spans):
        return set()
    if len(spans) == 1:
        return {spans[0].start}
    middle = len(spans) // 2
    return set().union(*(_leaking(module, inputs, dense, recorded, s) for s in (spans[:middle], spans[middle:])))


def _all_apart(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    dense: Mapping[str, Tensor],
    recorded: Mapping[str, Tensor | None],
    spans: Sequence[Span],
) -> bool:
    apart: dict[str, bool] = {}
    handles = []
    for span in spans:
        handles.append(module.get_submodule(span.start).register_forward_hook(_disturbing(span)))
        restore = _restoring(span, recorded[span.end], apart)
        handles.append(module.get_submodule(span.end).register_forward_pre_hook(restore))
    try:
        given = named_outputs(module(**inputs))
    finally:
        for handle in handles:
            handle.remove()
    if len(apart) < len(spans) or not all(apart.values()):
        return False
    return all(same_tensor(given[name].double(), t.double()) for name, t in dense.items())


def _disturbing(span: Span) -> Any:
    def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        odd = changed.unflatten(1, (span.units, -1))[:, 1::2]
        odd.copy_(1 - odd)
        return changed

    return hook


def _restoring(span: Span, expected: Tensor | None, apart: dict[str, bool]) -> Any:
    def hook(_: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if not args or expected is None or not isinstance(args[0], Tensor) or args[0].shape != expected.shape:
            return None
        found, wanted = (t.unflatten(1, (span.units, -1)) for t in (args[0], expected))
        moved = not same_tensor(found[:, 1::2], wanted[:, 1::2])
        apart[span.start] = moved and same_tensor(found[:, ::2], wanted[:, ::2])
        return (expected.clone(), *args[1:])

    return hook
