"""Milliseconds as a cost: what every group saves at every size, by latency tables, on the scale of the network."""

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

# Part of a network's latency that removing every unit saves, at most.
_MOST_SAVED = 0.99


@dataclass(frozen=True)
class Curve:
    """What a group costs at its sizes, against all of it: ``ms[i, j]``, at most 0, at ``units[i]``, ``widths[j]``."""

    units: tuple[int, ...]
    widths: tuple[int | None, ...]
    ms: NDArray[np.float64]

    def at(self, units: int, width: int | None) -> float:
        """The milliseconds at a size, linear between those measured. Narrower than the narrowest measured counts as
        that."""
        columns = [float(np.interp(units, self.units, column)) for column in self.ms.T]
        if width is None or len(columns) == 1:
            return columns[-1]
        return float(np.interp(width, [w for w in self.widths if w is not None], columns))


@dataclass(frozen=True)
class LatencyCosts:
    """The latency of a network in one runtime, in milliseconds: `costs.CostModel`.

    The dense network's, less what the groups' sizes save. ``factor`` corrects all savings alike, after a real network
    has been measured. Where tokens merge, ``merged_ms`` is what that adds to the network with all units, below 0 where
    it pays, and ``parts`` say how much of what its sizes save is left of a group, all of it where it is not named.
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
        """What a size costs above the floor."""
        curve = self.curves[group]
        return self.factor * self.parts.get(group, 1.0) * (curve.at(units, width) - curve.at(0, None))

    def of(self, plan: Plan) -> float:
        """The latency of the network that ``plan`` leaves."""
        return self.floor + sum(self.option(name, *kept_size(self, plan, name)) for name in self.curves)

    def merging(self, parts: Mapping[str, float], measured_ms: float) -> "LatencyCosts":
        """The same where tokens merge, by what the network with all units then takes."""
        return replace(self, parts=parts, merged_ms=measured_ms - self.total)

    def corrected(self, plan: Plan, measured_ms: float) -> "LatencyCosts":
        """The same, its savings scaled so that ``plan`` comes out at what it was measured at."""
        whole = self.total + self.merged_ms
        predicted = whole - self.of(plan)
        # A network that saves next to nothing tells nothing about savings; noise must not turn them around.
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
    """The costs of a network whose dense latency is ``dense_ms``.

    Args:
        tables: every type of block with its table.
        block_scale: for each table, what its milliseconds are to be multiplied with to be those of the time at which
            ``dense_ms`` was measured.
    """
    curves = {}
    for (kind, table), scale in zip(tables, block_scale, strict=True):
        for block, groups in zip(kind.blocks, kind.groups, strict=True):
            for group in groups:
                if group.outer is None:
                    units, widths, ms = table.grid(part_name(block, group))
                    curves[group.name] = Curve(tuple(units), tuple(widths), ms * scale)
    saved = -sum(curve.at(0, None) for curve in curves.values())
    # Noise can make the blocks together take longer than the network that they are of.
    factor = min(1.0, _MOST_SAVED * dense_ms / saved) if saved > 0 else 1.0
    return LatencyCosts(
        dense_ms,
        {g.name: g.units for g in structure.groups},
        {g.outer: g.name for g in structure.groups if g.outer is not None},
        curves,
        factor,
    )
