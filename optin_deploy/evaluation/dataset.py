"""A labelled set and the figure that is measured on it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Dataset:
    """A labelled set. ``measure`` gives its metric, in per cent, for a module in the network's place, in ``steps``.

    ``pairs`` says that two texts are one input.
    """

    metric: str
    name: str
    samples: int
    steps: int
    measure: Callable[[nn.Module, Callable[[int], None]], float]
    pairs: bool = False
