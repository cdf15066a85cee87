"""Whether groups can be cut as their adapters say: half of their units, and then all of them, are removed, and masked,
on the sample batch."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from optin_deploy.masking import masked
from optin_deploy.network import named_outputs
from optin_deploy.plans import Plan
from optin_deploy.slicing import sliced
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.residual import same_tensor

# What a module raises whose forward pass does not follow its parameters.
_UNFIT = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def tied(module: nn.Module, groups: Sequence[Group]) -> dict[str, str]:
    """Which of these groups would cut weights that another module has too, and why not: group name -> reason."""
    holders: dict[int, list[str]] = {}
    for name, submodule in module.named_modules():
        for parameter in submodule.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    found = {}
    for group in groups:
        own = {side.module for side in group.sides} | {entries.tensor.rpartition(".")[0] for entries in group.entries}
        held = [p for name in own for p in module.get_submodule(name).parameters(recurse=False)]
        others = sorted({name for p in held for name in holders[id(p)]} - own)
        if others:
            found[group.name] = f"its weights are tied to those of {others[0]}, which would be cut with them"
    return found


@torch.no_grad()
def uncuttable(module: nn.Module, inputs: Mapping[str, Tensor], groups: Sequence[Group]) -> dict[str, str]:
    """Which of these groups give something else sliced than masked, and why: group name -> reason."""
    return _failing(module, inputs, groups, every=2)


@torch.no_grad()
def with_working_stand_ins(module: nn.Module, inputs: Mapping[str, Tensor], groups: Sequence[Group]) -> list[Group]:
    """The groups, those without stand-ins that give something else than the masked network when no unit is left."""
    # Of two samples, what stands in for a module that gives a pair could be taken for one.
    odd = {name: torch.cat((t, t[:1])) if len(t) == 2 else t for name, t in inputs.items()}
    failing = _failing(module, odd, [g for g in groups if g.stand_ins], every=None)
    return [replace(group, stand_ins=()) if group.name in failing else group for group in groups]


def _failing(
    module: nn.Module, inputs: Mapping[str, Tensor], groups: Sequence[Group], every: int | None
) -> dict[str, str]:
    """Which of these groups give something else sliced than masked, and why: group name -> reason.

    All are tried at once; where that fails, those on each type of module by themselves, and of a type that fails, each
    one.

    Args:
        every: which units stay: every so many-th, or none.
    """
    if not groups or _failure(module, inputs, groups, every) is None:
        return {}
    found: dict[str, str] = {}
    for together in _by_type(module, groups):
        if _failure(module, inputs, together, every) is None:
            continue
        for group in together:
            reason = _failure(module, inputs, [group], every)
            if reason is not None:
                found[group.name] = reason
    return found


@torch.no_grad()
def broadcast_where_it_works(module: nn.Module, inputs: Mapping[str, Tensor], groups: Sequence[Group]) -> list[Group]:
    """The groups, of which those say that they change in place whose stand-ins cannot be broadcast (`Group.in_place`).

    Args:
        groups: with their residual streams, and stand-ins that work at their whole size.
    """
    free = [g for g in groups if g.least == 0 and not g.in_place and g.outer is None]
    whole = _failing(module, inputs, free, every=None)
    return [replace(g, in_place=True) if g.name in whole else g for g in groups]


def _by_type(module: nn.Module, groups: Sequence[Group]) -> list[list[Group]]:
    found: dict[tuple[str, type[nn.Module]], list[Group]] = {}
    for group in groups:
        # A width is no module: it is its heads'.
        name = group.outer if group.kind == "width" and group.outer else group.name
        found.setdefault((group.kind, type(module.get_submodule(name))), []).append(group)
    return list(found.values())


def _failure(module: nn.Module, inputs: Mapping[str, Tensor], groups: Sequence[Group], every: int | None) -> str | None:
    """Why the network with some units of these groups only is not the masked one; None where it is."""
    structure = Structure((), tuple(groups), 0)
    kept = {g.name: tuple(range(0, g.units, every)) if every is not None else () for g in groups}
    masks = {g.name: _mask(module, g, kept[g.name]) for g in groups}
    with masked(module, structure, masks):
        expected = named_outputs(module(**inputs))
    try:
        given = named_outputs(sliced(module, structure, Plan(kept))(**inputs))
    except _UNFIT as error:
        return f"cannot be run when it is cut ({' '.join(str(error).split())[:120]})"
    if set(given) == set(expected) and all(same_tensor(given[n].double(), t.double()) for n, t in expected.items()):
        return None
    return "gives something else cut than masked"


def _mask(module: nn.Module, group: Group, kept: Sequence[int]) -> Tensor:
    parameter = next(module.get_submodule(group.output).parameters())
    return torch.tensor([i in kept for i in range(group.units)], dtype=parameter.dtype, device=parameter.device)
