"""Which part of a network each of its modules is, for the account of where its time goes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from optin_deploy.nn.flops import flops_by_module
from optin_deploy.structure.groups import Structure
from optin_deploy.tokens.merging import MergingBlocks

ATTENTION, FFN, CONVOLUTION, LEFT_DENSE = "attention", "FFN", "convolutions", "left dense"
NORMS, MERGING, EMBEDDING, HEAD, OTHER = "norms and residual", "merging tokens", "embedding", "head", "other"
PARTS = (ATTENTION, FFN, CONVOLUTION, LEFT_DENSE, NORMS, MERGING, EMBEDDING, HEAD, OTHER)
"""In the order in which they are told."""

_OF_KIND = {"head": ATTENTION, "width": ATTENTION, "neuron": FFN, "channel": CONVOLUTION}


@dataclass(frozen=True)
class Place:
    """The part that a module is, and the block it stands in ("" outside the blocks)."""

    part: str
    block: str = ""


def places(module: nn.Module, structure: Structure) -> dict[str, Place]:
    """Name to place of the modules whose time is told apart, in no order.

    What a block holds beside its attention and FFN is "norms and residual"; what is registered before the blocks is
    "embedding", and what is registered behind them "head".
    """
    found = {name: Place(HEAD if behind else EMBEDDING) for name, behind in _outside(module, structure.blocks)}
    found |= {block: Place(NORMS, block) for block in structure.blocks}
    for left in structure.left_dense:
        block = _block_of(left.module, structure)
        if block:
            found[left.module] = Place(LEFT_DENSE, block)
    for group in structure.groups:
        for owner in group.owners:
            found[owner] = Place(_OF_KIND[group.kind], structure.blocks[group.layer])
    return found


def merging_places(module: nn.Module) -> dict[str, Place]:
    """The same of what merges tokens between the blocks of a pruned network."""
    return {name: Place(MERGING) for name, part in module.named_modules() if isinstance(part, MergingBlocks)}


def own_flops(module: nn.Module, inputs: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, int]:
    """FLOPs for one sample of each named submodule, without those of named submodules inside it; "" has the rest."""
    counts = flops_by_module(module, inputs)
    names = {"", *names}
    own = {name: sum(counts.get(_counted(module, name), {}).values()) for name in names}
    # Innermost first, each gives what is its own to nobody else.
    whole = dict(own)
    for name in names - {""}:
        own[_nearest(name, names)] -= whole[name]
    return own


def narrow_widths(structure: Structure) -> dict[str, tuple[int, ...]]:
    """Widths of the matrix products of every group of a (pruned) network, by the name of its module."""
    widths: dict[str, tuple[int, ...]] = {}
    for group in structure.groups:
        if group.kind != "width":
            product = group.units * group.width
            widths[group.name] = (product,) if group.width == 1 else (product, group.width)
    return widths


def _outside(module: nn.Module, blocks: Iterable[str]) -> list[tuple[str, bool]]:
    """The outermost submodules that hold no block, and whether they are registered behind the first block."""
    ancestors = {"", *(".".join(b.split(".")[:i]) for b in blocks for i in range(1, b.count(".") + 2))}
    found, behind = [], False
    for name, _ in module.named_modules():
        if name in ancestors:
            behind = behind or name in set(blocks)
        elif name.rpartition(".")[0] in ancestors - set(blocks):
            found.append((name, behind))
    return found


def _block_of(name: str, structure: Structure) -> str:
    return next((block for block in structure.blocks if name.startswith(f"{block}.")), "")


def _counted(module: nn.Module, name: str) -> str:
    return f"{type(module).__name__}.{name}" if name else "Global"


def _nearest(name: str, names: set[str]) -> str:
    """The innermost of the names around ``name``; "" is around all."""
    while name:
        name = name.rpartition(".")[0]
        if name in names:
            break
    return name
