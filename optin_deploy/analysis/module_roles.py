"""The role of each module in its network (attention, FFN, head, …), for the latency breakdown."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from optin_deploy.nn.flops import FlopCounts
from optin_deploy.nn.names import contains
from optin_deploy.structure.groups import Structure
from optin_deploy.tokens.merging import MergingBlocks

ATTENTION, FFN, CONVOLUTION, LEFT_DENSE = "attention", "FFN", "convolutions", "left dense"
NORMS, MERGING, EMBEDDING, HEAD, OTHER = "norms and residual", "merging tokens", "embedding", "head", "other"
PARTS = (ATTENTION, FFN, CONVOLUTION, LEFT_DENSE, NORMS, MERGING, EMBEDDING, HEAD, OTHER)
"""All roles, in the order of reports."""

_OF_KIND = {"head": ATTENTION, "width": ATTENTION, "neuron": FFN, "channel": CONVOLUTION}


@dataclass(frozen=True)
class ModuleRole:
    """The part of the network that a module belongs to, and its block ("" outside the blocks)."""

    part: str
    block: str = ""


def module_roles(module: nn.Module, structure: Structure) -> dict[str, ModuleRole]:
    """Return module name -> role of the modules whose time is reported separately, in no order.

    Modules of a block other than attention and FFN are "norms and residual". Modules registered before the blocks are
    "embedding", those registered after them "head".
    """
    roles = {name: ModuleRole(HEAD if after else EMBEDDING) for name, after in _outside(module, structure.blocks)}
    roles |= {block: ModuleRole(NORMS, block) for block in structure.blocks}
    for left in structure.left_dense:
        block = _block_of(left.module, structure)
        if block:
            roles[left.module] = ModuleRole(LEFT_DENSE, block)
    for group in structure.groups:
        for owner in group.cost.modules:
            roles[owner] = ModuleRole(_OF_KIND[group.kind], structure.blocks[group.layer])
    return roles


def merging_roles(module: nn.Module) -> dict[str, ModuleRole]:
    """Return module name -> role of the modules that merge tokens between the blocks of a pruned network."""
    return {name: ModuleRole(MERGING) for name, child in module.named_modules() if isinstance(child, MergingBlocks)}


def own_flops(module: nn.Module, inputs: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, int]:
    """Return the FLOPs of one sample by submodule, without named submodules inside it; "" has the rest."""
    counts = FlopCounts(module, inputs)
    names = {"", *names}
    whole = {name: counts.of(name) for name in names}
    # FLOPs of a submodule count only for the innermost name around it.
    exclusive = dict(whole)
    for name in names - {""}:
        exclusive[_nearest(name, names)] -= whole[name]
    return exclusive


def narrow_widths(structure: Structure) -> dict[str, tuple[int, ...]]:
    """Return the widths of the matrix products of every group of a (pruned) network, by module name."""
    widths: dict[str, tuple[int, ...]] = {}
    for group in structure.groups:
        if group.kind != "width":
            product = group.units * group.width
            widths[group.name] = (product,) if group.width == 1 else (product, group.width)
    return widths


def _outside(module: nn.Module, blocks: Iterable[str]) -> list[tuple[str, bool]]:
    """Return the outermost submodules without a block, and whether they are registered after the first block."""
    ancestors = {"", *(".".join(b.split(".")[:i]) for b in blocks for i in range(1, b.count(".") + 2))}
    outermost, after = [], False
    for name, _ in module.named_modules():
        if name in ancestors:
            after = after or name in set(blocks)
        elif name.rpartition(".")[0] in ancestors - set(blocks):
            outermost.append((name, after))
    return outermost


def _block_of(name: str, structure: Structure) -> str:
    return next((block for block in structure.blocks if contains(block, name)), "")


def _nearest(name: str, names: set[str]) -> str:
    """Return the innermost of the names around ``name``; "" is around all."""
    while name:
        name = name.rpartition(".")[0]
        if name in names:
            break
    return name
