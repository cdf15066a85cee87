"""Whether an account of where the time goes can be trusted: a busy machine makes causes of noise."""

from collections.abc import Sequence

from optin_deploy.analysis.breakdown import Account, Cell
from optin_deploy.analysis.module_roles import CONVOLUTION, EMBEDDING, HEAD, MERGING, NORMS
from optin_deploy.utils.formatting import milliseconds, percent
from profilers import GPU_RUNTIMES

SUM = (0.7, 1.4)
"""What a profile may sum to, of the measured time. Quiet, vision transformers of 4 to 50 ms sum to 1.00 to 1.34, more
the shorter their operators are; on a busy machine 1.4 to 2.4, and so do networks of half a millisecond when quiet."""

SAME = (0.8, 1.25)
"""What work that is the same in both networks may take in the pruned one, of its dense time: quiet 0.88 to 1.0 (more of
a smaller network is in the cache), busy 0.58 to 1.2."""

# Timing an operator by itself takes microseconds.
_SHORT_MS = 0.05
_PACE = (0.8, 1.25)
_LITTLE = 0.05


def doubt(account: Account) -> str | None:
    """Why ``account`` tells nothing, in a sentence; None where it can be trusted, and on GPUs, whose profilers wait for
    every operator, so that they rightly sum to more than a run takes."""
    if account.runtime in GPU_RUNTIMES:
        return None
    sums = [own / whole for own, whole in zip(account.profiled_ms, account.measured_ms, strict=True)]
    if not all(_within(share, SUM) for share in sums):
        paces = [own / whole for own, whole in zip(account.unprofiled_ms, account.measured_ms, strict=True)]
        short = all(_within(pace, _PACE) for pace in paces) and max(sums) > SUM[1] and _operator_ms(account) < _SHORT_MS
        cause = "Operators are too short" if short else "The machine was too busy"
        return (
            f"{cause} for the account of where the time goes to be trusted: operators timed one by one sum to "
            f"{percent(sums[0])} (dense) and {percent(sums[1])} (pruned) of the measured time."
        )
    same = _same_work(account)
    dense, pruned = sum(cell.dense_ms for cell in same), sum(cell.pruned_ms for cell in same)
    if dense < _LITTLE * account.measured_ms[0] or _within(pruned / dense, SAME):
        return None
    return (
        "The machine was too busy for the account of where the time goes to be trusted: work that is the same in both "
        f"networks took {milliseconds(dense)} ms in the dense one and {milliseconds(pruned)} ms in the pruned one."
    )


def _operator_ms(account: Account) -> float:
    """How long the profiler took for an operator of the dense network, on average."""
    return account.profiled_ms[0] / max(1, sum(cell.dense_calls for cell in account.cells))


def _same_work(account: Account) -> Sequence[Cell]:
    """Operators that do the same, as often, in both networks.

    Where no FLOPs are counted, norms, embedding and head are the same unless tokens merge or channels were pruned.
    """
    parts = {cell.place.part for cell in account.cells}
    uncounted = () if parts & {MERGING, CONVOLUTION} else (NORMS, EMBEDDING, HEAD)

    def same(cell: Cell) -> bool:
        before, after = account.flops.get(cell.module, (0, 0))
        alike = before == after if before or after else cell.place.part in uncounted
        return alike and cell.dense_calls == cell.pruned_calls

    return [cell for cell in account.cells if same(cell)]


def _within(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= value <= bounds[1]
