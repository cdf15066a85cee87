"""Bottlenecks: why the speed-up of a pruned network is below its FLOP reduction, one sentence with figures for each.

The ideal time is the dense time times the FLOPs ratio. Time above it is lost, and is attributed to one bottleneck.
"""

from collections.abc import Iterable, Mapping, Sequence

from optin_deploy.analysis.breakdown import (
    FUSED,
    MATRIX,
    MOVEMENT,
    SOFTMAX,
    LatencyBreakdown,
    OperatorTime,
    is_fused,
)
from optin_deploy.analysis.module_roles import (
    ATTENTION,
    CONVOLUTION,
    EMBEDDING,
    FFN,
    HEAD,
    LEFT_DENSE,
    MERGING,
    NORMS,
    OTHER,
)
from optin_deploy.analysis.reliability import check_reliability
from optin_deploy.analysis.results import Bottleneck, LayerBreakdown, TimeRow, WholeRow
from optin_deploy.nn.names import is_inside
from optin_deploy.utils.formatting import percent, significant

STEP = 16
"""Widths that are multiples of this fill the vector registers of CPUs and the matrix units of GPUs."""

_REPORTED_SHARE = 0.02
_TINY_MS = 0.02
_MANY = 0.10
_LITTLE = 0.05
_SHRANK = 0.97
_FIXED = (EMBEDDING, HEAD, OTHER)
_PRUNED = (ATTENTION, FFN, CONVOLUTION)
_COMPUTES = (MATRIX, FUSED)


def find_bottlenecks(breakdown: LatencyBreakdown, widths: Mapping[str, tuple[int, ...]]) -> tuple[Bottleneck, ...]:
    """Return the bottlenecks that cost 2 % of the dense time or more, largest first.

    Return none if the FLOPs did not fall or the breakdown is unreliable.

    Args:
        widths: of the pruned network's matrix products, see `module_roles.narrow_widths`.
    """
    if breakdown.flops_ratio >= 1 or check_reliability(breakdown) is not None:
        return ()
    launches = _launches(breakdown)
    rest = [op for op in breakdown.operators if not (launches and _tiny(op))]
    kept = [
        part for part in _PRUNED if not _shrank(breakdown, [op for op in breakdown.operators if op.role.part == part])
    ]
    inside = [op for op in rest if op.role.part not in (MERGING, *kept)]
    candidates = [
        launches,
        _outside_blocks(breakdown, rest),
        _left_dense(breakdown, rest),
        _norms(breakdown, rest),
        _merging(breakdown, rest),
        *(_unchanged(breakdown, rest, part) for part in kept),
        *(_built(breakdown, inside) if breakdown.compiled else _by_operator(breakdown, inside, widths)),
    ]
    least_ms = _REPORTED_SHARE * breakdown.measured_ms[0]
    reported = [cause for cause in candidates if cause is not None and cause.lost_ms >= least_ms]
    return tuple(sorted(reported, key=lambda cause: -cause.lost_ms))


def summarize_breakdown(breakdown: LatencyBreakdown, widths: Mapping[str, tuple[int, ...]]) -> LayerBreakdown:
    """Return the breakdown with its bottlenecks, as the report stores it; ``widths`` as for `find_bottlenecks`."""
    before, after = _all_flops(breakdown)
    return LayerBreakdown(
        runtime=breakdown.runtime,
        batch_size=breakdown.batch_size,
        parts=breakdown.parts,
        blocks=breakdown.blocks,
        kinds=breakdown.kinds,
        between=breakdown.between,
        measured=WholeRow("measured", *breakdown.measured_ms, before, after),
        profiled=TimeRow("profiled", *breakdown.profiled_ms, before, after),
        lost_ms=lost_ms(breakdown),
        causes=find_bottlenecks(breakdown, widths),
        doubt=check_reliability(breakdown),
    )


def lost_ms(breakdown: LatencyBreakdown) -> float:
    """Return the pruned time above the dense time times the FLOPs ratio."""
    return breakdown.measured_ms[1] - breakdown.measured_ms[0] * breakdown.flops_ratio


def _launches(breakdown: LatencyBreakdown) -> Bottleneck | None:
    """Return the time of very short operators and between operators; None if it is below 10 % of the latency."""
    tiny = [op for op in breakdown.operators if _tiny(op)]
    dense, pruned = _sums(tiny)
    dense += breakdown.between.dense_ms
    pruned += breakdown.between.pruned_ms
    if pruned < _MANY * breakdown.measured_ms[1]:
        return None
    calls = sum(op.pruned_calls for op in tiny)
    return Bottleneck(
        _lost(breakdown, dense, pruned),
        f"Batch {breakdown.batch_size} is small for this network: {calls} operators of less than "
        f"{_TINY_MS * 1e3:.0f} µs each, and the time between operators, take {_of_pruned(breakdown, pruned)} and "
        f"{_change(dense, pruned)}.",
    )


def _outside_blocks(breakdown: LatencyBreakdown, operators: Sequence[OperatorTime]) -> Bottleneck | None:
    mine = [op for op in operators if op.role.part in _FIXED]
    dense, pruned = _sums(mine)
    inside = [sum(column) for column in zip(*_flops_outside(breakdown, _FIXED), strict=True)]
    left = breakdown.measured_ms[0] - dense, breakdown.measured_ms[1] - pruned
    # A ratio of very short times inside the blocks is unreliable.
    if (
        not pruned
        or not all(inside)
        or any(ms < _LITTLE * of for ms, of in zip(left, breakdown.measured_ms, strict=True))
    ):
        return None
    without, present = _realised(left, inside), _realised(breakdown.measured_ms, _all_flops(breakdown))
    shares = [(part, _sums(c for c in mine if c.role.part == part)[1]) for part in _FIXED]
    names = [f"{part} {_ms(ms)}" for part, ms in sorted(shares, key=lambda share: -share[1]) if ms >= 0.05 * pruned]
    higher = round(without, 2) > round(present, 2)
    effect = f": without them the realised ratio would be {without:.2f} instead of {present:.2f}" if higher else ""
    return Bottleneck(
        _lost(breakdown, dense, pruned),
        f"Modules outside the blocks ({', '.join(names)} ms) take {_of_pruned(breakdown, pruned)} and "
        f"{_change(dense, pruned)}{effect}.",
    )


def _left_dense(breakdown: LatencyBreakdown, operators: Sequence[OperatorTime]) -> Bottleneck | None:
    mine = [op for op in operators if op.role.part == LEFT_DENSE]
    dense, pruned = _sums(mine)
    if not pruned:
        return None
    return Bottleneck(
        _lost(breakdown, dense, pruned),
        f"Modules left dense inside the blocks ({_some([op.module for op in mine])}) take "
        f"{_of_pruned(breakdown, pruned)} and {_change(dense, pruned)}.",
    )


def _norms(breakdown: LatencyBreakdown, operators: Sequence[OperatorTime]) -> Bottleneck | None:
    dense, pruned = _sums(op for op in operators if op.role.part == NORMS)
    if not pruned:
        return None
    return Bottleneck(
        _lost(breakdown, dense, pruned),
        f"Norms and residual additions take {_of_pruned(breakdown, pruned)} and {_change(dense, pruned)}: they work on "
        "the residual stream, which keeps its width.",
    )


def _merging(breakdown: LatencyBreakdown, operators: Sequence[OperatorTime]) -> Bottleneck | None:
    dense, pruned = _sums(op for op in operators if op.role.part == MERGING)
    if not pruned:
        return None
    return Bottleneck(
        _lost(breakdown, dense, pruned),
        f"Merging tokens takes {_of_pruned(breakdown, pruned)}: it compares tokens, adds up those that merge, and "
        "restores all tokens after the last block.",
    )


def _unchanged(breakdown: LatencyBreakdown, operators: Sequence[OperatorTime], part: str) -> Bottleneck | None:
    """Return the cost of an unpruned part: its share of the dense time above its share of the dense FLOPs.

    The pruned time is not used: it differs from the dense time by noise only.
    """
    mine = [op for op in operators if op.role.part == part]
    dense, (flops, _) = _sums(mine)[0], _flops_of(breakdown, mine)
    if not dense or not flops:
        return None
    time, share = dense / breakdown.measured_ms[0], flops / _all_flops(breakdown)[0]
    return Bottleneck(
        (time - share) * breakdown.measured_ms[0],
        f"{part[0].upper()}{part[1:]} is unchanged: it takes {percent(time)} of the dense time for {percent(share)} "
        "of the dense FLOPs.",
    )


def _by_operator(
    breakdown: LatencyBreakdown, operators: Sequence[OperatorTime], widths: Mapping[str, tuple[int, ...]]
) -> Iterable[Bottleneck | None]:
    """Yield bottlenecks inside attention, FFN and convolutions, by type of operator."""
    yield _unfused(breakdown, operators)
    yield _elementwise(breakdown, operators)
    yield from _products(breakdown, operators, widths)


def _built(breakdown: LatencyBreakdown, operators: Sequence[OperatorTime]) -> Iterable[Bottleneck | None]:
    """Yield bottlenecks of engines, whose layers fuse many operators: parts that shrank less than their FLOPs."""
    for part in _PRUNED:
        mine = [op for op in operators if op.role.part == part]
        (dense, pruned), (before, after) = _sums(mine), _flops_of(breakdown, mine)
        if all((dense, pruned, before, after)):
            yield Bottleneck(
                _lost_to_speed(breakdown, mine),
                f"The layers of {part} shrank less than their FLOPs: they take {pruned / dense:.2f} of their dense "
                f"time at {after / before:.2f} of the FLOPs.",
            )


def _unfused(breakdown: LatencyBreakdown, operators: Sequence[OperatorTime]) -> Bottleneck | None:
    if is_fused(breakdown.operators):
        return None
    mine = [op for op in operators if op.role.part == ATTENTION and op.kind in (SOFTMAX, MOVEMENT)]
    dense, pruned = _sums(mine)
    if not pruned:
        return None
    softmax = _sums(op for op in mine if op.kind == SOFTMAX)[1]
    return Bottleneck(
        _lost(breakdown, dense, pruned),
        f"Attention is not fused: softmax ({_ms(softmax)} ms) and data movement ({_ms(pruned - softmax)} ms) "
        f"around its matrix products take {_of_pruned(breakdown, pruned)}, {_ratios(breakdown, dense, pruned)}.",
    )


def _elementwise(breakdown: LatencyBreakdown, operators: Sequence[OperatorTime]) -> Bottleneck | None:
    fused = is_fused(breakdown.operators)
    mine = [op for op in operators if _is_elementwise(op, fused)]
    dense, pruned = _sums(mine)
    if not pruned:
        return None
    return Bottleneck(
        _lost(breakdown, dense, pruned),
        f"Elementwise operators in attention and FFN ({_largest(mine)}) take {_of_pruned(breakdown, pruned)}, "
        f"{_ratios(breakdown, dense, pruned)}: they are bound by memory bandwidth, not by FLOPs.",
    )


def _is_elementwise(op: OperatorTime, fused: bool) -> bool:
    if op.role.part in (*_FIXED, NORMS, LEFT_DENSE) or op.kind in _COMPUTES:
        return False
    return fused or op.role.part != ATTENTION or op.kind not in (SOFTMAX, MOVEMENT)


def _products(
    breakdown: LatencyBreakdown, operators: Sequence[OperatorTime], widths: Mapping[str, tuple[int, ...]]
) -> Iterable[Bottleneck | None]:
    """Yield matrix products that shrank less than their FLOPs: first those of odd widths, then the others by part."""
    mine = [c for c in operators if c.kind in _COMPUTES and c.role.part not in (*_FIXED, NORMS, LEFT_DENSE)]
    odd = {name: [width for width in of if width % STEP] for name, of in widths.items()}
    uneven = {name: of for name, of in odd.items() if of}
    off = [op for op in mine if _inside(op.module, uneven) and _shrank(breakdown, [op])]
    uneven = {name: of for name, of in uneven.items() if any(_inside(op.module, [name]) for op in off)}
    even = [op for op in mine if op not in off]
    yield _off_steps(breakdown, off, uneven)
    for part in dict.fromkeys(op.role.part for op in even):
        yield _slower(breakdown, [op for op in even if op.role.part == part], part)


def _off_steps(
    breakdown: LatencyBreakdown, operators: Sequence[OperatorTime], uneven: Mapping[str, Sequence[int]]
) -> Bottleneck | None:
    speeds = _speeds(breakdown, operators)
    if speeds is None:
        return None
    named = [f"{name}: {', '.join(map(str, of))}" for name, of in uneven.items()]
    return Bottleneck(
        _lost_to_speed(breakdown, operators),
        f"Widths of no multiple of {STEP} are slow ({_some(named)}): their matrix products run at {speeds[1]} GFLOP/s, "
        f"in the dense network at {speeds[0]}.",
    )


def _slower(breakdown: LatencyBreakdown, operators: Sequence[OperatorTime], part: str) -> Bottleneck | None:
    speeds = _speeds(breakdown, operators)
    if speeds is None or not _shrank(breakdown, operators):
        return None
    dense, pruned = _sums(operators)
    before, after = _flops_of(breakdown, operators)
    return Bottleneck(
        _lost_to_speed(breakdown, operators),
        f"Matrix products of {part} shrank less than their FLOPs: they take {pruned / dense:.2f} of their dense time "
        f"at {after / before:.2f} of the FLOPs, because they run at {speeds[1]} GFLOP/s, in the dense network at "
        f"{speeds[0]}.",
    )


def _speeds(breakdown: LatencyBreakdown, operators: Sequence[OperatorTime]) -> tuple[str, str] | None:
    """Return the GFLOP/s of matrix products, dense and pruned, as text; None if either has no time or FLOPs."""
    times, flops = _sums(operators), _flops_of(breakdown, operators)
    if not all((*times, *flops)):
        return None
    dense, pruned = (
        significant(count * breakdown.batch_size / ms / 1e6) for count, ms in zip(flops, times, strict=True)
    )
    return dense, pruned


def _lost_to_speed(breakdown: LatencyBreakdown, operators: Sequence[OperatorTime]) -> float:
    """Return the time of the products above their dense time times their own FLOPs ratio."""
    (dense, pruned), (before, after) = _sums(operators), _flops_of(breakdown, operators)
    return pruned - dense * after / before


def _shrank(breakdown: LatencyBreakdown, operators: Iterable[OperatorTime]) -> bool:
    """Return whether modules have clearly fewer FLOPs than before, or no FLOPs that are counted."""
    before, after = _flops_of(breakdown, operators)
    return not before or after < _SHRANK * before


def _flops_of(breakdown: LatencyBreakdown, operators: Iterable[OperatorTime]) -> tuple[int, int]:
    counts = [breakdown.flops.get(module, (0, 0)) for module in {op.module for op in operators}]
    return sum(dense for dense, _ in counts), sum(pruned for _, pruned in counts)


def _flops_outside(breakdown: LatencyBreakdown, parts: Sequence[str]) -> list[tuple[int, int]]:
    """Return the FLOPs of all modules outside these parts."""
    inside = {op.module for op in breakdown.operators if op.role.part in parts} | {""}
    return [counts for module, counts in breakdown.flops.items() if module not in inside] or [(0, 0)]


def _all_flops(breakdown: LatencyBreakdown) -> list[int]:
    return [sum(column) for column in zip(*breakdown.flops.values(), strict=True)]


def _realised(times_ms: Sequence[float], flops: Sequence[int]) -> float:
    """Speed-up ÷ FLOP reduction."""
    return times_ms[0] / times_ms[1] * flops[1] / flops[0]


def _tiny(op: OperatorTime) -> bool:
    ms, calls = (op.pruned_ms, op.pruned_calls) if op.pruned_calls else (op.dense_ms, op.dense_calls)
    return ms < _TINY_MS * calls


def _inside(module: str, names: Iterable[str]) -> bool:
    return any(is_inside(module, name) for name in names)


def _sums(operators: Iterable[OperatorTime]) -> tuple[float, float]:
    operators = list(operators)
    return sum(op.dense_ms for op in operators), sum(op.pruned_ms for op in operators)


def _lost(breakdown: LatencyBreakdown, dense: float, pruned: float) -> float:
    return pruned - dense * breakdown.flops_ratio


def _largest(operators: Iterable[OperatorTime], count: int = 3) -> str:
    """Return the types of operators that take the most time, with their times."""
    times: dict[str, float] = {}
    for op in operators:
        times[op.operator] = times.get(op.operator, 0.0) + op.pruned_ms
    most = sorted(times.items(), key=lambda item: -item[1])[:count]
    return ", ".join(f"{operator} {_ms(ms)} ms" for operator, ms in most)


def _some(names: Iterable[str]) -> str:
    """Return the first name and the number of the others."""
    first, *more = dict.fromkeys(names)
    return f"{first} and {len(more)} more" if more else first


def _change(dense: float, pruned: float) -> str:
    if pruned >= 0.97 * dense:
        return f"did not get faster (dense {_ms(dense)} ms)"
    return f"shrank only to {pruned / dense:.2f} of their dense time"


def _ratios(breakdown: LatencyBreakdown, dense: float, pruned: float) -> str:
    shrank = f"{pruned / dense:.2f} of their dense time" if dense else "0 ms in the dense network"
    return f"{shrank} at {breakdown.flops_ratio:.2f} of the FLOPs"


def _of_pruned(breakdown: LatencyBreakdown, ms: float) -> str:
    return f"{_ms(ms)} of {_ms(breakdown.measured_ms[1])} ms"


def _ms(value: float) -> str:
    return significant(value, 3 if value >= 1 else 2)
