"""Where the time of a dense and a pruned network goes, matched part by part, so that nothing is hidden."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from exporters import BUILDERS
from optin_deploy.analysis.module_roles import ATTENTION, OTHER, PARTS, Place
from profilers.layer_times import LayerProfile, LayerRow

MATRIX, FUSED, SOFTMAX, NORM, MOVEMENT, ELEMENTWISE, COMPILED = (
    "matrix products",
    "fused attention",
    "softmax",
    "norms",
    "data movement",
    "elementwise",
    "compiled by the builder",
)
KINDS = (MATRIX, FUSED, SOFTMAX, NORM, MOVEMENT, ELEMENTWISE, COMPILED)
"""Kinds of operators, in the order in which they are told."""

_WORDS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (FUSED, ("attention",)),
    (SOFTMAX, ("softmax",)),
    (NORM, ("normalization", "norm")),
    (MATRIX, ("matmul", "matrixmul", "gemm", "conv", "linear", "addmm", "bmm")),
    (
        MOVEMENT,
        (
            *("transpose", "reshape", "squeeze", "split", "concat", "slice", "gather", "expand", "cast", "shape"),
            *("reorder", "memcpy", "view", "permute", "unbind", "chunk", "select", "getitem", "cat", "flatten"),
            *("clone", "contiguous", "index", "embedding", "identity", "sym_size", "stack", "tile", "pad"),
        ),
    ),
)
# What builders of engines say of layers whose kind can be told; all others are made of several operators.
_BUILT = {"reformat": MOVEMENT, "shuffle": MOVEMENT, "copy": MOVEMENT, "pointwise": ELEMENTWISE}
_EXACT = {"mm": MATRIX, "t": MOVEMENT, "to": MOVEMENT, "_to_copy": MOVEMENT}


@dataclass(frozen=True)
class Cell:
    """All operators of one type in one module, dense and pruned: milliseconds of one run, and calls in it."""

    module: str
    place: Place
    operator: str
    kind: str
    dense_ms: float = 0.0
    pruned_ms: float = 0.0
    dense_calls: int = 0
    pruned_calls: int = 0


@dataclass(frozen=True)
class Row:
    """Dense and pruned milliseconds of one run, and FLOPs of one sample (0 where none are counted)."""

    name: str
    dense_ms: float
    pruned_ms: float
    dense_flops: int = 0
    pruned_flops: int = 0


@dataclass(frozen=True)
class Account:
    """The whole of both runs at one runtime and batch size.

    Attributes:
        cells: what the rows are summed from.
        parts, blocks, kinds: the same time by part, by block ("" outside them) and by kind of operator; each of the
            three sums, with ``between``, to the measured latencies.
        between: time in no operator.
        measured_ms: the unprofiled medians (dense, pruned) to which the profile is scaled.
        profiled_ms: what the profile itself summed to, before.
        unprofiled_ms: medians of the runs without the profiler that took turns with the profiled ones.
        flops: of one sample by module, dense and pruned.
    """

    runtime: str
    batch_size: int
    cells: tuple[Cell, ...]
    parts: tuple[Row, ...]
    blocks: tuple[Row, ...]
    kinds: tuple[Row, ...]
    between: Row
    measured_ms: tuple[float, float]
    profiled_ms: tuple[float, float]
    unprofiled_ms: tuple[float, float]
    flops: Mapping[str, tuple[int, int]]

    @property
    def compiled(self) -> bool:
        """Whether a builder has made layers of several operators each, so that types tell little of what they do."""
        return self.runtime in BUILDERS

    @property
    def flops_ratio(self) -> float:
        """Pruned ÷ dense FLOPs."""
        dense, pruned = (sum(column) for column in zip(*self.flops.values(), strict=True))
        return pruned / dense


def account(
    dense: LayerProfile,
    pruned: LayerProfile,
    dense_flops: Mapping[str, int],
    pruned_flops: Mapping[str, int],
    places: Mapping[str, Place],
    measured_ms: tuple[float, float],
) -> Account:
    """Match two profiles module by module and scale each to its measured latency.

    Args:
        dense, pruned: profiles at the same runtime and batch size, of the modules in ``places``.
        dense_flops, pruned_flops: see `parts.own_flops`; "" stands for what is in none of the modules.
        places: see `parts.places`.
        measured_ms: median latencies of unprofiled runs, dense and pruned.
    """
    factors = tuple(ms / sums_to(profile) for ms, profile in zip(measured_ms, (dense, pruned), strict=True))
    cells = _cells(dense, pruned, places, factors)
    flops = {name: (dense_flops.get(name, 0), pruned_flops.get(name, 0)) for name in {**dense_flops, **pruned_flops}}

    def rows(key: Callable[[Cell], str], names: Iterable[str], flops_of: Mapping[str, tuple[int, int]]) -> list[Row]:
        return [_row(name, [c for c in cells if key(c) == name], flops_of.get(name, (0, 0))) for name in names]

    by_part = _grouped(flops, lambda name: places.get(name, Place(OTHER)).part)
    by_block = _grouped(flops, lambda name: places.get(name, Place(OTHER)).block)
    blocks = list(dict.fromkeys(c.place.block for c in cells))
    return Account(
        runtime=dense.runtime,
        batch_size=dense.batch_size,
        cells=cells,
        parts=_present(rows(lambda c: c.place.part, PARTS, by_part)),
        blocks=_present(rows(lambda c: c.place.block, sorted(blocks, key=lambda b: b == ""), by_block)),
        kinds=_present(rows(lambda c: c.kind, KINDS, {})),
        between=Row("between operators", dense.overhead_ms * factors[0], pruned.overhead_ms * factors[1]),
        measured_ms=measured_ms,
        profiled_ms=(sums_to(dense), sums_to(pruned)),
        unprofiled_ms=(dense.total_ms, pruned.total_ms),
        flops=flops,
    )


def sums_to(profile: LayerProfile) -> float:
    """Milliseconds of a profile's operators and of what is between them."""
    return profile.operators_ms + profile.overhead_ms


def kind_of(operator: str, runtime: str) -> str:
    """The kind of a runtime's operator, by its name; what is none of the others works on every element by itself or, in
    an engine, is whatever the builder has made of several operators."""
    name = operator.lower()
    found = next((kind for kind, words in _WORDS if any(word in name for word in words)), None)
    if runtime in BUILDERS:
        return found or next((kind for word, kind in _BUILT.items() if word in name), COMPILED)
    return _EXACT.get(name) or found or ELEMENTWISE


def is_fused(cells: Iterable[Cell]) -> bool:
    """Whether the runtime computes attention in one operator."""
    return any(cell.kind == FUSED for cell in cells if cell.place.part == ATTENTION)


def _cells(
    dense: LayerProfile, pruned: LayerProfile, places: Mapping[str, Place], factors: tuple[float, ...]
) -> tuple[Cell, ...]:
    cells: dict[tuple[str, str], Cell] = {}

    def cell(row: LayerRow) -> Cell:
        place = places.get(row.module, Place(OTHER))
        kind = kind_of(row.operator, dense.runtime)
        return cells.get((row.module, row.operator)) or Cell(row.module, place, row.operator, kind)

    for row in dense.rows:
        cells[row.module, row.operator] = replace(cell(row), dense_ms=row.ms * factors[0], dense_calls=row.calls)
    for row in pruned.rows:
        cells[row.module, row.operator] = replace(cell(row), pruned_ms=row.ms * factors[1], pruned_calls=row.calls)
    return tuple(cells.values())


def _grouped(flops: Mapping[str, tuple[int, int]], name_of: Callable[[str], str]) -> dict[str, tuple[int, int]]:
    sums: dict[str, tuple[int, int]] = {}
    for module, (dense, pruned) in flops.items():
        before = sums.get(name_of(module), (0, 0))
        sums[name_of(module)] = (before[0] + dense, before[1] + pruned)
    return sums


def _row(name: str, cells: Iterable[Cell], flops: tuple[int, int]) -> Row:
    cells = list(cells)
    return Row(name, sum(c.dense_ms for c in cells), sum(c.pruned_ms for c in cells), *flops)


def _present(rows: Iterable[Row]) -> tuple[Row, ...]:
    return tuple(row for row in rows if row.dense_ms or row.pruned_ms)
