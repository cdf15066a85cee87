"""The latency breakdown of a dense and a pruned network, matched module by module."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from exporters import BUILDERS
from optin_deploy.analysis.module_roles import ATTENTION, OTHER, PARTS, ModuleRole
from optin_deploy.analysis.results import TimeRow
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
"""Kinds of operators, in the order of reports."""

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
# Words in the names of engine layers whose kind is known; all other layers fuse several operators.
_BUILT = {"reformat": MOVEMENT, "shuffle": MOVEMENT, "copy": MOVEMENT, "pointwise": ELEMENTWISE}
_EXACT = {"mm": MATRIX, "t": MOVEMENT, "to": MOVEMENT, "_to_copy": MOVEMENT}


@dataclass(frozen=True)
class OperatorTime:
    """All operators of one type in one module, dense and pruned: milliseconds and calls in one run."""

    module: str
    role: ModuleRole
    operator: str
    kind: str
    dense_ms: float = 0.0
    pruned_ms: float = 0.0
    dense_calls: int = 0
    pruned_calls: int = 0


@dataclass(frozen=True)
class LatencyBreakdown:
    """The latency breakdown of both networks at one runtime and batch size.

    Attributes:
        operators: times by module and operator, which the rows sum up.
        parts, blocks, kinds: the same time by part, by block ("" outside them) and by kind of operator; each of the
            three sums, with ``between``, to the measured latencies.
        between: time between operators.
        measured_ms: the unprofiled medians (dense, pruned) to which the profile is scaled.
        profiled_ms: sums of the profile before it was scaled.
        unprofiled_ms: medians of runs without the profiler, interleaved with the profiled ones.
        flops: of one sample by module, dense and pruned.
    """

    runtime: str
    batch_size: int
    operators: tuple[OperatorTime, ...]
    parts: tuple[TimeRow, ...]
    blocks: tuple[TimeRow, ...]
    kinds: tuple[TimeRow, ...]
    between: TimeRow
    measured_ms: tuple[float, float]
    profiled_ms: tuple[float, float]
    unprofiled_ms: tuple[float, float]
    flops: Mapping[str, tuple[int, int]]

    @property
    def compiled(self) -> bool:
        """Whether the runtime is an engine, whose layers fuse several operators."""
        return self.runtime in BUILDERS

    @property
    def flops_ratio(self) -> float:
        """Pruned ÷ dense FLOPs."""
        dense, pruned = (sum(column) for column in zip(*self.flops.values(), strict=True))
        return pruned / dense


def break_down(
    dense: LayerProfile,
    pruned: LayerProfile,
    flops: tuple[Mapping[str, int], Mapping[str, int]],
    roles: Mapping[str, ModuleRole],
    measured_ms: tuple[float, float],
) -> LatencyBreakdown:
    """Match two profiles module by module and scale each to its measured latency.

    Args:
        dense, pruned: profiles at the same runtime and batch size, of the modules in ``roles``.
        flops: dense and pruned, see `module_roles.own_flops`; "" has the FLOPs outside all modules.
        roles: see `module_roles.module_roles`.
        measured_ms: median latencies of unprofiled runs, dense and pruned.
    """
    factors = tuple(ms / sums_to(profile) for ms, profile in zip(measured_ms, (dense, pruned), strict=True))
    operators = _match_operators(dense, pruned, roles, factors)
    before, after = flops
    counts = {name: (before.get(name, 0), after.get(name, 0)) for name in {**before, **after}}

    def rows(
        key: Callable[[OperatorTime], str], names: Iterable[str], flops_of: Mapping[str, tuple[int, int]]
    ) -> list[TimeRow]:
        return [_row(name, [c for c in operators if key(c) == name], flops_of.get(name, (0, 0))) for name in names]

    by_part = _sum_flops(counts, lambda name: roles.get(name, ModuleRole(OTHER)).part)
    by_block = _sum_flops(counts, lambda name: roles.get(name, ModuleRole(OTHER)).block)
    blocks = list(dict.fromkeys(c.role.block for c in operators))
    return LatencyBreakdown(
        runtime=dense.runtime,
        batch_size=dense.batch_size,
        operators=operators,
        parts=_drop_empty(rows(lambda c: c.role.part, PARTS, by_part)),
        blocks=_drop_empty(rows(lambda c: c.role.block, sorted(blocks, key=lambda b: b == ""), by_block)),
        kinds=_drop_empty(rows(lambda c: c.kind, KINDS, {})),
        between=TimeRow("between operators", dense.overhead_ms * factors[0], pruned.overhead_ms * factors[1]),
        measured_ms=measured_ms,
        profiled_ms=(sums_to(dense), sums_to(pruned)),
        unprofiled_ms=(dense.total_ms, pruned.total_ms),
        flops=counts,
    )


def sums_to(profile: LayerProfile) -> float:
    """Return the milliseconds of a profile's operators and of the time between them."""
    return profile.operators_ms + profile.overhead_ms


def kind_of(operator: str, runtime: str) -> str:
    """Return the kind of a runtime's operator by its name.

    A name without a known word is elementwise; in an engine it is a layer that fuses several operators.
    """
    name = operator.lower()
    known = next((kind for kind, words in _WORDS if any(word in name for word in words)), None)
    if runtime in BUILDERS:
        return known or next((kind for word, kind in _BUILT.items() if word in name), COMPILED)
    return _EXACT.get(name) or known or ELEMENTWISE


def is_fused(operators: Iterable[OperatorTime]) -> bool:
    """Return whether the runtime computes attention in one operator."""
    return any(op.kind == FUSED for op in operators if op.role.part == ATTENTION)


def _match_operators(
    dense: LayerProfile, pruned: LayerProfile, roles: Mapping[str, ModuleRole], factors: tuple[float, ...]
) -> tuple[OperatorTime, ...]:
    operators: dict[tuple[str, str], OperatorTime] = {}

    def operator_of(row: LayerRow) -> OperatorTime:
        role = roles.get(row.module, ModuleRole(OTHER))
        kind = kind_of(row.operator, dense.runtime)
        return operators.get((row.module, row.operator)) or OperatorTime(row.module, role, row.operator, kind)

    for row in dense.rows:
        operators[row.module, row.operator] = replace(
            operator_of(row), dense_ms=row.ms * factors[0], dense_calls=row.calls
        )
    for row in pruned.rows:
        operators[row.module, row.operator] = replace(
            operator_of(row), pruned_ms=row.ms * factors[1], pruned_calls=row.calls
        )
    return tuple(operators.values())


def _sum_flops(flops: Mapping[str, tuple[int, int]], name_of: Callable[[str], str]) -> dict[str, tuple[int, int]]:
    sums: dict[str, tuple[int, int]] = {}
    for module, (dense, pruned) in flops.items():
        before = sums.get(name_of(module), (0, 0))
        sums[name_of(module)] = (before[0] + dense, before[1] + pruned)
    return sums


def _row(name: str, operators: Iterable[OperatorTime], flops: tuple[int, int]) -> TimeRow:
    operators = list(operators)
    return TimeRow(name, sum(c.dense_ms for c in operators), sum(c.pruned_ms for c in operators), *flops)


def _drop_empty(rows: Iterable[TimeRow]) -> tuple[TimeRow, ...]:
    return tuple(row for row in rows if row.dense_ms or row.pruned_ms)
