"""Stacks of identical blocks, cut to size: what latency tables are measured on.

A block is taken out of the network with the inputs that it has there, and repeated. Its inputs that belong to the
samples of a batch become the stack's inputs; the others (position tables and the like) are part of it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from optin_deploy.errors import UserError
from optin_deploy.nn.copies import copied
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import sliced

_BATCH = 2


@dataclass(frozen=True)
class BlockType:
    """Blocks that are alike: of one class, with the same groups of the same sizes, given inputs of the same shapes.

    Attributes:
        blocks: their names, in the order they run.
        groups: of each of these blocks, in the same order, its groups.
        given: arguments and keyword arguments of the first one for a batch of two, with the tensors that it got.
    """

    blocks: tuple[str, ...]
    groups: tuple[tuple[Group, ...], ...]
    class_name: str
    given: tuple[tuple[Any, ...], dict[str, Any]]

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the groups within the block, inner ones left out."""
        return tuple(part_name(self.blocks[0], g) for g in self.groups[0] if g.outer is None)

    def describe(self) -> dict[str, Any]:
        """What tells one type from another, JSON-able."""
        groups: list[list[Any]] = []
        for group in self.groups[0]:
            together = [] if group.together is None else [str(group.together)]
            groups.append([part_name(self.blocks[0], group), group.kind, group.units, group.width, *together])
        return {"class": self.class_name, "groups": groups, "inputs": _shapes(self.given)}


def part_name(block: str, group: Group) -> str:
    """The group's name within its block."""
    if group.output == block:
        return group.kind
    return group.name.removeprefix(block).lstrip(".") or group.kind


def block_types(module: nn.Module, structure: Structure, inputs: Mapping[str, Tensor]) -> list[BlockType]:
    """The types of all blocks, from one forward pass of two samples."""
    calls = _calls(module, {block: _entrance(block, _groups(structure, block)) for block in structure.blocks}, inputs)
    alike: dict[str, list[int]] = {}
    for i, block in enumerate(structure.blocks):
        made = _type(module, structure, [block], calls)
        # FLOPs of blocks of one class with the same groups and inputs can differ in what is not pruned.
        sizes = [tuple(p.shape) for p in _block(module, block, made.groups[0]).parameters()]
        alike.setdefault(f"{made.describe()} {sizes}", []).append(i)
    return [_type(module, structure, [structure.blocks[i] for i in of], calls) for of in alike.values()]


def _type(module: nn.Module, structure: Structure, blocks: Sequence[str], calls: Mapping[str, Any]) -> BlockType:
    groups = tuple(_groups(structure, block) for block in blocks)
    return BlockType(tuple(blocks), groups, type(module.get_submodule(blocks[0])).__name__, calls[blocks[0]])


def _groups(structure: Structure, block: str) -> tuple[Group, ...]:
    return tuple(g for g in structure.groups if structure.blocks[g.layer] == block)


def _entrance(block: str, groups: Sequence[Group]) -> str:
    """The module where a block begins: the first one of a pair of convolutions in a row, else the block itself."""
    return groups[0].name if groups[0].output == block else block


def _block(module: nn.Module, block: str, groups: Sequence[Group]) -> nn.Module:
    """The block; of convolutions in a row both, with what stands between, a ReLU for whatever activation is there."""
    if groups[0].output != block:
        return module.get_submodule(block)
    *before, last = [module.get_submodule(owner) for owner in groups[0].owners]
    return nn.Sequential(*before, nn.ReLU(), last)


@torch.no_grad()
def _calls(module: nn.Module, entrances: Mapping[str, str], inputs: Mapping[str, Tensor]) -> dict[str, Any]:
    """Arguments and keyword arguments of the first call of every block's entrance."""
    calls: dict[str, Any] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            # Cloned, because the network may change them in place.
            calls.setdefault(name, pytree.tree_map_only(Tensor, torch.clone, (args, kwargs)))

        return hook

    handles = [
        module.get_submodule(entrance).register_forward_pre_hook(note(block), with_kwargs=True)
        for block, entrance in entrances.items()
    ]
    try:
        module(**{name: t[:1].repeat_interleave(_BATCH, 0) for name, t in inputs.items()})
    finally:
        for handle in handles:
            handle.remove()
    return calls


class Stack(nn.Module):
    """Copies of a block in a row, each given what the one before it gives; side by side, their outputs added, where a
    block's output does not fit its input. Inputs are named ``x0``, ``x1``, …; the first runs through the blocks."""

    def __init__(self, block: nn.Module, depth: int, given: tuple[tuple[Any, ...], dict[str, Any]]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(copied(block) for _ in range(depth))
        leaves, self.layout = pytree.tree_flatten(given)
        self.batched = [i for i, leaf in enumerate(leaves) if _is_batched(leaf)]
        self.others = {i: leaf for i, leaf in enumerate(leaves) if i not in self.batched and not _is_tensor(leaf)}
        for i, leaf in enumerate(leaves):
            if _is_tensor(leaf) and i not in self.batched:
                self.register_buffer(f"given{i}", leaf)
        streams = [i for i in self.batched if leaves[i].is_floating_point()]
        if not streams:
            raise UserError(
                f"{type(block).__name__} is given no tensor per sample: its latency cannot be measured alone"
            )
        self.stream = streams[0]
        self.leaves = len(leaves)
        with torch.no_grad():
            self.in_a_row = self._run(self.blocks[0], leaves).shape == leaves[self.stream].shape

    def forward(self, **inputs: Tensor) -> Tensor:
        """The last block's first output, or the sum of all."""
        leaves: list[Any] = [self.others.get(i) for i in range(self.leaves)]
        for i in range(self.leaves):
            if hasattr(self, f"given{i}"):
                leaves[i] = getattr(self, f"given{i}")
        for number, i in enumerate(self.batched):
            leaves[i] = inputs[f"x{number}"]
        total: Tensor | None = None
        for block in self.blocks:
            output = self._run(block, leaves)
            if self.in_a_row:
                leaves[self.stream] = output
            total = output if total is None or self.in_a_row else total + output
        assert total is not None
        return total

    def _run(self, block: nn.Module, leaves: Sequence[Any]) -> Tensor:
        args, kwargs = pytree.tree_unflatten(list(leaves), self.layout)
        output = block(*args, **kwargs)
        while not isinstance(output, Tensor):
            output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
        return output


def stack(
    module: nn.Module, structure: Structure, kind: BlockType, sizes: Mapping[str, int], depth: int
) -> tuple[Stack, dict[str, Tensor]]:
    """So many copies of the block, its groups cut to ``sizes`` (group name -> units), and inputs for two samples."""
    cut = sliced(module, structure, Plan({n: structure.group(n).first(units) for n, units in sizes.items()}))
    made = Stack(_block(cut, kind.blocks[0], kind.groups[0]), depth, kind.given).eval()
    leaves = pytree.tree_leaves(kind.given)
    return made, {f"x{number}": leaves[i] for number, i in enumerate(made.batched)}


def _is_tensor(leaf: Any) -> bool:
    return isinstance(leaf, Tensor)


def _is_batched(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == _BATCH


def _shapes(given: Any) -> list[Any]:
    leaves = pytree.tree_leaves(given)
    return [[1, *leaf.shape[1:]] if _is_batched(leaf) else list(leaf.shape) for leaf in leaves if _is_tensor(leaf)]
