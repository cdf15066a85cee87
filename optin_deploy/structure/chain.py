"""Channels between two convolutions in a row, outside the blocks: decoders, stems, networks without shortcuts.

Such pairs are found by what happens in a forward pass, whatever the modules are called. The second convolution stands
for a block of its own. A convolution belongs to one pair at most, so that costs add up.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn

from optin_deploy.network import named_outputs
from optin_deploy.projections import Conv
from optin_deploy.structure.conv import disturb
from optin_deploy.structure.groups import Group, Side, StandIn
from optin_deploy.structure.residual import Call, same_tensor


def pairs_in_a_row(
    module: nn.Module, inputs: Mapping[str, Tensor], calls: Sequence[Call], taken: Collection[str]
) -> list[Group]:
    """Groups of the channels between two convolutions, of which nothing else in the network sees anything.

    Args:
        calls: of the trial forward of ``module`` on ``inputs``.
        taken: names of modules that these groups keep out of, with all that is inside them.
    """
    groups: list[Group] = []
    dense: dict[str, Tensor] | None = None
    used: set[str] = set()
    for first, norm, second in _candidates(calls, taken):
        if first.name in used:
            continue
        if dense is None:
            with torch.no_grad():
                dense = named_outputs(module(**inputs))
        if _apart(module, inputs, dense, first, second):
            groups.append(_group(first, norm, second))
            used |= {first.name, second.name}
    return groups


def _candidates(calls: Sequence[Call], taken: Collection[str]) -> Iterator[tuple[Call, Call | None, Call]]:
    """Pairs of convolutions, and the batch norm between them, if any, with nothing else there that has parameters."""
    names = [call.name for call in calls]
    own = [call for call in calls if _has_own(call.module)]
    for number, (first, second) in enumerate(pairwise(own)):
        norm = None
        if type(second.module) is nn.BatchNorm2d and number + 2 < len(own) and _follows(first, second):
            norm, second = second, own[number + 2]
        trio = [call for call in (first, norm, second) if call is not None]
        if not all(names.count(c.name) == 1 and not _is_taken(c.name, taken) for c in trio):
            continue
        if _is_plain(first.module) and _is_plain(second.module) and _fits(norm or first, second):
            yield first, norm, second


def _has_own(module: nn.Module) -> bool:
    return any(True for _ in (*module.parameters(recurse=False), *module.buffers(recurse=False)))


def _is_taken(name: str, taken: Collection[str]) -> bool:
    return any(name == t or name.startswith(f"{t}.") for t in taken)


def _is_plain(layer: nn.Module) -> bool:
    return isinstance(layer, Conv) and type(layer) in (nn.Conv2d, nn.ConvTranspose2d) and layer.groups == 1


def _follows(first: Call, norm: Call) -> bool:
    return first.returned is not None and norm.given is not None and same_tensor(norm.given, first.returned)


def _fits(before: Call, second: Call) -> bool:
    """Whether ``second`` can take what ``before`` gives, as far as sizes tell."""
    if before.returned is None or second.given is None or before.returned.dim() != 4:
        return False
    return before.returned.shape == second.given.shape and before.returned.shape[1] > 1


@torch.no_grad()
def _apart(
    module: nn.Module, inputs: Mapping[str, Tensor], dense: Mapping[str, Tensor], first: Call, second: Call
) -> bool:
    """Whether every channel of ``first`` reaches its own place before ``second``, and nothing else.

    Every second channel gives other values. Before ``second`` the other channels must be as they were, and with all
    put back there, so must be what the network gives.
    """
    apart = []

    def restore(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        assert second.given is not None
        apart.append(same_tensor(args[0][:, ::2], second.given[:, ::2]))
        return (second.given.clone(), *args[1:])

    handles = [first.module.register_forward_hook(disturb), second.module.register_forward_pre_hook(restore)]
    try:
        given = named_outputs(module(**inputs))
    finally:
        for handle in handles:
            handle.remove()
    return all(apart) and all(same_tensor(given[name].double(), t.double()) for name, t in dense.items())


def _group(first: Call, norm: Call | None, second: Call) -> Group:
    between = [norm.name] if norm is not None else []
    passes: list[tuple[str, StandIn]] = [(name, "pass") for name in between]
    assert isinstance(first.module, Conv)
    return Group(
        name=first.name,
        kind="channel",
        units=first.module.out_channels,
        width=1,
        output=second.name,
        sides=(*(Side(name, "out") for name in (first.name, *between)), Side(second.name, "in")),
        owners=(first.name, *between, second.name),
        stand_ins=((first.name, "no_channels"), *passes, (second.name, "constant")),
        axis=1,
    )
