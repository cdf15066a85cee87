"""Latency tables: the cost of one type of block at different sizes, in one runtime."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf
from operator import index
from statistics import median
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from profilers.shrinkage import fit_rising_grid, log_error, shrink_to_line
from profilers.stats import paired_ratio


@dataclass(frozen=True)
class Row:
    """One size of one part of the block; all other parts are dense.

    Attributes:
        part: name of the part within the block.
        units: number of units.
        width: of each unit, for heads whose width can be reduced; else None.
        samples_ms: latencies of the stack in milliseconds, rounds × repeats.
    """

    part: str
    units: int
    width: int | None
    samples_ms: list[list[float]]


@dataclass(frozen=True)
class LatencyTable:
    """All rows of one type of block, measured in one interleaved run as stacks of identical blocks.

    Attributes:
        setting: device, threads, runtime and versions, precision, batch size, the block and its inputs.
        depth: number of blocks in a stack.
        depths: samples of the dense block by stack depth: the difference of two depths is the cost of a block without
            the fixed cost of a run.
        rows: the other sizes.
        loads: how often each stack was loaded; the loads took turns.
    """

    setting: Mapping[str, Any]
    depth: int
    depths: Mapping[int, list[list[float]]]
    rows: tuple[Row, ...]
    loads: int = 1

    @property
    def block_ms(self) -> float:
        """Latency of one dense block in milliseconds: the difference of the two depths."""
        few = min(self.depths)
        short = paired_ratio(self.depths[few], self.depths[self.depth])
        return self.dense_ms * (1 - short) / (self.depth - few)

    @property
    def dense_ms(self) -> float:
        """Latency of the stack of ``depth`` dense blocks, in milliseconds."""
        return median(value for turn in self.depths[self.depth] for value in turn)

    def saved_ms(self, row: Row) -> float:
        """Return the latency saved by one block of that size, compared with a dense block, in milliseconds."""
        return self.dense_ms * (1 - paired_ratio(row.samples_ms, self.depths[self.depth])) / self.depth

    def grid(self, part: str) -> tuple[list[int], list[int | None], NDArray[np.float64]]:
        """Return the latency of one block by size of a part.

        Latencies are shrunk toward a linear fit by the measurement noise (see `shrink_to_line`), and are non-decreasing
        in both sizes. The dense block is shrunk like any other size; otherwise its noise would bias every difference.

        Returns:
            Units, widths, and milliseconds relative to the dense block, units × widths. Without units the width does
            not matter.
        """
        rows = [row for row in self.rows if row.part == part]
        units = sorted({row.units for row in rows})
        widths = sorted({row.width for row in rows if row.units}, key=lambda width: width or 0)
        removed_ms = next(-self.saved_ms(row) for row in rows if row.units == 0)
        kept = [row for row in rows if row.units]
        sizes = [(row.units, row.units * (row.width or 0), row.width or 0) for row in kept]
        error = self.dense_ms / self.depth * log_error([row.samples_ms for row in rows], self.loads)
        values = shrink_to_line(sizes, [-self.saved_ms(row) for row in kept], error)
        ms = {(row.units, row.width): value for row, value in zip(kept, values, strict=True)}
        cells = np.array([[ms[n, w] if n else removed_ms for w in widths] for n in units]) - ms[units[-1], widths[-1]]
        return units, widths, np.minimum(fit_rising_grid(cells), 0.0)

    def edges(self, part: str) -> list[int]:
        """Return the largest size at each level of cost of a part, at full width, with 0 and the dense size."""
        units, _, cells = self.grid(part)
        cost = cells[:, -1]
        last = [i for i in range(len(units)) if i + 1 == len(units) or cost[i + 1] > cost[i]]
        return sorted({0, *(units[i] for i in last)})

    def to_dict(self) -> dict[str, Any]:
        """Return a JSON-able dict."""
        return {**asdict(self), "depths": {str(depth): turns for depth, turns in self.depths.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """Return the table that `to_dict` wrote; KeyError, TypeError, ValueError or AttributeError on anything else."""
        rows = tuple(Row(**{**row, "samples_ms": _samples(row["samples_ms"])}) for row in data["rows"])
        depths = {int(depth): _samples(turns) for depth, turns in data["depths"].items()}
        return cls(dict(data["setting"]), index(data["depth"]), depths, rows, index(data["loads"]))


def _samples(data: Sequence[Sequence[float]]) -> list[list[float]]:
    """Return latencies, rounds × repeats; ValueError or TypeError for other data."""
    turns = [[float(ms) for ms in turn] for turn in data]
    if not all(turn and all(0 < ms < inf for ms in turn) for turn in turns):
        raise ValueError("latencies must be above 0 ms, with at least one in each round")
    return turns
