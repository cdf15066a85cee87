"""Bottlenecks: why the speed-up of a pruned network is below its FLOP reduction, one sentence each, with figures.

The ideal time is the dense time times the FLOPs ratio. Time above it is lost, and is attributed to one bottleneck.
"""

from collections.abc import Iterable, Mapping, Sequence

from optin_deploy.analysis.breakdown import (
    FUSED,
    MATRIX,
    MOVEMENT,
    SOFTMAX,
    Account,
    Cell,
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
from optin_deploy.analysis.reliability import doubt
from optin_deploy.analysis.results import Cause, LayerAccount, TimeRow, WholeRow
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


def causes(account: Account, widths: Mapping[str, tuple[int, ...]]) -> tuple[Cause, ...]:
    """Return the bottlenecks that cost 2 % of the dense time or more, largest first.

    There are none if the FLOPs did not fall or the breakdown is unreliable.

    Args:
        widths: of the pruned network's matrix products, see `module_roles.narrow_widths`.
    """
    if account.flops_ratio >= 1 or doubt(account) is not None:
        return ()
    launches = _launches(account)
    rest = [cell for cell in account.cells if not (launches and _tiny(cell))]
    kept = [
        part for part in _PRUNED if not _shrank(account, [cell for cell in account.cells if cell.place.part == part])
    ]
    inside = [cell for cell in rest if cell.place.part not in (MERGING, *kept)]
    candidates = [
        launches,
        _outside_blocks(account, rest),
        _left_dense(account, rest),
        _norms(account, rest),
        _merging(account, rest),
        *(_unchanged(account, rest, part) for part in kept),
        *(_built(account, inside) if account.compiled else _by_operator(account, inside, widths)),
    ]
    least_ms = _REPORTED_SHARE * account.measured_ms[0]
    reported = [cause for cause in candidates if cause is not None and cause.lost_ms >= least_ms]
    return tuple(sorted(reported, key=lambda cause: -cause.lost_ms))


def layer_account(account: Account, widths: Mapping[str, tuple[int, ...]]) -> LayerAccount:
    """Return the breakdown with its causes, as the report stores it; ``widths`` as for `causes`."""
    before, after = _all_flops(account)
    return LayerAccount(
        runtime=account.runtime,
        batch_size=account.batch_size,
        parts=account.parts,
        blocks=account.blocks,
        kinds=account.kinds,
        between=account.between,
        measured=WholeRow("measured", *account.measured_ms, before, after),
        profiled=TimeRow("profiled", *account.profiled_ms, before, after),
        lost_ms=lost_ms(account),
        causes=causes(account, widths),
        doubt=doubt(account),
    )


def lost_ms(account: Account) -> float:
    """Return the pruned time above the dense time times the FLOPs ratio."""
    return account.measured_ms[1] - account.measured_ms[0] * account.flops_ratio


def _launches(account: Account) -> Cause | None:
    """Return the time of very short operators and between operators; None if it is below 10 % of the latency."""
    tiny = [cell for cell in account.cells if _tiny(cell)]
    dense, pruned = _sums(tiny)
    dense += account.between.dense_ms
    pruned += account.between.pruned_ms
    if pruned < _MANY * account.measured_ms[1]:
        return None
    calls = sum(cell.pruned_calls for cell in tiny)
    return Cause(
        _lost(account, dense, pruned),
        f"Batch {account.batch_size} is small for this network: {calls} operators of less than {_TINY_MS * 1e3:.0f} µs "
        f"each, and the time between operators, take {_of_pruned(account, pruned)} and {_change(dense, pruned)}.",
    )


def _outside_blocks(account: Account, cells: Sequence[Cell]) -> Cause | None:
    mine = [cell for cell in cells if cell.place.part in _FIXED]
    dense, pruned = _sums(mine)
    inside = [sum(column) for column in zip(*_flops_outside(account, _FIXED), strict=True)]
    left = account.measured_ms[0] - dense, account.measured_ms[1] - pruned
    # A ratio of very short times inside the blocks is unreliable.
    if (
        not pruned
        or not all(inside)
        or any(ms < _LITTLE * of for ms, of in zip(left, account.measured_ms, strict=True))
    ):
        return None
    without, present = _realised(left, inside), _realised(account.measured_ms, _all_flops(account))
    shares = [(part, _sums(c for c in mine if c.place.part == part)[1]) for part in _FIXED]
    names = [f"{part} {_ms(ms)}" for part, ms in sorted(shares, key=lambda share: -share[1]) if ms >= 0.05 * pruned]
    higher = round(without, 2) > round(present, 2)
    effect = f": without them the realised ratio would be {without:.2f} instead of {present:.2f}" if higher else ""
    return Cause(
        _lost(account, dense, pruned),
        f"Modules outside the blocks ({', '.join(names)} ms) take {_of_pruned(account, pruned)} and "
        f"{_change(dense, pruned)}{effect}.",
    )


def _left_dense(account: Account, cells: Sequence[Cell]) -> Cause | None:
    mine = [cell for cell in cells if cell.place.part == LEFT_DENSE]
    dense, pruned = _sums(mine)
    if not pruned:
        return None
    return Cause(
        _lost(account, dense, pruned),
        f"Modules left dense inside the blocks ({_some([cell.module for cell in mine])}) take "
        f"{_of_pruned(account, pruned)} and {_change(dense, pruned)}.",
    )


def _norms(account: Account, cells: Sequence[Cell]) -> Cause | None:
    dense, pruned = _sums(cell for cell in cells if cell.place.part == NORMS)
    if not pruned:
        return None
    return Cause(
        _lost(account, dense, pruned),
        f"Norms and residual additions take {_of_pruned(account, pruned)} and {_change(dense, pruned)}: they work on "
        "the residual stream, which keeps its width.",
    )


def _merging(account: Account, cells: Sequence[Cell]) -> Cause | None:
    dense, pruned = _sums(cell for cell in cells if cell.place.part == MERGING)
    if not pruned:
        return None
    return Cause(
        _lost(account, dense, pruned),
        f"Merging tokens takes {_of_pruned(account, pruned)}: it compares tokens, adds up those that merge, and "
        "restores all tokens after the last block.",
    )


def _unchanged(account: Account, cells: Sequence[Cell], part: str) -> Cause | None:
    """Return the cost of an unpruned part: its share of the dense time above its share of the dense FLOPs.

    The pruned time is not used: it differs from the dense time by noise only.
    """
    mine = [cell for cell in cells if cell.place.part == part]
    dense, (flops, _) = _sums(mine)[0], _flops_of(account, mine)
    if not dense or not flops:
        return None
    time, share = dense / account.measured_ms[0], flops / _all_flops(account)[0]
    return Cause(
        (time - share) * account.measured_ms[0],
        f"{part[0].upper()}{part[1:]} is unchanged: it takes {percent(time)} of the dense time for {percent(share)} "
        "of the dense FLOPs.",
    )


def _by_operator(
    account: Account, cells: Sequence[Cell], widths: Mapping[str, tuple[int, ...]]
) -> Iterable[Cause | None]:
    """Yield bottlenecks inside attention, FFN and convolutions, by type of operator."""
    yield _unfused(account, cells)
    yield _elementwise(account, cells)
    yield from _products(account, cells, widths)


def _built(account: Account, cells: Sequence[Cell]) -> Iterable[Cause | None]:
    """Yield bottlenecks of engines, whose layers fuse many operators: parts that shrank less than their FLOPs."""
    for part in _PRUNED:
        mine = [cell for cell in cells if cell.place.part == part]
        (dense, pruned), (before, after) = _sums(mine), _flops_of(account, mine)
        if all((dense, pruned, before, after)):
            yield Cause(
                _lost_to_speed(account, mine),
                f"The layers of {part} shrank less than their FLOPs: they take {pruned / dense:.2f} of their dense "
                f"time at {after / before:.2f} of the FLOPs.",
            )


def _unfused(account: Account, cells: Sequence[Cell]) -> Cause | None:
    if is_fused(account.cells):
        return None
    mine = [cell for cell in cells if cell.place.part == ATTENTION and cell.kind in (SOFTMAX, MOVEMENT)]
    dense, pruned = _sums(mine)
    if not pruned:
        return None
    softmax = _sums(cell for cell in mine if cell.kind == SOFTMAX)[1]
    return Cause(
        _lost(account, dense, pruned),
        f"Attention is not fused: softmax ({_ms(softmax)} ms) and data movement ({_ms(pruned - softmax)} ms) "
        f"around its matrix products take {_of_pruned(account, pruned)}, {_ratios(account, dense, pruned)}.",
    )


def _elementwise(account: Account, cells: Sequence[Cell]) -> Cause | None:
    fused = is_fused(account.cells)
    mine = [cell for cell in cells if _is_elementwise(cell, fused)]
    dense, pruned = _sums(mine)
    if not pruned:
        return None
    return Cause(
        _lost(account, dense, pruned),
        f"Elementwise operators in attention and FFN ({_largest(mine)}) take {_of_pruned(account, pruned)}, "
        f"{_ratios(account, dense, pruned)}: they are bound by memory bandwidth, not by FLOPs.",
    )


def _is_elementwise(cell: Cell, fused: bool) -> bool:
    if cell.place.part in (*_FIXED, NORMS, LEFT_DENSE) or cell.kind in _COMPUTES:
        return False
    return fused or cell.place.part != ATTENTION or cell.kind not in (SOFTMAX, MOVEMENT)


def _products(account: Account, cells: Sequence[Cell], widths: Mapping[str, tuple[int, ...]]) -> Iterable[Cause | None]:
    """Yield matrix products that shrank less than their FLOPs: first those of odd widths, then the others by part."""
    mine = [c for c in cells if c.kind in _COMPUTES and c.place.part not in (*_FIXED, NORMS, LEFT_DENSE)]
    odd = {name: [width for width in of if width % STEP] for name, of in widths.items()}
    uneven = {name: of for name, of in odd.items() if of}
    off = [cell for cell in mine if _inside(cell.module, uneven) and _shrank(account, [cell])]
    uneven = {name: of for name, of in uneven.items() if any(_inside(cell.module, [name]) for cell in off)}
    even = [cell for cell in mine if cell not in off]
    yield _off_steps(account, off, uneven)
    for part in dict.fromkeys(cell.place.part for cell in even):
        yield _slower(account, [cell for cell in even if cell.place.part == part], part)


def _off_steps(account: Account, cells: Sequence[Cell], uneven: Mapping[str, Sequence[int]]) -> Cause | None:
    speeds = _speeds(account, cells)
    if speeds is None:
        return None
    named = [f"{name}: {', '.join(map(str, of))}" for name, of in uneven.items()]
    return Cause(
        _lost_to_speed(account, cells),
        f"Widths of no multiple of {STEP} are slow ({_some(named)}): their matrix products run at {speeds[1]} GFLOP/s, "
        f"in the dense network at {speeds[0]}.",
    )


def _slower(account: Account, cells: Sequence[Cell], part: str) -> Cause | None:
    speeds = _speeds(account, cells)
    if speeds is None or not _shrank(account, cells):
        return None
    dense, pruned = _sums(cells)
    before, after = _flops_of(account, cells)
    return Cause(
        _lost_to_speed(account, cells),
        f"Matrix products of {part} shrank less than their FLOPs: they take {pruned / dense:.2f} of their dense time "
        f"at {after / before:.2f} of the FLOPs, because they run at {speeds[1]} GFLOP/s, in the dense network at "
        f"{speeds[0]}.",
    )


def _speeds(account: Account, cells: Sequence[Cell]) -> tuple[str, str] | None:
    """Return the GFLOP/s of matrix products, dense and pruned, as text; None if either has no time or FLOPs."""
    times, flops = _sums(cells), _flops_of(account, cells)
    if not all((*times, *flops)):
        return None
    dense, pruned = (significant(count * account.batch_size / ms / 1e6) for count, ms in zip(flops, times, strict=True))
    return dense, pruned


def _lost_to_speed(account: Account, cells: Sequence[Cell]) -> float:
    """Return the time of the products above their dense time times their own FLOPs ratio."""
    (dense, pruned), (before, after) = _sums(cells), _flops_of(account, cells)
    return pruned - dense * after / before


def _shrank(account: Account, cells: Iterable[Cell]) -> bool:
    """Return whether modules have clearly fewer FLOPs than before, or no FLOPs that are counted."""
    before, after = _flops_of(account, cells)
    return not before or after < _SHRANK * before


def _flops_of(account: Account, cells: Iterable[Cell]) -> tuple[int, int]:
    counts = [account.flops.get(module, (0, 0)) for module in {cell.module for cell in cells}]
    return sum(dense for dense, _ in counts), sum(pruned for _, pruned in counts)


def _flops_outside(account: Account, parts: Sequence[str]) -> list[tuple[int, int]]:
    """Return the FLOPs of all modules outside these parts."""
    inside = {cell.module for cell in account.cells if cell.place.part in parts} | {""}
    return [counts for module, counts in account.flops.items() if module not in inside] or [(0, 0)]


def _all_flops(account: Account) -> list[int]:
    return [sum(column) for column in zip(*account.flops.values(), strict=True)]


def _realised(times_ms: Sequence[float], flops: Sequence[int]) -> float:
    """Speed-up ÷ FLOP reduction."""
    return times_ms[0] / times_ms[1] * flops[1] / flops[0]


def _tiny(cell: Cell) -> bool:
    ms, calls = (cell.pruned_ms, cell.pruned_calls) if cell.pruned_calls else (cell.dense_ms, cell.dense_calls)
    return ms < _TINY_MS * calls


def _inside(module: str, names: Iterable[str]) -> bool:
    return any(is_inside(module, name) for name in names)


def _sums(cells: Iterable[Cell]) -> tuple[float, float]:
    cells = list(cells)
    return sum(cell.dense_ms for cell in cells), sum(cell.pruned_ms for cell in cells)


def _lost(account: Account, dense: float, pruned: float) -> float:
    return pruned - dense * account.flops_ratio


def _largest(cells: Iterable[Cell], count: int = 3) -> str:
    """Return the types of operators that take the most time, with their times."""
    times: dict[str, float] = {}
    for cell in cells:
        times[cell.operator] = times.get(cell.operator, 0.0) + cell.pruned_ms
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


def _ratios(account: Account, dense: float, pruned: float) -> str:
    shrank = f"{pruned / dense:.2f} of their dense time" if dense else "0 ms in the dense network"
    return f"{shrank} at {account.flops_ratio:.2f} of the FLOPs"


def _of_pruned(account: Account, ms: float) -> str:
    return f"{_ms(ms)} of {_ms(account.measured_ms[1])} ms"


def _ms(value: float) -> str:
    return significant(value, 3 if value >= 1 else 2)
