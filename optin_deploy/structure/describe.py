"""From a module to its `Structure`: its groups, their blocks, and the order in which they run."""

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from itertools import takewhile

from torch import Tensor, nn

from optin_deploy.nn.calls import Call, trace_calls
from optin_deploy.nn.names import contains
from optin_deploy.nn.plain_layers import computes_with_its_weights
from optin_deploy.structure.adapters.conv_channels import COUPLED, channel_groups
from optin_deploy.structure.adapters.registry import ADAPTERS, supported
from optin_deploy.structure.batch_axis import find_batch_not_first, find_varying_shapes
from optin_deploy.structure.groups import Group, LeftDense, Structure, channels_last
from optin_deploy.structure.head_width import find_narrowable, width_group
from optin_deploy.structure.residual import residual_stream
from optin_deploy.structure.verify import (
    broadcast_if_possible,
    find_tied,
    find_unsliceable,
    keep_working_placeholders,
    regroup_in_tuples,
)

_LISTS = nn.ModuleList | nn.Sequential
# A group and the name of its block.
_GroupInBlock = tuple[Group, str]
# The groups that a step keeps, and the modules that it leaves dense.
_Step = tuple[list[_GroupInBlock], list[LeftDense]]


def prunable() -> list[str]:
    """Return descriptions of what `describe` recognises, one line each."""
    return [
        *supported(),
        "Channels between two convolutions of one to three axes, plain or transposed, through batch, instance and "
        "group norms, activations with numbers for each channel, grouped convolutions and squeeze-and-excitation: in "
        "residual blocks, bottlenecks and inverted ones too, and in rows.",
    ]


def describe(module: nn.Module, inputs: Mapping[str, Tensor]) -> Structure:
    """Find the prunable groups of ``module``.

    A trial forward on ``inputs`` (the sample batch) gives the order of the groups; more forwards verify them. A group's
    block is the innermost element of a ``ModuleList`` or ``Sequential`` that encloses the group and its projection and
    runs once. If weights are shared, it is the module around all their runs. Convolutions in a row outside all blocks
    are blocks of their own. The structure has no groups if nothing prunable is found.
    """
    trial = _Trial(module, inputs)
    matches, left_dense = _match_adapters(module)
    matched, unused = _running(trial, matches)
    left_dense += unused
    groups, coupled = _with_channels(trial, matched, {left.module for left in left_dense})
    left_dense += coupled
    groups = _with_disjoint_blocks(trial, groups)
    for step in (_computed_by_their_weights, _interchangeable):
        groups, refused = step(trial, groups)
        left_dense += refused
    return _structure(trial, groups, left_dense)


class _Trial:
    """A network, its sample inputs and the calls of a forward pass on them."""

    def __init__(self, module: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        self.module, self.inputs = module, inputs
        self.calls = trace_calls(module, inputs)
        self.runs = Counter(call.name for call in self.calls)
        self.position = {call.name: i for i, call in reversed(list(enumerate(self.calls)))}


def _running(trial: _Trial, groups: Sequence[Group]) -> _Step:
    """Return the groups that run in the trial with their blocks, and the others."""
    placed = [(group, _enclosing_block(trial.module, group, trial.runs)) for group in groups]
    kept = [(g, block) for g, block in placed if g.output in trial.position and block in trial.position]
    running = {g.name for g, _ in kept}
    return kept, [LeftDense(g.name, "does not run in a forward pass") for g in groups if g.name not in running]


def _with_channels(trial: _Trial, matched: Sequence[_GroupInBlock], refused: Collection[str]) -> _Step:
    """Return the groups with those of channels between two convolutions, and channels that depend on each other.

    Neurons of convolutions are channels. Where both are found, the channels are kept, because a forward pass shows more
    of them than an adapter knows.
    """
    groups = [g for g, _ in matched]
    settled = [g for g in groups if g.kind != "neuron" or g.axis != 1]
    taken = {*(name for g in settled for name in (*g.cost.modules, g.output)), *refused}
    known = {side.module for g in groups for side in g.sides}
    channels, coupled = channel_groups(trial.module, trial.inputs, trial.calls, taken, known=known)
    if not channels and not groups:
        channels, coupled = channel_groups(trial.module, trial.inputs, trial.calls, taken, loose=True)
    in_tuples, mixing = _independent_in_tuples(trial, coupled)
    channels += in_tuples
    followed = {side.module for g, _ in channels for side in g.sides}
    others = [(g, block) for g, block in matched if not followed & {side.module for side in g.sides}]
    return others + channels, mixing


def _independent_in_tuples(trial: _Trial, coupled: Sequence[_GroupInBlock]) -> _Step:
    """Return the groups whose channels are independent only in tuples, and the others.

    No two of those returned meet in a convolution.
    """
    able = {g.name: g for g in regroup_in_tuples(trial.module, trial.inputs, [g for g, _ in coupled])}
    kept: dict[str, _GroupInBlock] = {}
    ends: set[str] = set()
    for group, block in coupled:
        if group.name in able and not ends & {group.name, group.output}:
            kept[group.name] = (able[group.name], block)
            ends |= {group.name, group.output}
    return list(kept.values()), [LeftDense(g.name, COUPLED) for g, _ in coupled if g.name not in kept]


def _with_disjoint_blocks(trial: _Trial, groups: Sequence[_GroupInBlock]) -> list[_GroupInBlock]:
    """Return the groups with blocks none of which contains another: groups next to inner blocks get blocks too."""
    blocks = {block for _, block in groups}
    outer = {block for block in blocks if any(contains(block, other) for other in blocks)}

    def inner_block(group: Group, block: str) -> str:
        path = _path(group)
        if block not in outer or block not in path:
            return block
        below = path[path.index(block) :]
        return next((name for name in below if name not in outer and trial.runs[name] == 1), below[-1])

    return [(group, inner_block(group, block)) for group, block in groups]


def _computed_by_their_weights(trial: _Trial, groups: Sequence[_GroupInBlock]) -> _Step:
    """Return the groups whose projection and block run once, with the batch first, on weights of their own."""
    alone, block_of = [g for g, _ in groups], {g.name: block for g, block in groups}
    shared = "runs several times, and so does what holds it: put that into a module of its own that runs once"
    odd = [g for g in alone if not computes_with_its_weights(trial.module.get_submodule(g.output))]
    reasons = {
        **{g.name: shared for g, block in groups if trial.runs[block] > 1},
        **find_varying_shapes(trial.calls, alone),
        **find_batch_not_first(trial.module, trial.inputs, alone, block_of),
        **find_tied(trial.module, alone),
        **{g.name: f"{g.output} has a forward of its own, which gives more than its weights make" for g in odd},
    }
    return _without(groups, reasons)


def _interchangeable(trial: _Trial, groups: Sequence[_GroupInBlock]) -> _Step:
    """Return the groups that can be sliced, some of them only in tuples of units, and the others."""
    alone = [g for g, _ in groups]
    reasons = find_unsliceable(trial.module, trial.inputs, alone)
    in_tuples = regroup_in_tuples(trial.module, trial.inputs, [g for g in alone if g.name in reasons])
    changed = {g.name: g for g in in_tuples}
    still = {name: reason for name, reason in reasons.items() if name not in changed}
    return _without([(changed.get(g.name, g), block) for g, block in groups], still)


def _without(groups: Sequence[_GroupInBlock], reasons: Mapping[str, str]) -> _Step:
    """Return the groups without those that have a reason to be left dense, and these. Children of these stay."""
    kept = [(g, block) for g, block in groups if g.name not in reasons]
    kept = [(replace(g, parent=None) if g.parent in reasons else g, block) for g, block in kept]
    return kept, [LeftDense(name, reason) for name, reason in reasons.items()]


def _structure(trial: _Trial, groups: Sequence[_GroupInBlock], left_dense: Sequence[LeftDense]) -> Structure:
    """Return the structure of verified groups: with placeholders that work, streams, and the widths of heads."""
    module, inputs, block_of = trial.module, trial.inputs, {g.name: block for g, block in groups}
    blocks = tuple(sorted(set(block_of.values()), key=trial.position.__getitem__))
    placed = []
    working = keep_working_placeholders(module, inputs, [g for g, _ in groups])
    for group in sorted(working, key=lambda g: trial.position[g.output]):
        block = block_of[group.name]
        stream = residual_stream(trial.calls, block, group.output, group.axis)
        placed.append(replace(group, layer=blocks.index(block), stream=stream))
    placed = _with_widths(module, inputs, broadcast_if_possible(module, inputs, placed))
    structure = Structure(blocks, tuple(placed), 0, tuple(left_dense))
    return replace(structure, tokens=_tokens(trial.calls, structure))


def _with_widths(module: nn.Module, inputs: Mapping[str, Tensor], groups: list[Group]) -> list[Group]:
    """Return the groups, each followed by the group of its width if it is of heads that can get narrower."""
    widths = {g.name: width_group(module, g) for g in groups if g.kind == "head"}
    able = {g.name: g for g in find_narrowable(module, inputs, [w for w in widths.values() if w is not None])}
    for name in find_unsliceable(module, inputs, list(able.values())):
        del able[name]
    with_widths = []
    for group in groups:
        with_widths.append(group)
        width = widths.get(group.name)
        if width is not None and width.name in able:
            with_widths.append(replace(width, layer=group.layer, stream=group.stream))
    return with_widths


def _tokens(calls: list[Call], structure: Structure) -> int:
    """Return how many tokens the first block outputs for one sample."""
    for call in calls:
        if call.name in structure.blocks[:1] and call.output is not None:
            return channels_last(call.output, structure.feature_axis(call.name)).shape[1:-1].numel()
    return 0


def _match_adapters(module: nn.Module) -> tuple[list[Group], list[LeftDense]]:
    """Return the groups that adapters find in every submodule, and the modules that they refuse.

    Adapters registered later come first. A group is dropped if it overlaps with an earlier one.
    """
    groups: list[Group] = []
    left_dense: list[LeftDense] = []
    taken: set[tuple[str, str]] = set()
    for name, submodule in module.named_modules():
        parent_name = name.rpartition(".")[0]
        parent = module.get_submodule(parent_name)
        results = [adapt(name, submodule, parent_name, parent) for adapt in reversed(ADAPTERS)] if name else []
        matches = [match for match in results if match is not None]
        described = [m for m in matches if isinstance(m, Group)]
        for group in described:
            sides = {(side.module, side.axis) for side in group.sides}
            if not sides & taken:
                groups.append(group)
                taken |= sides
        if not described:
            left_dense += [m for m in matches if isinstance(m, LeftDense)][:1]
    return groups, left_dense


def _path(group: Group) -> list[str]:
    """Return the modules around a group and its projection, from the outermost on."""
    name, output = group.name.split("."), group.output.split(".")
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(name, output, strict=False))
    parts = [part for part, _ in shared] or name
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _enclosing_block(module: nn.Module, group: Group, runs: Mapping[str, int]) -> str:
    enclosing = _path(group)[::-1]
    elements = [e for e in enclosing if isinstance(module.get_submodule(e.rpartition(".")[0]), _LISTS)]
    # If weights are shared, the block is the module that runs all of them.
    once = [e for e in (*elements, *enclosing) if runs[e] == 1]
    return (once or elements or enclosing)[0]
