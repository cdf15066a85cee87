"""The units that can be removed from a network, as plain values.

A *unit* is a head, a dimension of the width of an attention's heads, an FFN neuron or a channel of a convolution. A
*group* is the set of interchangeable units of one module. Masking, slicing, FLOP counting and compensation read this
description and depend on no model library.
"""

from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor, nn

Kind = Literal["head", "width", "neuron", "channel"]
Placeholder = Literal["constant", "constant_tuple", "pass", "pass_tuple", "no_channels"]


@dataclass(frozen=True)
class LayerAxis:
    """One side of a layer (linear, convolution, batch norm) whose features belong to the units of a group.

    The features are ordered part, unit, feature. ``widths`` stores how many features a unit has in each part. If it is
    empty, every part has the group's width, and the layer has as many parts as fit: three in a fused query-key-value
    projection, one in most other layers. For the width of heads, each head is a part.

    A grouped convolution between two others only has an "out" side: its inputs belong to the same units.
    """

    module: str
    axis: Literal["out", "in"]
    widths: tuple[int, ...] = ()


@dataclass(frozen=True)
class TensorAxis:
    """A parameter or buffer, by its dotted name, with entries of the units of a group along ``dim``.

    They are ordered and counted like the features of a `LayerAxis`.
    """

    tensor: str
    dim: int
    widths: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class OutputSlice:
    """Output features of a linear layer: part number ``part`` of ``parts`` equal parts."""

    module: str
    part: int = 0
    parts: int = 1

    def of(self, features: int) -> slice:
        """Return their indices among ``features``."""
        size = features // self.parts
        return slice(self.part * size, (self.part + 1) * size)


@dataclass(frozen=True)
class Projections:
    """The projections to an attention's queries, keys and values.

    ``scale`` is the ``(module, attribute)`` of the softmax's factor if it has to be 1/√width of the sliced heads, and
    None if it does not change when heads get narrower.
    """

    queries: OutputSlice
    keys: OutputSlice
    values: OutputSlice
    scale: tuple[str, str] | None = None


@dataclass(frozen=True)
class Together:
    """Units of a group that can only be removed together, in tuples of ``size``.

    Of n units, a tuple has those n/size apart (``strided``), which keeps equal parts equal, or consecutive ones.
    """

    size: int
    strided: bool

    def __str__(self) -> str:
        which = f"one of each of {self.size} equal parts" if self.strided else f"{self.size} in a row"
        return f"{which} leave together"

    def tuples(self, units: int) -> tuple[tuple[int, ...], ...]:
        """Return the tuples of units in order. Every unit is in one tuple.

        >>> Together(2, strided=True).tuples(6)
        ((0, 3), (1, 4), (2, 5))
        >>> Together(2, strided=False).tuples(6)
        ((0, 1), (2, 3), (4, 5))
        """
        step, count = (units // self.size, units // self.size) if self.strided else (1, units)
        first = range(count) if self.strided else range(0, count, self.size)
        return tuple(tuple(i + step * j for j in range(self.size)) for i in first)


@dataclass(frozen=True)
class Stream:
    """The residual stream to which the output of a group is added.

    Attributes:
        residual: The module whose first input is the stream. None if another operation comes between the output and
            the addition.
        shortcut: The module whose output is the stream, if ``residual`` is None.
        norm: The batch norm between output and addition.
        scale: The LayerScale parameter between output and addition, after ``norm``.
        in_place: Whether the network changes the output in place or takes it apart. It then cannot be broadcast.
    """

    residual: str | None = None
    shortcut: str | None = None
    norm: str | None = None
    scale: str | None = None
    in_place: bool = False

    @property
    def known(self) -> bool:
        """Whether the module that holds the stream is known."""
        return self.residual is not None or self.shortcut is not None


@dataclass(frozen=True)
class CostModules:
    """The modules whose FLOPs are proportional to the units that a group keeps.

    ``excluded`` lists modules inside ``modules`` whose FLOPs do not depend on the units.
    """

    modules: tuple[str, ...] = ()
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Group:
    """The interchangeable units of one attention, FFN or convolution.

    An adapter sets the fields up to ``placeholders``, and others if its module needs them. `describe` sets ``layer``
    and ``stream``.

    Attributes:
        name: The module that holds the units.
        units: How many units there are.
        width: Features of a unit in the input of ``output``.
        output: The projection after the units. Its input has ``units * width`` features along ``axis``. A unit is
            masked by setting its features there to zero.
        sides: The layer axes that are sliced.
        cost: The modules whose FLOPs are proportional to the units.
        placeholders: ``(module, placeholder)``: what replaces the module when no unit is left. If empty, at least one
            unit is kept.
        entries: Parameters and buffers to slice that no layer of ``sides`` holds.
        attributes: ``(module, attribute)`` whose value is proportional to the units, or is a shape with an axis for
            them.
        axis: The axis of the features in the input and output of ``output``: -1 for tokens, 1 for maps.
        qkv: The projections of heads that may also get narrower. Their width is a group of kind "width" whose parent
            are the heads. Its units are the dimensions of queries, keys and values, in order, the same in all heads.
        parent: The group that this one belongs to, such as the heads for their width, or the channels between the last
            two convolutions of a bottleneck for those between the first two. The FLOPs of modules in the ``cost`` of
            both are proportional to the product of what both keep. The child keeps at least one unit. When the parent
            loses its last unit, the parent's placeholders also replace the child.
        together: Which units can only be removed together, for example because the network splits the units into equal
            parts that it treats differently. None if every unit can be removed alone.
        resizable: The class that the sliced module ``name`` gets, for a module whose own forward does not take the
            widths from its input. It is a subclass of the module's class with the same parameters. If it has a method
            ``keep_units``, slicing calls that with the present units that are kept.
        mask_at: The module in whose input a unit's features are set to zero, if a module that combines units
            (squeeze-and-excitation) comes before ``output``. The features must then be zero before ``output`` too.
        norm_over_units: A norm over all units before ``output``. A unit's features are set to zero both before it and
            before ``output``. The norm still divides by the number of units before pruning.
        layer: Index of the block in `Structure.blocks`.
        stream: The residual stream that the output is added to.
    """

    name: str
    kind: Kind
    units: int
    width: int
    output: str
    sides: tuple[LayerAxis, ...]
    cost: CostModules
    placeholders: tuple[tuple[str, Placeholder], ...] = ()
    entries: tuple[TensorAxis, ...] = ()
    attributes: tuple[tuple[str, str], ...] = ()
    axis: int = -1
    qkv: Projections | None = None
    parent: str | None = None
    together: Together | None = None
    resizable: type[nn.Module] | None = None
    mask_at: str | None = None
    norm_over_units: str | None = None
    layer: int = -1
    stream: Stream = Stream()

    @property
    def min_units(self) -> int:
        """The fewest units that can be kept. Without a residual stream, removing all units would block the signal."""
        return 0 if self.stream.known and self.placeholders else self.step

    @property
    def step(self) -> int:
        """How many units are removed together."""
        return 1 if self.together is None else self.together.size

    @property
    def tuples(self) -> tuple[tuple[int, ...], ...]:
        """The sets of units that are removed together; single units where ``together`` is None."""
        return (self.together or Together(1, strided=False)).tuples(self.units)

    def first(self, count: int) -> tuple[int, ...]:
        """Return the ``count`` units of the first tuples; ``count`` is a multiple of `step`."""
        return tuple(sorted(i for units in self.tuples[: count // self.step] for i in units))


def projections(group: Group) -> Projections:
    """Return the projections of heads that can get narrower, or of their width."""
    if group.qkv is None:
        raise ValueError(f"{group.name} has no projections to queries, keys and values")
    return group.qkv


@dataclass(frozen=True)
class LeftDense:
    """A module that looks prunable but stays dense, and why."""

    module: str
    reason: str


@dataclass(frozen=True)
class Structure:
    """The blocks of a network and the groups inside them, both in the order in which they run.

    ``Group.layer`` is an index into ``blocks``. ``tokens`` is how many tokens the first block outputs for one sample.
    """

    blocks: tuple[str, ...]
    groups: tuple[Group, ...]
    tokens: int
    left_dense: tuple[LeftDense, ...] = ()

    @property
    def compared(self) -> tuple[str, ...]:
        """The blocks that are more than one convolution in a row; all blocks if there are no others."""
        whole = {self.blocks[g.layer] for g in self.groups if g.output != self.blocks[g.layer]}
        return tuple(b for b in self.blocks if b in whole) or self.blocks

    def group(self, name: str) -> Group:
        """Return the group ``name``. Raises KeyError if there is none."""
        for group in self.groups:
            if group.name == name:
                return group
        raise KeyError(name)

    def child(self, parent: str) -> Group | None:
        """Return the group whose parent is the group ``parent``, or None."""
        return next((group for group in self.groups if group.parent == parent), None)

    def without_widths(self) -> "Structure":
        """Return the structure without the groups of heads' widths."""
        return replace(self, groups=tuple(group for group in self.groups if group.kind != "width"))

    def without_tuples(self) -> "Structure":
        """Return the structure with units that can be removed alone."""
        return replace(self, groups=tuple(replace(group, together=None) for group in self.groups))

    def feature_axis(self, block: str) -> int:
        """Return the axis of the features in the output of ``block``: that of its last group."""
        layer = self.blocks.index(block)
        return next((group.axis for group in reversed(self.groups) if group.layer == layer), -1)


def channels_last(x: Tensor, axis: int) -> Tensor:
    """Return ``x`` with the features moved from ``axis`` to the end.

    A map ``(batch, C, H, W)`` has H·W tokens of width C.
    """
    return x.movedim(axis, -1)
