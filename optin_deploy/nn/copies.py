"""Copies of modules."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves


def copied(module: nn.Module, memo: Mapping[int, Any] | None = None) -> nn.Module:
    """A deep copy of ``module``. Tensors that a forward pass has left on it are copied without their graph: torch
    copies none that has one.

    Args:
        memo: id of what is not copied -> what takes its place, as for ``copy.deepcopy``.
    """
    cut = {id(t): t.detach().clone() for _, t in kept_tensors(module) if not t.is_leaf}
    return copy.deepcopy(module, {**cut, **(memo or {})})


def sharing(module: nn.Module) -> dict[int, Any]:
    """What to give `copied` for a copy that has the same parameters and buffers."""
    return {id(t): t for t in (*module.parameters(), *module.buffers())}


def kept_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers and the tensors that modules keep as attributes, in lists, tuples and dictionaries too, by name."""
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            if attribute not in ("_parameters", "_modules"):
                where = f"{name}.{attribute}" if name else attribute
                for leaf in tree_leaves(value):
                    if isinstance(leaf, Tensor):
                        yield where, leaf
