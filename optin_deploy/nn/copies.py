"""Copies of modules."""

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from optin_deploy.errors import UserError


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


def copyable(module: nn.Module) -> nn.Module:
    """``module``; UserError where it cannot be copied, which slicing does."""
    try:
        copied(module, sharing(module))
    except Exception as error:  # whatever an attribute raises
        where = next(_uncopyable(module), "an attribute")
        why = "it holds a tensor with a graph; detach() that" if "graph leaves" in str(error) else line(error)
        raise UserError(
            f"{called(module)} cannot be copied because of {where} ({why}): keep it out of the module"
        ) from error
    return module


def _uncopyable(module: nn.Module) -> Iterator[str]:
    memo = {**sharing(module), **{id(part): part for part in module.modules()}}
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:  # whatever an attribute raises
                yield f"{name}.{attribute}" if name else attribute


def called(module: nn.Module) -> str:
    return type(module).__name__


def line(error: Exception) -> str:
    told = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {told}" if told else type(error).__name__
