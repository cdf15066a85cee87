"""Whether channels are independent of each other between two modules, tried in forward passes."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optin_deploy.nn.calls import Call, same_tensor
from optin_deploy.nn.hooks import Args, Hook, Kwargs, forward_hooks
from optin_deploy.nn.outputs import named_outputs


@dataclass(frozen=True)
class ChannelSpan:
    """The channels from the output of the module ``start`` to the input of the module ``end``, as ``units`` units."""

    start: str
    end: str
    units: int


@torch.no_grad()
def coupled_spans(
    module: nn.Module, inputs: Mapping[str, Tensor], calls: Sequence[Call], spans: Sequence[ChannelSpan]
) -> set[str]:
    """Return the starts of the spans whose units depend on each other or reach something outside the span.

    A forward pass changes every second unit at the start of every span. The other units must then be unchanged at the
    end of the span. With all units restored there, the output of the network must be unchanged. If it is not, each half
    of the spans is tried alone.

    Args:
        calls: The calls of a forward pass of ``module`` on ``inputs``.
    """
    if not spans:
        return set()
    recorded = {call.name: call.input for call in calls}
    return _coupled(module, inputs, named_outputs(module(**inputs)), recorded, spans)


def _coupled(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    dense: Mapping[str, Tensor],
    recorded: Mapping[str, Tensor | None],
    spans: Sequence[ChannelSpan],
) -> set[str]:
    if _independent(module, inputs, dense, recorded, spans):
        return set()
    if len(spans) == 1:
        return {spans[0].start}
    middle = len(spans) // 2
    return set().union(*(_coupled(module, inputs, dense, recorded, s) for s in (spans[:middle], spans[middle:])))


def _independent(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    dense: Mapping[str, Tensor],
    recorded: Mapping[str, Tensor | None],
    spans: Sequence[ChannelSpan],
) -> bool:
    independent: dict[str, bool] = {}
    with ExitStack() as stack:
        for span in spans:
            stack.enter_context(forward_hooks(module, [span.start], after=_change_odd_units(span)))
            restore = _restore_units(span, recorded[span.end], independent)
            stack.enter_context(forward_hooks(module, [span.end], before=restore))
        outputs = named_outputs(module(**inputs))
    if len(independent) < len(spans) or not all(independent.values()):
        return False
    return all(same_tensor(outputs[name].double(), t.double()) for name, t in dense.items())


def _change_odd_units(span: ChannelSpan) -> Hook:
    def after(_: str, __: nn.Module, ___: object, output: Tensor) -> Tensor:
        changed = output.clone()
        odd = changed.unflatten(1, (span.units, -1))[:, 1::2]
        odd.copy_(1 - odd)
        return changed

    return after


def _restore_units(span: ChannelSpan, expected: Tensor | None, independent: dict[str, bool]) -> Hook:
    """Return a hook that restores the ``expected`` input, and notes whether only the changed units differed from it."""

    def before(_: str, __: nn.Module, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs] | None:
        if not args or expected is None or not isinstance(args[0], Tensor) or args[0].shape != expected.shape:
            return None
        units, wanted = (t.unflatten(1, (span.units, -1)) for t in (args[0], expected))
        moved = not same_tensor(units[:, 1::2], wanted[:, 1::2])
        independent[span.start] = moved and same_tensor(units[:, ::2], wanted[:, ::2])
        return (expected.clone(), *args[1:]), kwargs

    return before
