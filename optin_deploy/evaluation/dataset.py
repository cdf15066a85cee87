"""A labelled set and the figure that is measured on it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Dataset:
    """A labelled set. ``measure`` gives its metric, in per cent, for a module in the network's place.

    ``pairs`` says that two texts are one input.
    """

    metric: str
    name: str
    samples: int
    measure: Callable[[nn.Module], float]
    pairs: bool = False
