"""Dotted names of modules."""

from torch import nn


def join(*parts: str) -> str:
    """Return the dotted name of the parts that are not empty."""
    return ".".join(part for part in parts if part)


def child(module: nn.Module, name: str) -> nn.Module | None:
    """Return the submodule ``name`` of ``module``, dots allowed, or None."""
    for part in name.split("."):
        submodule = getattr(module, part, None)
        if not isinstance(submodule, nn.Module):
            return None
        module = submodule
    return module


def contains(outer: str, name: str) -> bool:
    """Return whether the module ``name`` lies inside the module ``outer``.

    >>> contains("blocks.1", "blocks.1.attn"), contains("blocks.1", "blocks.1"), contains("blocks.1", "blocks.10")
    (True, False, False)
    """
    return name.startswith(f"{outer}.")


def is_inside(name: str, outer: str) -> bool:
    """Return whether ``name`` is the module ``outer`` or lies inside it."""
    return name == outer or contains(outer, name)
