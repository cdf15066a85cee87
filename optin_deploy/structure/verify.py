"""Whether groups can be cut as their adapters say: some of their units are removed, and masked, on the sample batch.

Units are interchangeable when the network does not care which of them stay. So uneven ones are kept, once mostly the
first and once mostly the last: a forward pass that treats the first half of its features differently, shifts a quarter
of them or looks at their places would move a boundary between units.

Where units are not interchangeable one by one, they may be in tuples, one of each of several equal parts or several in
a row (`Together`).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from optin_deploy.structure.groups import Group, LayerAxis, Structure, Together
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import layer_size, sliced
from optin_deploy.structure.verify_slices import Verdict, compared, told

Inputs = Mapping[str, Tensor]
Keep = Callable[[Group], tuple[int, ...]]

# Sizes of tuples that are tried where units may not leave alone.
_SIZES = (2, 3, 4, 5, 6, 8, 16)
_TUPLES = tuple(Together(size, strided) for size in _SIZES for strided in (True, False))
# The part of a group's tuples from one end on that a trial keeps, but for the second; of so few all but one.
_KEPT, _FEW = 0.6, 4


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


def uncuttable(module: nn.Module, inputs: Inputs, groups: Sequence[Group]) -> dict[str, str]:
    """Which of these groups give something else sliced than masked, and why: group name -> reason."""
    return _uncuttable(module, inputs, groups, alike=False)


def _uncuttable(module: nn.Module, inputs: Inputs, groups: Sequence[Group], *, alike: bool) -> dict[str, str]:
    found = failing(module, inputs, groups, mostly_first, alike=alike)
    # Heads that can get narrower can take any basis, so that it does not matter which dimensions stay.
    rest = [g for g in groups if g.name not in found and g.kind != "width"]
    return found | failing(module, inputs, rest, mostly_last, alike=alike)


def mostly_first(group: Group) -> tuple[int, ...]:
    """The first units of a group but for one of them, as many as a trial keeps."""
    return _some(group, 1)


def mostly_last(group: Group) -> tuple[int, ...]:
    """The last units of a group but for one of them, as many as a trial keeps."""
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
    """Those of these groups, which cannot be cut as they are, that can be cut in another way.

    The features of a unit may lie in a row where the adapter took them to lie part by part. Or units leave together,
    in the smallest tuples that work.
    """
    found: list[Group] = []
    left = list(groups)
    for form in (None, *_TUPLES):
        changed = [c for group in left if (c := _changed(module, group, form)) is not None]
        bad = _uncuttable(module, inputs, changed, alike=True)
        found += [group for group in changed if group.name not in bad]
        done = {group.name for group in found}
        left = [group for group in left if group.name not in done]
    return found


def _changed(module: nn.Module, group: Group, form: Together | None) -> Group | None:
    """The group in tuples, or with its features in a row where there is no ``form``; None where it has no such way."""
    if form is not None:
        fits = group.units % form.size == 0 and group.units > form.size
        return replace(group, together=form) if fits else None
    sides = tuple(_in_a_row(module, group, side) for side in group.sides)
    return replace(group, sides=sides, qkv=None) if sides != group.sides else None


def _in_a_row(module: nn.Module, group: Group, side: LayerAxis) -> LayerAxis:
    """The side with all features of a unit in one part."""
    features = layer_size(module.get_submodule(side.module), side)
    parts = len(side.widths) or features // (group.units * group.width)
    return replace(side, widths=(features // group.units,)) if parts > 1 and side.axis == "out" else side


def keep_working_placeholders(module: nn.Module, inputs: Inputs, groups: Sequence[Group]) -> list[Group]:
    """The groups, those without placeholders that give something else than the masked network when no unit is left."""
    # Of two samples, what stands in for a module that gives a pair could be taken for one.
    odd = {name: torch.cat((t, t[:1])) if len(t) == 2 else t for name, t in inputs.items()}
    bad = failing(module, odd, [g for g in groups if g.placeholders], _none)
    return [replace(group, placeholders=()) if group.name in bad else group for group in groups]


def broadcast_where_it_works(module: nn.Module, inputs: Inputs, groups: Sequence[Group]) -> list[Group]:
    """Return the groups, with `Stream.in_place` set for those whose placeholders cannot be broadcast.

    Args:
        groups: with their residual streams, and placeholders that work at their whole size.
    """
    free = [g for g in groups if g.min_units == 0 and not g.stream.in_place and g.parent is None]
    whole = failing(module, inputs, free, _none)
    return [replace(g, stream=replace(g.stream, in_place=True)) if g.name in whole else g for g in groups]


def _none(_: Group) -> tuple[int, ...]:
    return ()


def failing(
    module: nn.Module, inputs: Inputs, groups: Sequence[Group], keep: Keep, *, alike: bool = False
) -> dict[str, str]:
    """Which of these groups give something else sliced than masked, and why: group name -> reason.

    All are tried at once, which mostly tells the groups whose projections give something else. Where it does not, those
    on each type of module are tried by themselves, and of a type that fails, each one.

    Args:
        keep: which units stay.
        alike: whether groups of one type are taken to fail when one cannot be run.
    """
    if not groups:
        return {}
    kept = {g.name: keep(g) for g in groups}
    verdict = _tried(module, inputs, groups, kept)
    if verdict.passed:
        return {}
    # Behind a module whose units have all left, others may give something else through no fault of their own.
    if verdict.groups and all(kept.values()):
        off = verdict.groups
        found = {g.name: reason(len(kept[g.name]), g.units, None, off[g.name]) for g in groups if g.name in off}
        rest = [g for g in groups if g.name not in found]
        return found | failing(module, inputs, rest, keep, alike=alike)
    if len(groups) == 1:
        only = groups[0]
        return {only.name: reason(len(kept[only.name]), only.units, verdict.error, verdict.largest)}
    found = {}
    of_types = _by_type(module, groups)
    for together in of_types if len(of_types) > 1 else [[g] for g in groups]:
        found |= failing(module, inputs, together, keep, alike=alike)
        if alike and len(of_types) == 1 and found:
            return dict.fromkeys((g.name for g in groups), next(iter(found.values())))
    return found


def reason(kept: int, units: int, error: str | None, off: float) -> str:
    """What is wrong with ``kept`` of so many units: an error, or how far the output is off, relative to its norm."""
    left = f"its units are not interchangeable: with {kept} of {units} left"
    if error is not None:
        return f"{left}, the network cannot be run ({error})"
    return f"{left}, it is {100 * min(off, 9.99):.2g} % off what it gives with the rest masked"


def _by_type(module: nn.Module, groups: Sequence[Group]) -> list[list[Group]]:
    found: dict[tuple[str, type[nn.Module]], list[Group]] = {}
    for group in groups:
        # A width is no module: it is its heads'.
        name = group.parent if group.kind == "width" and group.parent else group.name
        found.setdefault((group.kind, type(module.get_submodule(name))), []).append(group)
    return list(found.values())


def _tried(module: nn.Module, inputs: Inputs, groups: Sequence[Group], kept: Mapping[str, tuple[int, ...]]) -> Verdict:
    try:
        small = sliced(module, Structure((), tuple(groups), 0), Plan(kept))
    except Exception as error:
        return Verdict({}, 0.0, told(error))
    return compared(module, small, groups, kept, inputs)
