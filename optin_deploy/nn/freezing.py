"""Freeze the parameters of a module for a while."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def freeze_parameters(module: nn.Module) -> Iterator[None]:
    """Switch off the gradients of all parameters while the context lasts."""
    wanted = [p for p in module.parameters() if p.requires_grad]
    for parameter in wanted:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
