"""Milliseconds as a cost: what each group saves at each size, by latency tables, scaled to the whole network."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from optin_deploy.latency.block_stacks import BlockType, part_name
from optin_deploy.search.costs import kept_size
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan
from profilers.latency_table import LatencyTable

# Removing every unit saves at most this part of a network's latency.
_MOST_SAVED = 0.99


@dataclass(frozen=True)
class Curve:
    """The cost of a group by its size, relative to the whole group.

    ``ms[i, j]``, at most 0, is the cost at ``units[i]`` and ``widths[j]``.
    """

    units: tuple[int, ...]
    widths: tuple[int | None, ...]
    ms: NDArray[np.float64]

    def at(self, units: int, width: int | None) -> float:
        """Return the milliseconds at a size, interpolated; widths below the narrowest one measured cost the same."""
        columns = [float(np.interp(units, self.units, column)) for column in self.ms.T]
        if width is None or len(columns) == 1:
            return columns[-1]
        return float(np.interp(width, [w for w in self.widths if w is not None], columns))


@dataclass(frozen=True)
class LatencyCosts:
    """The latency of a network in one runtime, in milliseconds, as a `CostModel`.

    Attributes:
        total: of the dense network.
        units: of each group.
        widths: the inner group of each group that has one.
        curves: what each outer group costs by its size.
        factor: multiplies all savings, after a real network was measured.
        parts: where tokens merge, the part of its savings that is left of a group; 1 for groups that are not named.
        merged_ms: what merging adds to the network with all units, below 0 where it pays.
    """

    total: float
    units: Mapping[str, int]
    widths: Mapping[str, str]
    curves: Mapping[str, Curve]
    factor: float = 1.0
    parts: Mapping[str, float] = field(default_factory=dict)
    merged_ms: float = 0.0

    @cached_property
    def floor(self) -> float:
        """The latency with every unit removed."""
        saved = sum(self.parts.get(name, 1.0) * curve.at(0, None) for name, curve in self.curves.items())
        return self.total + self.merged_ms + self.factor * saved

    def option(self, group: str, units: int, width: int | None) -> float:
        """Return what a size costs above the floor."""
        curve = self.curves[group]
        return self.factor * self.parts.get(group, 1.0) * (curve.at(units, width) - curve.at(0, None))

    def of(self, plan: Plan) -> float:
        """Return the latency of the network that ``plan`` leaves."""
        return self.floor + sum(self.option(name, *kept_size(self, plan, name)) for name in self.curves)

    def merging(self, parts: Mapping[str, float], measured_ms: float) -> "LatencyCosts":
        """Return the costs where tokens merge, by the latency of the network with all units then."""
        return replace(self, parts=parts, merged_ms=measured_ms - self.total)

    def corrected(self, plan: Plan, measured_ms: float) -> "LatencyCosts":
        """Return the costs with savings scaled so that ``plan`` costs what was measured."""
        whole = self.total + self.merged_ms
        predicted = whole - self.of(plan)
        # A network that saves next to nothing shows nothing about savings; noise must not change their sign.
        if predicted <= 0.02 * self.total:
            return self
        wanted = self.factor * (whole - measured_ms) / predicted
        return replace(self, factor=float(np.clip(wanted, 0.25 * self.factor, 4 * self.factor)))


def latency_costs(
    structure: Structure,
    tables: list[tuple[BlockType, LatencyTable]],
    dense_ms: float,
    block_scale: list[float],
) -> LatencyCosts:
    """Return the costs of a network whose dense latency is ``dense_ms``.

    Args:
        tables: every type of block with its table.
        block_scale: for each table, the factor from its milliseconds to those of the time at which ``dense_ms`` was
            measured.
    """
    curves = {}
    for (kind, table), scale in zip(tables, block_scale, strict=True):
        for block, groups in zip(kind.blocks, kind.groups, strict=True):
            for group in groups:
                if group.parent is None:
                    units, widths, ms = table.grid(part_name(block, group))
                    curves[group.name] = Curve(tuple(units), tuple(widths), ms * scale)
    saved = -sum(curve.at(0, None) for curve in curves.values())
    # Noise can make the blocks together take longer than the network.
    factor = min(1.0, _MOST_SAVED * dense_ms / saved) if saved > 0 else 1.0
    return LatencyCosts(
        dense_ms,
        {g.name: g.units for g in structure.groups},
        {g.parent: g.name for g in structure.groups if g.parent is not None},
        curves,
        factor,
    )
