"""From a module to its `Structure`: which groups it has, in which blocks, and how the network runs through them."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

# Importing an adapter file registers its adapters.
from optin_deploy.structure import timm, transformers  # noqa: F401
from optin_deploy.structure.groups import Group, LeftDense, Structure
from optin_deploy.structure.registry import ADAPTERS
from optin_deploy.structure.residual import Call, residual_stream, trial_forward


def describe(module: nn.Module, inputs: Mapping[str, Tensor]) -> Structure:
    """Find the prunable groups of ``module``; one trial forward on ``inputs`` (the sample batch) gives their order.

    A group's block is the innermost enclosing element of a ``ModuleList`` or ``Sequential``. The structure has no
    groups when nothing prunable is found.
    """
    found, left_dense = _match_adapters(module)
    block_of = {group.name: _enclosing_block(module, group.name) for group in found}
    watched = {*block_of.values(), *(g.output for g in found)}
    calls = trial_forward(module, inputs)
    position = {call.name: i for i, call in reversed(list(enumerate(calls))) if call.name in watched}
    blocks = tuple(sorted((b for b in set(block_of.values()) if b in position), key=position.__getitem__))
    ran = [g for g in found if g.output in position]
    left_dense += [LeftDense(g.name, "does not run in a forward pass") for g in found if g.output not in position]
    groups = []
    for group in sorted(ran, key=lambda g: position[g.output]):
        residual, scale = residual_stream(calls, block_of[group.name], group.output)
        layer = blocks.index(block_of[group.name])
        groups.append(replace(group, layer=layer, residual=residual, scale=scale))
    return Structure(blocks, tuple(groups), _tokens(calls, blocks), tuple(left_dense))


def _tokens(calls: list[Call], blocks: tuple[str, ...]) -> int:
    features = next((c.returned for c in calls if blocks and c.name == blocks[0] and c.returned is not None), None)
    return features.shape[1:-1].numel() if features is not None else 0


def _match_adapters(module: nn.Module) -> tuple[list[Group], list[LeftDense]]:
    groups: list[Group] = []
    left_dense: list[LeftDense] = []
    for name, submodule in module.named_modules():
        parent_name = name.rpartition(".")[0]
        for adapt in ADAPTERS:
            match = adapt(name, submodule, parent_name, module.get_submodule(parent_name)) if name else None
            if isinstance(match, Group):
                groups.append(match)
            elif match is not None:
                left_dense.append(match)
    return groups, left_dense


def _enclosing_block(module: nn.Module, name: str) -> str:
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        parent = module.get_submodule(".".join(parts[: length - 1]))
        if isinstance(parent, nn.ModuleList | nn.Sequential):
            return ".".join(parts[:length])
    return name
