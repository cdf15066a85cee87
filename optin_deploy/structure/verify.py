"""Verify groups: compare the sliced with the masked network on the sample batch.

Units are interchangeable if any of them can be removed. So each group is sliced twice, once with mostly its first units
left and once with mostly its last. This moves the boundaries in a forward pass that treats the first half of its
features differently, shifts a quarter of them or depends on their positions.

If single units are not interchangeable, tuples of them may be: one of each of several equal parts, or several in a row
(`Together`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from optin_deploy.errors import one_line
from optin_deploy.structure.groups import Group, LayerAxis, Structure, Together
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import layer_size, slice_network
from optin_deploy.structure.verify_slices import Verdict, compare_slices

Inputs = Mapping[str, Tensor]
Keep = Callable[[Group], tuple[int, ...]]

# Sizes of tuples that are tried if single units cannot be removed.
_SIZES = (2, 3, 4, 5, 6, 8, 16)
_TUPLES = tuple(Together(size, strided) for size in _SIZES for strided in (True, False))
# The share of a group's tuples that a trial keeps, without the second one; of at most ``_FEW`` it keeps all but one.
_KEPT, _FEW = 0.6, 4


def find_tied(module: nn.Module, groups: Sequence[Group]) -> dict[str, str]:
    """Return the groups whose weights another module shares: group name -> reason."""
    holders: dict[int, list[str]] = {}
    for name, submodule in module.named_modules():
        for parameter in submodule.parameters(recurse=False):
            holders.setdefault(id(parameter), []).append(name)
    reasons = {}
    for group in groups:
        own = {side.module for side in group.sides} | {entries.tensor.rpartition(".")[0] for entries in group.entries}
        held = [p for name in own for p in module.get_submodule(name).parameters(recurse=False)]
        others = sorted({name for p in held for name in holders[id(p)]} - own)
        if others:
            reasons[group.name] = f"its weights are tied to those of {others[0]}, which would be cut with them"
    return reasons


def find_unsliceable(module: nn.Module, inputs: Inputs, groups: Sequence[Group]) -> dict[str, str]:
    """Return the groups whose units are not interchangeable: group name -> reason."""
    return _find_unsliceable(module, inputs, groups, alike=False)


def _find_unsliceable(module: nn.Module, inputs: Inputs, groups: Sequence[Group], *, alike: bool) -> dict[str, str]:
    reasons = find_failing(module, inputs, groups, mostly_first, alike=alike)
    # Heads that can get narrower work in any basis, so it does not matter which dimensions stay.
    rest = [g for g in groups if g.name not in reasons and g.kind != "width"]
    return reasons | find_failing(module, inputs, rest, mostly_last, alike=alike)


def mostly_first(group: Group) -> tuple[int, ...]:
    """Return the units that a trial keeps, mostly the first."""
    return _some(group, 1)


def mostly_last(group: Group) -> tuple[int, ...]:
    """Return the units that a trial keeps, mostly the last."""
    return _some(group, -1)


def _some(group: Group, direction: int) -> tuple[int, ...]:
    tuples = group.tuples[::direction]
    if len(tuples) <= _FEW:
        kept = tuples[: max(1, len(tuples) - 1)]
    else:
        first, _, *others = tuples[: round(_KEPT * len(tuples))]
        kept = (first, *others)
    return tuple(sorted(unit for units in kept for unit in units))


def regroup_in_tuples(module: nn.Module, inputs: Inputs, groups: Sequence[Group]) -> list[Group]:
    """Return changed groups that can be sliced, of groups that cannot be sliced as they are.

    Either the features of a unit are consecutive, although the adapter expected them in separate parts, or units are
    removed in the smallest tuples that work.
    """
    regrouped: list[Group] = []
    left = list(groups)
    for form in (None, *_TUPLES):
        changed = [c for group in left if (c := _regroup(module, group, form)) is not None]
        bad = _find_unsliceable(module, inputs, changed, alike=True)
        regrouped += [group for group in changed if group.name not in bad]
        done = {group.name for group in regrouped}
        left = [group for group in left if group.name not in done]
    return regrouped


def _regroup(module: nn.Module, group: Group, form: Together | None) -> Group | None:
    """Return the group in tuples, or without ``form`` with consecutive features; None if that does not fit."""
    if form is not None:
        fits = group.units % form.size == 0 and group.units > form.size
        return replace(group, together=form) if fits else None
    sides = tuple(_in_a_row(module, group, side) for side in group.sides)
    return replace(group, sides=sides, qkv=None) if sides != group.sides else None


def _in_a_row(module: nn.Module, group: Group, side: LayerAxis) -> LayerAxis:
    """Return the side with all features of a unit consecutive."""
    features = layer_size(module.get_submodule(side.module), side)
    parts = len(side.widths) or features // (group.units * group.width)
    return replace(side, widths=(features // group.units,)) if parts > 1 and side.axis == "out" else side


def keep_working_placeholders(module: nn.Module, inputs: Inputs, groups: Sequence[Group]) -> list[Group]:
    """Return the groups, without placeholders if these differ from the masked network when no unit is left."""
    # With two samples, the output of a placeholder could be unpacked as a pair.
    odd = {name: torch.cat((t, t[:1])) if len(t) == 2 else t for name, t in inputs.items()}
    bad = find_failing(module, odd, [g for g in groups if g.placeholders], _none)
    return [replace(group, placeholders=()) if group.name in bad else group for group in groups]


def broadcast_if_possible(module: nn.Module, inputs: Inputs, groups: Sequence[Group]) -> list[Group]:
    """Return the groups, with `Stream.in_place` set for those whose placeholders cannot be broadcast.

    Args:
        groups: Groups with their residual streams and with placeholders that work at full size.
    """
    free = [g for g in groups if g.min_units == 0 and not g.stream.in_place and g.parent is None]
    whole = find_failing(module, inputs, free, _none)
    return [replace(g, stream=replace(g.stream, in_place=True)) if g.name in whole else g for g in groups]


def _none(_: Group) -> tuple[int, ...]:
    return ()


def find_failing(
    module: nn.Module, inputs: Inputs, groups: Sequence[Group], keep: Keep, *, alike: bool = False
) -> dict[str, str]:
    """Return the groups that differ between the sliced and the masked network: group name -> reason.

    All groups are tried at once. If this does not show which of them differ, those on each type of module are tried
    separately, and if a type fails, each of its groups.

    Args:
        keep: Returns the units of a group that stay.
        alike: Whether all groups of a type count as failed when one does.
    """
    if not groups:
        return {}
    kept = {g.name: keep(g) for g in groups}
    verdict = _try_slicing(module, inputs, groups, kept)
    if verdict.passed:
        return {}
    # After a module that has lost all units, others may differ although they are correct.
    if verdict.groups and all(kept.values()):
        off = verdict.groups
        reasons = {g.name: reason(len(kept[g.name]), g.units, None, off[g.name]) for g in groups if g.name in off}
        rest = [g for g in groups if g.name not in reasons]
        return reasons | find_failing(module, inputs, rest, keep, alike=alike)
    if len(groups) == 1:
        only = groups[0]
        return {only.name: reason(len(kept[only.name]), only.units, verdict.error, verdict.largest)}
    reasons = {}
    of_types = _by_type(module, groups)
    for together in of_types if len(of_types) > 1 else [[g] for g in groups]:
        reasons |= find_failing(module, inputs, together, keep, alike=alike)
        if alike and len(of_types) == 1 and reasons:
            return dict.fromkeys((g.name for g in groups), next(iter(reasons.values())))
    return reasons


def reason(kept: int, units: int, error: str | None, off: float) -> str:
    """Return the reason why ``kept`` of ``units`` units do not work: an error, or the relative error of the output."""
    left = f"its units are not interchangeable: with {kept} of {units} left"
    if error is not None:
        return f"{left}, the network cannot be run ({error})"
    return f"{left}, it is {100 * min(off, 9.99):.2g} % off what it gives with the rest masked"


def _by_type(module: nn.Module, groups: Sequence[Group]) -> list[list[Group]]:
    by_type: dict[tuple[str, type[nn.Module]], list[Group]] = {}
    for group in groups:
        # The width of heads has the module of the heads.
        name = group.parent if group.kind == "width" and group.parent else group.name
        by_type.setdefault((group.kind, type(module.get_submodule(name))), []).append(group)
    return list(by_type.values())


def _try_slicing(
    module: nn.Module, inputs: Inputs, groups: Sequence[Group], kept: Mapping[str, tuple[int, ...]]
) -> Verdict:
    try:
        small = slice_network(module, Structure((), tuple(groups), 0), Plan(kept))
    except Exception as error:
        return Verdict({}, 0.0, one_line(error, 120))
    return compare_slices(module, small, groups, kept, inputs)
