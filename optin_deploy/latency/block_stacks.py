"""Stacks of identical blocks, cut to size, which latency tables are measured on.

A block is taken out of the network with the inputs that it has there, and repeated. Inputs with a batch axis become the
stack's inputs. Other inputs, such as position tables, become part of the stack.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypedDict

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from optin_deploy.errors import UserError
from optin_deploy.nn.copies import copy_module
from optin_deploy.nn.hooks import forward_hooks
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

_BATCH = 2
Call = tuple[tuple[object, ...], dict[str, object]]
"""Arguments and keyword arguments of one call."""
BlockDescription = TypedDict(
    "BlockDescription", {"class": str, "groups": list[list[str | int]], "inputs": list[list[int]]}
)


@dataclass(frozen=True)
class BlockType:
    """Blocks of one class, with the same groups of the same sizes and inputs of the same shapes.

    Attributes:
        blocks: their names, in the order they run.
        groups: for each of these blocks, its groups, in the same order.
        call: arguments of the first block for a batch of two, with their values.
    """

    blocks: tuple[str, ...]
    groups: tuple[tuple[Group, ...], ...]
    class_name: str
    call: Call

    @property
    def outer_groups(self) -> tuple[Group, ...]:
        """The groups of the first block, inner ones left out."""
        return tuple(group for group in self.groups[0] if group.parent is None)

    @property
    def parts(self) -> tuple[str, ...]:
        """Names of the outer groups within the block."""
        return tuple(part_name(self.blocks[0], group) for group in self.outer_groups)

    def describe(self) -> BlockDescription:
        """Return what distinguishes this type from others, as JSON-able values."""
        groups: list[list[str | int]] = []
        for group in self.groups[0]:
            together = [] if group.together is None else [str(group.together)]
            groups.append([part_name(self.blocks[0], group), group.kind, group.units, group.width, *together])
        tensors = [leaf for leaf in pytree.tree_leaves(self.call) if isinstance(leaf, Tensor)]
        inputs = [[1, *tensor.shape[1:]] if _is_batched(tensor) else list(tensor.shape) for tensor in tensors]
        return {"class": self.class_name, "groups": groups, "inputs": inputs}


def part_name(block: str, group: Group) -> str:
    """Return the group's name within its block."""
    if group.output == block:
        return group.kind
    return group.name.removeprefix(block).lstrip(".") or group.kind


def block_types(module: nn.Module, structure: Structure, inputs: Mapping[str, Tensor]) -> list[BlockType]:
    """Return the types of all blocks, from one forward pass of two samples."""
    groups = {
        block: tuple(g for g in structure.groups if structure.blocks[g.layer] == block) for block in structure.blocks
    }
    calls = _record_calls(module, {block: _entrance(block, groups[block]) for block in groups}, inputs)

    def type_of(blocks: Sequence[str]) -> BlockType:
        first = blocks[0]
        kind = type(module.get_submodule(first)).__name__
        return BlockType(tuple(blocks), tuple(groups[block] for block in blocks), kind, calls[first])

    alike: dict[str, list[str]] = {}
    for block in structure.blocks:
        # FLOPs of blocks of one class with the same groups and inputs can differ in what is not pruned.
        shapes = [tuple(p.shape) for p in _block_module(module, block, groups[block]).parameters()]
        alike.setdefault(f"{type_of([block]).describe()} {shapes}", []).append(block)
    return [type_of(blocks) for blocks in alike.values()]


def _entrance(block: str, groups: Sequence[Group]) -> str:
    """Return the module where a block begins: the first of a pair of convolutions, else the block itself."""
    return groups[0].name if groups[0].output == block else block


def _block_module(module: nn.Module, block: str, groups: Sequence[Group]) -> nn.Module:
    """Return the block; for a pair of convolutions both, with a ReLU for the activation between them."""
    if groups[0].output != block:
        return module.get_submodule(block)
    *before, last = [module.get_submodule(owner) for owner in groups[0].cost.modules]
    return nn.Sequential(*before, nn.ReLU(), last)


@torch.no_grad()
def _record_calls(module: nn.Module, entrances: Mapping[str, str], inputs: Mapping[str, Tensor]) -> dict[str, Call]:
    """Return the first call of every block's entrance, by block."""
    calls: dict[str, Call] = {}

    def record(entrance: str, _: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        # Cloned, because the network may change them in place.
        calls.setdefault(entrance, pytree.tree_map_only(Tensor, torch.clone, (args, kwargs)))

    with forward_hooks(module, entrances.values(), before=record):
        module(**{name: t[:1].repeat_interleave(_BATCH, 0) for name, t in inputs.items()})
    return {block: calls[entrance] for block, entrance in entrances.items() if entrance in calls}


class Stack(nn.Module):
    """Copies of a block, each of which takes the output of the one before it.

    Where a block's output does not fit its input, all copies take the same input and their outputs are added. Inputs
    are named ``x0``, ``x1``, …; the first one runs through the blocks.
    """

    def __init__(self, block: nn.Module, depth: int, call: Call) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(copy_module(block) for _ in range(depth))
        leaves, self.layout = pytree.tree_flatten(call)
        self.batched = [i for i, leaf in enumerate(leaves) if _is_batched(leaf)]
        self.others = {i: leaf for i, leaf in enumerate(leaves) if not isinstance(leaf, Tensor)}
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and i not in self.batched:
                self.register_buffer(f"fixed{i}", leaf)
        streams = [i for i in self.batched if leaves[i].is_floating_point()]
        if not streams:
            raise UserError(
                f"{type(block).__name__} takes no tensor with a batch axis: its latency cannot be measured alone"
            )
        self.stream = streams[0]
        self.leaves = len(leaves)
        with torch.no_grad():
            self.in_a_row = self._run(self.blocks[0], leaves).shape == leaves[self.stream].shape

    def forward(self, **inputs: Tensor) -> Tensor:
        """Return the last block's first output, or the sum of all first outputs."""
        leaves: list[object] = [self.others.get(i, getattr(self, f"fixed{i}", None)) for i in range(self.leaves)]
        for number, i in enumerate(self.batched):
            leaves[i] = inputs[f"x{number}"]
        total = self._run(self.blocks[0], leaves)
        for block in self.blocks[1:]:
            if self.in_a_row:
                leaves[self.stream] = total
            output = self._run(block, leaves)
            total = output if self.in_a_row else total + output
        return total

    def _run(self, block: nn.Module, leaves: Sequence[object]) -> Tensor:
        args, kwargs = pytree.tree_unflatten(list(leaves), self.layout)
        output = block(*args, **kwargs)
        while not isinstance(output, Tensor):
            output = next(iter(output.values())) if isinstance(output, Mapping) else output[0]
        return output


def build_stack(
    module: nn.Module, structure: Structure, kind: BlockType, sizes: Mapping[str, int], depth: int
) -> tuple[Stack, dict[str, Tensor]]:
    """Return ``depth`` copies of the block, and inputs for two samples.

    Args:
        sizes: group name -> units that it is cut to.
    """
    cut = slice_network(module, structure, Plan({n: structure.group(n).first(units) for n, units in sizes.items()}))
    stack = Stack(_block_module(cut, kind.blocks[0], kind.groups[0]), depth, kind.call).eval()
    leaves = pytree.tree_leaves(kind.call)
    return stack, {f"x{number}": leaves[i] for number, i in enumerate(stack.batched)}


def _is_batched(leaf: object) -> bool:
    return isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == _BATCH
