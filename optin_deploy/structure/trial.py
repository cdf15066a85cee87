"""Whether groups can be cut as their adapters say: half of their units are removed, and masked, on the sample batch."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from optin_deploy.masking import masked
from optin_deploy.network import named_outputs
from optin_deploy.plan import Plan
from optin_deploy.slicing import sliced
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.residual import same_tensor

# What a module raises whose forward pass does not follow its parameters.
_UNFIT = (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


@torch.no_grad()
def uncuttable(module: nn.Module, inputs: Mapping[str, Tensor], groups: Sequence[Group]) -> dict[str, str]:
    """Which of these groups give something else sliced than masked, and why: group name -> reason.

    All are tried at once; where that fails, those on each type of module by themselves, and of a type that fails, each
    one.
    """
    if not groups or _failure(module, inputs, groups) is None:
        return {}
    found: dict[str, str] = {}
    for together in _by_type(module, groups):
        if _failure(module, inputs, together) is None:
            continue
        for group in together:
            reason = _failure(module, inputs, [group])
            if reason is not None:
                found[group.name] = reason
    return found


def _by_type(module: nn.Module, groups: Sequence[Group]) -> list[list[Group]]:
    found: dict[tuple[str, type[nn.Module]], list[Group]] = {}
    for group in groups:
        found.setdefault((group.kind, type(module.get_submodule(group.name))), []).append(group)
    return list(found.values())


def _failure(module: nn.Module, inputs: Mapping[str, Tensor], groups: Sequence[Group]) -> str | None:
    """Why the network without every second unit of these groups is not the masked one; None where it is."""
    structure = Structure((), tuple(groups), 0)
    kept = {g.name: tuple(range(0, g.units, 2)) for g in groups}
    masks = {g.name: _mask(module, g) for g in groups}
    with masked(module, structure, masks):
        expected = named_outputs(module(**inputs))
    try:
        given = named_outputs(sliced(module, structure, Plan(kept))(**inputs))
    except _UNFIT as error:
        return f"cannot be run when it is cut ({' '.join(str(error).split())[:120]})"
    if set(given) == set(expected) and all(same_tensor(given[n].double(), t.double()) for n, t in expected.items()):
        return None
    return "gives something else cut than masked"


def _mask(module: nn.Module, group: Group) -> Tensor:
    parameter = next(module.get_submodule(group.output).parameters())
    return (torch.arange(group.units, device=parameter.device) % 2 == 0).to(parameter.dtype)
