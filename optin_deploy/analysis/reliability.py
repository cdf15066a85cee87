"""Whether a latency breakdown is reliable: on a busy machine, noise looks like bottlenecks."""

from collections.abc import Sequence

from optin_deploy.analysis.breakdown import LatencyBreakdown, OperatorTime
from optin_deploy.analysis.module_roles import CONVOLUTION, EMBEDDING, HEAD, MERGING, NORMS
from optin_deploy.utils.formatting import milliseconds, percent
from profilers import GPU_RUNTIMES

SUM = (0.7, 1.4)
"""Range of (sum of a profile) ÷ (measured time). On a quiet machine, vision transformers of 4 to 50 ms sum to 1.00 to
1.34, more the shorter their operators are. On a busy machine they sum to 1.4 to 2.4; so do networks of half a
millisecond on a quiet machine."""

SAME = (0.8, 1.25)
"""Range of pruned ÷ dense time of work that is identical in both networks: 0.88 to 1.0 on a quiet machine (the cache
holds more of a smaller network), 0.58 to 1.2 on a busy one."""

# Timing a single operator adds microseconds.
_SHORT_OPERATOR_MS = 0.05
_RUN = (0.8, 1.25)
_MIN_SHARE = 0.05


def check_reliability(breakdown: LatencyBreakdown) -> str | None:
    """Return why ``breakdown`` is unreliable, in a sentence; None if it is reliable.

    It is None on GPUs: their profilers wait for every operator, so that the sum is above the time of a run.
    """
    if breakdown.runtime in GPU_RUNTIMES:
        return None
    sums = [profiled / whole for profiled, whole in zip(breakdown.profiled_ms, breakdown.measured_ms, strict=True)]
    if not all(_within(share, SUM) for share in sums):
        paces = [run / whole for run, whole in zip(breakdown.unprofiled_ms, breakdown.measured_ms, strict=True)]
        short = (
            all(_within(pace, _RUN) for pace in paces)
            and max(sums) > SUM[1]
            and _operator_ms(breakdown) < _SHORT_OPERATOR_MS
        )
        cause = "Operators are too short" if short else "The machine was too busy"
        return (
            f"{cause} for a reliable latency breakdown: operators timed one by one sum to "
            f"{percent(sums[0])} (dense) and {percent(sums[1])} (pruned) of the measured time."
        )
    same = _same_work(breakdown)
    dense, pruned = sum(op.dense_ms for op in same), sum(op.pruned_ms for op in same)
    if dense < _MIN_SHARE * breakdown.measured_ms[0] or _within(pruned / dense, SAME):
        return None
    return (
        "The machine was too busy for a reliable latency breakdown: work that is identical in both networks took "
        f"{milliseconds(dense)} ms in the dense one and {milliseconds(pruned)} ms in the pruned one."
    )


def _operator_ms(breakdown: LatencyBreakdown) -> float:
    """Return the average profiled time of an operator of the dense network."""
    return breakdown.profiled_ms[0] / max(1, sum(op.dense_calls for op in breakdown.operators))


def _same_work(breakdown: LatencyBreakdown) -> Sequence[OperatorTime]:
    """Return the operators that do identical work, equally often, in both networks.

    Where FLOPs are not counted, norms, embedding and head are identical unless tokens merge or channels were pruned.
    """
    parts = {op.role.part for op in breakdown.operators}
    uncounted = () if parts & {MERGING, CONVOLUTION} else (NORMS, EMBEDDING, HEAD)

    def same(op: OperatorTime) -> bool:
        before, after = breakdown.flops.get(op.module, (0, 0))
        alike = before == after if before or after else op.role.part in uncounted
        return alike and op.dense_calls == op.pruned_calls

    return [op for op in breakdown.operators if same(op)]


def _within(value: float, bounds: tuple[float, float]) -> bool:
    return bounds[0] <= value <= bounds[1]
