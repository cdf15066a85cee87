"""Results about a network's weights, as they are stored in ``report.json``; importing them needs no torch."""

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Sparsity:
    """How sparse the linear layers and convolutions in the blocks of a network are.

    Attributes:
        pattern: two of every four consecutive weights along the input are zero.
        maps: how many of these layers have the pattern.
        zeros: share of zeros among their weights.
        flops_share: their share of the network's FLOPs, with zeros counted like other weights.
        left_dense: names of the layers without the pattern.
    """

    pattern: Literal["2:4"]
    maps: int
    zeros: float
    flops_share: float
    left_dense: tuple[str, ...]
