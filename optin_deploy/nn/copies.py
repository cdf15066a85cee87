"""Copies of modules."""

import copy
from collections.abc import Iterator, Mapping

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from optin_deploy.errors import UserError


def copy_module(module: nn.Module, memo: Mapping[int, object] | None = None) -> nn.Module:
    """Return a deep copy of ``module``. Tensors that a forward pass has left on it are copied without their graphs.

    Args:
        memo: Replacements by id, as for ``copy.deepcopy``.
    """
    cut = {id(t): t.detach().clone() for _, t in kept_tensors(module) if not t.is_leaf}
    return copy.deepcopy(module, {**cut, **(memo or {})})


def shared_tensors(module: nn.Module) -> dict[int, object]:
    """Return the ``memo`` for a copy that shares parameters and buffers."""
    return {id(t): t for t in (*module.parameters(), *module.buffers())}


def kept_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yield buffers and tensors that are attributes of modules or in their lists, tuples and dictionaries, by name."""
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            if attribute not in ("_parameters", "_modules"):
                where = f"{name}.{attribute}" if name else attribute
                for leaf in tree_leaves(value):
                    if isinstance(leaf, Tensor):
                        yield where, leaf


def check_copyable(module: nn.Module) -> nn.Module:
    """Return ``module`` if it can be copied, as slicing does.

    Raises:
        UserError: It cannot be copied.
    """
    try:
        copy_module(module, shared_tensors(module))
    except Exception as error:  # whatever an attribute raises
        where = next(_uncopyable(module), "an attribute")
        why = "it holds a tensor with a graph; detach() that" if "graph leaves" in str(error) else error_line(error)
        raise UserError(
            f"{class_name_of(module)} cannot be copied because of {where} ({why}): keep it out of the module"
        ) from error
    return module


def _uncopyable(module: nn.Module) -> Iterator[str]:
    memo = {**shared_tensors(module), **{id(part): part for part in module.modules()}}
    for name, part in module.named_modules():
        for attribute, value in vars(part).items():
            try:
                copy.deepcopy(value, dict(memo))
            except Exception:  # whatever an attribute raises
                yield f"{name}.{attribute}" if name else attribute


def class_name_of(module: nn.Module) -> str:
    """Return the name of the module's class."""
    return type(module).__name__


def error_line(error: Exception) -> str:
    """Return an error's class and message on one line."""
    message = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {message}" if message else type(error).__name__
