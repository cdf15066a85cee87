"""The inner channels of residual CNN blocks, wherever they stand: timm's, torchvision's or your own ``BasicBlock``.

A block is recognised by the convolutions it holds. That its forward pass runs them one after the other, and that
nothing else sees the channels between them, is tried on the sample batch.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.structure.groups import Group, LeftDense, Side, child, join
from optin_deploy.structure.registry import adapter
from optin_deploy.structure.residual import Call, same_tensor


@adapter
def basic_block(name: str, module: nn.Module, parent_name: str, parent: nn.Module) -> Group | LeftDense | None:
    """Channels between the two convolutions of a residual block: ``conv1``, ``bn1``, ``conv2``."""
    conv1, norm, conv2 = (child(module, n) for n in ("conv1", "bn1", "conv2"))
    if not isinstance(conv1, nn.Conv2d) or norm is None or not isinstance(conv2, nn.Conv2d):
        return None
    if child(module, "conv3") is not None:
        return LeftDense(name, "a bottleneck: its middle convolution belongs to two groups, so costs do not add up")
    for layer, plain in ((conv1, nn.Conv2d), (norm, nn.BatchNorm2d), (conv2, nn.Conv2d)):
        if type(layer) is not plain:
            return LeftDense(name, f"has a {type(layer).__name__} where a plain {plain.__name__} is needed")
    assert isinstance(norm, nn.BatchNorm2d)
    if conv1.groups != 1 or conv2.groups != 1:
        return LeftDense(name, "a grouped convolution")
    if not conv1.out_channels == norm.num_features == conv2.in_channels:
        return LeftDense(name, "bn1 and conv2 do not take the channels of conv1")
    first, between, second = (join(name, n) for n in ("conv1", "bn1", "conv2"))
    return Group(
        name=first,
        kind="channel",
        units=conv1.out_channels,
        width=1,
        output=second,
        sides=(Side(first, "out"), Side(between, "out"), Side(second, "in")),
        owners=(first, between, second),
        stand_ins=((first, "no_channels"), (between, "pass"), (second, "constant")),
        axis=1,
    )


def entangled(
    module: nn.Module, inputs: Mapping[str, Tensor], calls: Sequence[Call], groups: Sequence[Group]
) -> dict[str, str]:
    """Which of these groups of channels cannot be cut, and why: group name -> reason.

    Args:
        calls: of the trial forward of ``module`` on ``inputs``.
    """
    reasons = {group.name: reason for group in groups if (reason := _not_in_sequence(calls, group))}
    rest = [group for group in groups if group.name not in reasons]
    return {**reasons, **dict.fromkeys(_leaking(module, inputs, calls, rest), "its channels do not stay apart")}


def _not_in_sequence(calls: Sequence[Call], group: Group) -> str | None:
    """Why the modules of the group do not run one after the other, with only what has no parameters between them."""
    found = [[i for i, call in enumerate(calls) if call.name == side.module] for side in group.sides]
    if any(len(indices) != 1 for indices in found):
        return "its convolutions do not run exactly once"
    conv1, norm, conv2 = (calls[indices[0]] for indices in found)
    if norm.given is None or conv1.returned is None or not same_tensor(norm.given, conv1.returned):
        return "bn1 does not take what conv1 gives"
    if conv2.given is None or norm.returned is None or conv2.given.shape != norm.returned.shape:
        return "something between its convolutions changes the size"
    for call in calls[found[1][0] + 1 : found[2][0]]:
        if any(True for _ in (*call.module.parameters(), *call.module.buffers())):
            return f"{call.name.rpartition('.')[2]} stands between its convolutions"
    return None


def disturb(_: nn.Module, __: Any, output: Tensor) -> Tensor:
    """A forward hook: every second channel gives other values."""
    changed = output.clone()
    changed[:, 1::2] = 1 - changed[:, 1::2]
    return changed


@torch.no_grad()
def _leaking(
    module: nn.Module, inputs: Mapping[str, Tensor], calls: Sequence[Call], groups: Sequence[Group]
) -> set[str]:
    """The groups of which a channel reaches more than its own place before ``output``.

    In one forward pass every second channel of every ``conv1`` gives other values. Before ``conv2`` the other channels
    must be as they were; with all put back there, so must be what the block gives. That too is put back, so that one
    block's fault is not seen as the next one's.
    """
    recorded = {call.name: call for call in calls}
    leaking: set[str] = set()

    def restore_input(group: Group) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            expected = recorded[group.output].given
            assert expected is not None
            if not same_tensor(args[0][:, ::2], expected[:, ::2]):
                leaking.add(group.name)
            return (expected.clone(), *args[1:])

        return hook

    def restore_output(group: Group, holder: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> Any:
            expected = recorded[holder].returned if holder in recorded else None
            if not isinstance(output, Tensor) or expected is None or not same_tensor(output, expected):
                leaking.add(group.name)
            return expected.clone() if isinstance(output, Tensor) and expected is not None else output

        return hook

    handles = []
    for group in groups:
        holder = group.output.rpartition(".")[0]
        handles.append(module.get_submodule(group.name).register_forward_hook(disturb))
        handles.append(module.get_submodule(group.output).register_forward_pre_hook(restore_input(group)))
        handles.append(module.get_submodule(holder).register_forward_hook(restore_output(group, holder)))
    try:
        if groups:
            module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return leaking
