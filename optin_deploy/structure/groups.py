"""What can be removed from a network, as plain values.

A *unit* is a head or an FFN neuron; a *group* is the set of interchangeable units of one module. Masking, slicing,
counting and compensation all read this description and know no model library.
"""

from dataclasses import dataclass
from typing import Literal

from torch import nn

Kind = Literal["head", "neuron"]
StandIn = Literal["constant", "constant_tuple", "pass", "pass_tuple"]


@dataclass(frozen=True)
class Side:
    """One side of a linear layer whose features belong to the units of a group.

    The side has ``parts * units * width`` features, ordered part, unit, feature: a fused query-key-value projection
    has three parts, every other layer one.
    """

    module: str
    axis: Literal["out", "in"]
    parts: int = 1


@dataclass(frozen=True)
class Group:
    """The interchangeable units of one attention or FFN.

    ``output`` names the projection behind the units: its input has ``units * width`` features, and a unit is masked by
    setting its features to zero there. ``owners`` are the modules whose FLOPs are proportional to the units kept.
    ``attributes`` are ``(module, attribute, value per unit)`` to be set when units leave. ``stand_ins`` say what takes
    the place of which module when no unit is left. ``residual`` names the module whose first input is the residual
    stream that the output is added to, ``scale`` the LayerScale parameter between the two; ``residual`` is None where
    something else than LayerScale stands between.
    """

    name: str
    kind: Kind
    units: int
    width: int
    output: str
    sides: tuple[Side, ...]
    owners: tuple[str, ...]
    stand_ins: tuple[tuple[str, StandIn], ...]
    attributes: tuple[tuple[str, str, int], ...] = ()
    residual: str | None = None
    scale: str | None = None
    layer: int = -1


@dataclass(frozen=True)
class LeftDense:
    """A module that looks prunable but is left as it is, and why."""

    module: str
    reason: str


@dataclass(frozen=True)
class Structure:
    """The blocks of a network in the order they run, and the groups inside them in that order.

    ``Group.layer`` is an index into ``blocks``; ``tokens`` is how many the first block gives for one sample.
    """

    blocks: tuple[str, ...]
    groups: tuple[Group, ...]
    tokens: int
    left_dense: tuple[LeftDense, ...] = ()

    def group(self, name: str) -> Group:
        """The group of that name; KeyError if there is none."""
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)


def child(module: nn.Module, name: str) -> nn.Module | None:
    """The submodule ``name``, dots allowed, or None."""
    for part in name.split("."):
        found = getattr(module, part, None)
        if not isinstance(found, nn.Module):
            return None
        module = found
    return module


def join(*parts: str) -> str:
    """Dotted name of the parts that are not empty."""
    return ".".join(p for p in parts if p)
