"""From a module to its `Structure`: which groups it has, in which blocks, and how the network runs through them."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import takewhile

from torch import Tensor, nn

from optin_deploy.nn.plain_layers import computes_with_its_weights
from optin_deploy.structure.adapters.conv_channels import LEAKING, channel_groups
from optin_deploy.structure.adapters.registry import ADAPTERS, supported
from optin_deploy.structure.batch_axis import not_batch_first, of_several_shapes
from optin_deploy.structure.groups import Group, LeftDense, Structure, channels_last
from optin_deploy.structure.head_width import narrowable, width_group
from optin_deploy.structure.residual import Call, residual_stream, trial_forward
from optin_deploy.structure.verify import (
    broadcast_where_it_works,
    in_another_way,
    keep_working_placeholders,
    tied,
    uncuttable,
)

_LISTS = nn.ModuleList | nn.Sequential


def prunable() -> list[str]:
    """What `describe` recognises, a line each."""
    return [
        *supported(),
        "Channels between two convolutions of one to three axes, plain or transposed, through batch, instance and "
        "group norms, activations with numbers for each channel, grouped convolutions and squeeze-and-excitation: in "
        "residual blocks, bottlenecks and inverted ones too, and in rows.",
    ]


def describe(module: nn.Module, inputs: Mapping[str, Tensor]) -> Structure:
    """Find the prunable groups of ``module``; one trial forward on ``inputs`` (the sample batch) gives their order.

    A group's block is the innermost element of a ``ModuleList`` or ``Sequential`` that encloses it and its projection
    and runs once, or what encloses all runs of those that share weights; convolutions in a row outside all blocks are
    blocks of their own. Channels are tried in further forwards. The structure has no groups when nothing prunable is
    found.
    """
    found, left_dense = _match_adapters(module)
    calls = trial_forward(module, inputs)
    position = {call.name: i for i, call in reversed(list(enumerate(calls)))}
    runs = Counter(call.name for call in calls)
    block_of = {group.name: _enclosing_block(module, group, runs) for group in found}
    ran = [g for g in found if g.output in position and block_of[g.name] in position]
    left_dense += [LeftDense(g.name, "does not run in a forward pass") for g in found if g not in ran]
    # Neurons of convolutions are channels: what is followed through a forward pass is known better.
    settled = [g for g in ran if g.kind != "neuron" or g.axis != 1]
    taken = {*(name for g in settled for name in (*g.cost.modules, g.output)), *(left.module for left in left_dense)}
    known = {side.module for g in ran for side in g.sides}
    channels, mixed = channel_groups(module, inputs, calls, taken, known=known)
    if not channels and not ran:
        channels, mixed = channel_groups(module, inputs, calls, taken, loose=True)
    found_apart, mixing = _apart_in_tuples(module, inputs, mixed)
    channels += found_apart
    left_dense += mixing
    followed = {side.module for group, _ in channels for side in group.sides}
    ran = [g for g in ran if not followed & {side.module for side in g.sides}] + [group for group, _ in channels]
    block_of = _side_by_side(ran, block_of | {group.name: block for group, block in channels}, runs)
    shared = "runs several times, and so does what holds it: put that into a module of its own that runs once"
    failed = {g.name: shared for g in ran if runs[block_of[g.name]] > 1}
    failed |= {**of_several_shapes(calls, ran), **not_batch_first(module, inputs, ran, block_of)}
    failed |= tied(module, ran)
    odd = [g for g in ran if not computes_with_its_weights(module.get_submodule(g.output))]
    failed |= {g.name: f"{g.output} has a forward of its own, which gives more than its weights make" for g in odd}
    uneven = uncuttable(module, inputs, [g for g in ran if g.name not in failed])
    changed = {g.name: g for g in in_another_way(module, inputs, [g for g in ran if g.name in uneven])}
    ran = [changed.get(g.name, g) for g in ran]
    failed |= {name: reason for name, reason in uneven.items() if name not in changed}
    left_dense += [LeftDense(name, reason) for name, reason in failed.items()]
    ran = keep_working_placeholders(module, inputs, [g for g in ran if g.name not in failed])
    ran = [replace(g, parent=None) if g.parent in failed else g for g in ran]
    blocks = tuple(sorted({block_of[g.name] for g in ran}, key=position.__getitem__))
    groups = []
    for group in sorted(ran, key=lambda g: position[g.output]):
        stream = residual_stream(calls, block_of[group.name], group.output, group.axis)
        groups.append(replace(group, layer=blocks.index(block_of[group.name]), stream=stream))
    groups = _with_widths(module, inputs, broadcast_where_it_works(module, inputs, groups))
    structure = Structure(blocks, tuple(groups), 0, tuple(left_dense))
    return replace(structure, tokens=_tokens(calls, structure))


def _apart_in_tuples(
    module: nn.Module, inputs: Mapping[str, Tensor], mixed: Sequence[tuple[Group, str]]
) -> tuple[list[tuple[Group, str]], list[LeftDense]]:
    """Those of these groups of channels, with their blocks, whose tuples stay apart where channels do not, and the
    others. No two meet in a convolution."""
    able = {g.name: g for g in in_another_way(module, inputs, [g for g, _ in mixed])}
    found: list[tuple[Group, str]] = []
    for group, block in mixed:
        ends = {end for other, _ in found for end in (other.name, other.output)}
        if group.name in able and not ends & {group.name, group.output}:
            found.append((able[group.name], block))
    names = {group.name for group, _ in found}
    return found, [LeftDense(g.name, LEAKING) for g, _ in mixed if g.name not in names]


def _with_widths(module: nn.Module, inputs: Mapping[str, Tensor], groups: list[Group]) -> list[Group]:
    """The groups, and behind heads that can get narrower the group of their width."""
    widths = {g.name: width_group(module, g) for g in groups if g.kind == "head"}
    able = {g.name: g for g in narrowable(module, inputs, [w for w in widths.values() if w is not None])}
    for name in uncuttable(module, inputs, list(able.values())):
        del able[name]
    together = []
    for group in groups:
        together.append(group)
        width = widths.get(group.name)
        if width is not None and width.name in able:
            together.append(replace(width, layer=group.layer, stream=group.stream))
    return together


def _tokens(calls: list[Call], structure: Structure) -> int:
    """Tokens that the first block gives for one sample."""
    for call in calls:
        if call.name in structure.blocks[:1] and call.returned is not None:
            return channels_last(call.returned, structure.feature_axis(call.name)).shape[1:-1].numel()
    return 0


def _match_adapters(module: nn.Module) -> tuple[list[Group], list[LeftDense]]:
    """What the adapters say of every submodule; that registered last has the word, and no part is described twice."""
    groups: list[Group] = []
    left_dense: list[LeftDense] = []
    taken: set[tuple[str, str]] = set()
    for name, submodule in module.named_modules():
        parent_name = name.rpartition(".")[0]
        parent = module.get_submodule(parent_name)
        found = [adapt(name, submodule, parent_name, parent) for adapt in reversed(ADAPTERS)] if name else []
        matches = [match for match in found if match is not None]
        described = [m for m in matches if isinstance(m, Group)]
        for group in described:
            sides = {(side.module, side.axis) for side in group.sides}
            if not sides & taken:
                groups.append(group)
                taken |= sides
        if not described:
            left_dense += [m for m in matches if isinstance(m, LeftDense)][:1]
    return groups, left_dense


def _side_by_side(groups: Sequence[Group], block_of: Mapping[str, str], runs: Mapping[str, int]) -> dict[str, str]:
    """The blocks of the groups, none of which holds another: what stands beside blocks in one is one of its own."""
    blocks = {block_of[group.name] for group in groups}
    holding = {b for b in blocks if any(other.startswith(f"{b}.") for other in blocks)}
    found = dict(block_of)
    for group in groups:
        path = _path(group)
        if found[group.name] in holding and found[group.name] in path:
            below = path[path.index(found[group.name]) :]
            found[group.name] = next((p for p in below if p not in holding and runs[p] == 1), below[-1])
    return found


def _path(group: Group) -> list[str]:
    """The modules around a group and its projection, from the outermost on."""
    name, output = group.name.split("."), group.output.split(".")
    shared = takewhile(lambda pair: pair[0] == pair[1], zip(name, output, strict=False))
    parts = [part for part, _ in shared] or name
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def _enclosing_block(module: nn.Module, group: Group, runs: Mapping[str, int]) -> str:
    enclosing = _path(group)[::-1]
    elements = [e for e in enclosing if isinstance(module.get_submodule(e.rpartition(".")[0]), _LISTS)]
    # Where weights are shared, the block is what runs all of them.
    once = [e for e in (*elements, *enclosing) if runs[e] == 1]
    return (once or elements or enclosing)[0]
