"""Latency tables: what the sizes of one type of block cost in one runtime, measured once and kept in a cache."""

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import inf, isfinite
from operator import index
from pathlib import Path
from statistics import median
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from profilers.errors import ProfilingError
from profilers.stats import paired_ratio

# Counted up when what is measured, or how, changes: older tables are then not found.
_LAYOUT = 3
# What files that are no tables raise when they are read as such.
_DAMAGED = (ArithmeticError, AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError)


@dataclass(frozen=True)
class Row:
    """One size of one part of the block, every other part dense.

    Attributes:
        part: name of the part within the block.
        units: how many it keeps.
        width: of each unit, for heads that can get narrower; None elsewhere.
        samples_ms: latencies of the stack in milliseconds, rounds × repeats.
    """

    part: str
    units: int
    width: int | None
    samples_ms: list[list[float]]


@dataclass(frozen=True)
class LatencyTable:
    """All rows of one type of block, measured in one interleaved run as stacks of ``depth`` identical blocks.

    ``setting`` is what the figures hold for: device, threads, runtime and versions, precision, batch size, the block
    and its inputs. ``depths`` has the dense block's samples by stack depth: the difference of two depths is a block
    without the fixed cost of a run. Every stack was loaded ``loads`` times, and these took turns.
    """

    setting: Mapping[str, Any]
    depth: int
    depths: Mapping[int, list[list[float]]]
    rows: tuple[Row, ...]
    loads: int = 1

    @property
    def block_ms(self) -> float:
        """Latency of one dense block, by differencing the two depths, in milliseconds."""
        few = min(self.depths)
        short = paired_ratio(self.depths[few], self.depths[self.depth])
        return self.dense_ms * (1 - short) / (self.depth - few)

    @property
    def dense_ms(self) -> float:
        """Latency of the stack of ``depth`` dense blocks, in milliseconds."""
        return median(value for turn in self.depths[self.depth] for value in turn)

    def saved_ms(self, row: Row) -> float:
        """What one block of that size takes less than a dense one, in milliseconds."""
        return self.dense_ms * (1 - paired_ratio(row.samples_ms, self.depths[self.depth])) / self.depth

    def grid(self, part: str) -> tuple[list[int], list[int | None], NDArray[np.float64]]:
        """Units, widths, and the milliseconds of one block at each pair, relative to the dense block, never falling
        with size. Without any unit the width does not matter. What noise can explain is no stair, see `shrunk`; the
        dense block is one size among others there, or its own noise would be in all that is compared with it."""
        rows = [row for row in self.rows if row.part == part]
        units = sorted({row.units for row in rows})
        widths = sorted({row.width for row in rows if row.units}, key=lambda width: width or 0)
        none = next(-self.saved_ms(row) for row in rows if row.units == 0)
        some = [row for row in rows if row.units]
        sizes = [(row.units, row.units * (row.width or 0), row.width or 0) for row in some]
        error = self.dense_ms / self.depth * log_error([row.samples_ms for row in rows], self.loads)
        values = shrunk(sizes, [-self.saved_ms(row) for row in some], error)
        found = {(row.units, row.width): value for row, value in zip(some, values, strict=True)}
        cells = np.array([[found[n, w] if n else none for w in widths] for n in units]) - found[units[-1], widths[-1]]
        return units, widths, np.minimum(_rising(cells), 0.0)

    def edges(self, part: str) -> list[int]:
        """The staircase of a part, at full width: the largest size of every level of cost, 0 and all included."""
        units, _, cells = self.grid(part)
        cost = cells[:, -1]
        last = [i for i in range(len(units)) if i + 1 == len(units) or cost[i + 1] > cost[i]]
        return sorted({0, *(units[i] for i in last)})

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict."""
        return {**asdict(self), "depths": {str(depth): turns for depth, turns in self.depths.items()}}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """The table that `to_dict` wrote; KeyError, TypeError, ValueError or AttributeError on anything else."""
        rows = tuple(Row(**{**row, "samples_ms": _samples(row["samples_ms"])}) for row in data["rows"])
        depths = {int(depth): _samples(turns) for depth, turns in data["depths"].items()}
        return cls(dict(data["setting"]), index(data["depth"]), depths, rows, index(data["loads"]))


def _samples(given: Sequence[Sequence[float]]) -> list[list[float]]:
    """Latencies, rounds × repeats; ValueError or TypeError for what is none."""
    turns = [[float(ms) for ms in turn] for turn in given]
    if not all(turn and all(0 < ms < inf for ms in turn) for turn in turns):
        raise ValueError("latencies are above 0 ms, one in a round at least")
    return turns


def log_error(samples_ms: Sequence[Sequence[Sequence[float]]], loads: int = 1) -> float:
    """Standard error of the logarithm of a row's latency beside other rows of the same rounds, by their scatter once
    what all rows of a round and all rounds of a row have in common is taken out; 0 where it cannot be told.

    Args:
        samples_ms: of every row, rounds × repeats.
        loads: how often the networks were loaded; where more than once, the scatter is that from load to load.
    """
    if len(samples_ms) < 2 or len({len(turns) for turns in samples_ms}) > 1 or len(samples_ms[0]) < max(2, loads):
        return 0.0
    logs = np.log([[median(turn) for turn in turns] for turns in samples_ms])
    if loads > 1:
        logs = np.stack([np.median(logs[:, first::loads], axis=1) for first in range(loads)], axis=1)
        logs = logs - logs.mean(axis=1, keepdims=True)
        return _of_columns(float(np.square(logs - logs.mean(axis=0)).mean()) ** 0.5, *logs.shape)
    # Tukey's median polish: a burst that hits one run moves neither its row nor its round.
    for _ in range(8):
        logs = logs - np.median(logs, axis=1, keepdims=True)
        logs = logs - np.median(logs, axis=0)
    # The median of |x| is 0.6745 standard deviations.
    return _of_columns(float(np.median(np.abs(logs))) / 0.6745, *logs.shape)


def _of_columns(scatter: float, rows: int, columns: int) -> float:
    """Standard error of a row's mean: one in ``rows`` and one in ``columns`` degrees of freedom are gone."""
    return scatter * (rows / ((rows - 1) * (columns - 1))) ** 0.5


def shrunk(sizes: Sequence[Sequence[int]], values: Sequence[float], error: float) -> list[float]:
    """Values drawn towards the linear function of the ``sizes`` that fits them best, by as much as noise explains.

    With e the standard error of a value and v the variance of the residuals beyond e², residuals are multiplied with
    v / (v + e²), the empirical Bayes estimate (Efron & Morris, 1973): without noise, stairs stay as they are.
    """
    design = np.column_stack([np.ones(len(values)), np.asarray(sizes, dtype=np.float64)])
    known = np.asarray(values, dtype=np.float64)
    design /= np.abs(design).max(0).clip(1.0)
    fit, _, rank, _ = np.linalg.lstsq(design, known, rcond=None)
    line = design @ fit
    free = len(known) - int(rank)
    if free < 1 or error == 0:
        return known.tolist()
    beyond = max(0.0, float(np.square(known - line).sum()) / free - error**2)
    return (line + (known - line) * beyond / (beyond + error**2)).tolist()


def rising(values: Sequence[float]) -> list[float]:
    """The never falling sequence nearest to ``values`` in least squares: neighbours that fall share their mean."""
    pools: list[tuple[float, int]] = []
    for value in values:
        mean, count = float(value), 1
        while pools and pools[-1][0] >= mean:
            before, more = pools.pop()
            mean, count = (before * more + mean * count) / (more + count), more + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


def _rising(cells: NDArray[np.float64]) -> NDArray[np.float64]:
    """Never falling along both axes; a few sweeps, each axis in turn, then what is left is lifted."""
    for _ in range(8):
        cells = np.array([rising(row) for row in cells])
        cells = np.array([rising(column) for column in cells.T]).T
    return np.maximum.accumulate(np.maximum.accumulate(cells, 0), 1)


def cache_folder() -> Path:
    """Where tables are kept: ``optin-deploy/tables`` in the user's cache folder (``XDG_CACHE_HOME``)."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "optin-deploy" / "tables"


def table_file(setting: Mapping[str, Any]) -> Path:
    """The file of the table with that setting, there or not."""
    text = json.dumps({"layout": _LAYOUT, **setting}, sort_keys=True)
    return cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def read_table(setting: Mapping[str, Any]) -> LatencyTable | None:
    """The cached table of that setting, None when there is none; ProfilingError when its file is damaged."""
    path = table_file(setting)
    if not path.is_file():
        return None
    try:
        table = LatencyTable.from_dict(json.loads(path.read_text(encoding="utf-8")))
        # One that tells no costs is as damaged as one that is no JSON.
        for part in {row.part for row in table.rows}:
            table.grid(part)
        if table_file(table.setting) != path or not isfinite(table.block_ms):
            raise ValueError("it is another table")
        return table
    except (OSError, *_DAMAGED) as error:
        raise ProfilingError(f"the latency table {path} cannot be read: remove it to measure again") from error


def cached_settings() -> list[dict[str, Any]]:
    """The settings of all tables in the cache, the newest first; damaged files are left out."""
    files = cache_folder().glob("*.json") if cache_folder().is_dir() else ()
    found = []
    for path in sorted(files, key=lambda path: -path.stat().st_mtime):
        try:
            setting = dict(json.loads(path.read_text(encoding="utf-8"))["setting"])
            if table_file(setting) == path:
                found.append(setting)
        except (OSError, *_DAMAGED):
            continue
    return found


def check_cache() -> None:
    """Raise ProfilingError where tables cannot be kept; told before they are measured."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProfilingError(
            f"latency tables cannot be kept in {folder}: {error.strerror}; name another folder by XDG_CACHE_HOME"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ProfilingError(f"latency tables cannot be kept in {folder}: no permission to write there")


def save_table(table: LatencyTable) -> Path:
    """Write the table into the cache, whole or not at all."""
    path = table_file(table.setting)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(table.to_dict()), encoding="utf-8")
    temporary.replace(path)
    return path
