"""Results of the latency analysis, as they are stored in ``report.json``; importing them needs no torch."""

from dataclasses import dataclass

from profilers.stats import Above


@dataclass(frozen=True)
class TimeRow:
    """Milliseconds of one run and FLOPs of one sample (0 if none are counted) of one part of both networks."""

    name: str
    dense_ms: float
    pruned_ms: float
    dense_flops: int = 0
    pruned_flops: int = 0


@dataclass(frozen=True)
class WholeRow(TimeRow):
    """The row of the whole networks, whose times are above 0."""

    dense_ms: Above
    pruned_ms: Above


@dataclass(frozen=True)
class Bottleneck:
    """A reason why the pruned network takes longer than its FLOPs suggest, and the milliseconds it accounts for."""

    lost_ms: float
    sentence: str


@dataclass(frozen=True)
class LayerBreakdown:
    """The latency breakdown at one runtime and batch size.

    Attributes:
        parts, blocks, kinds: the same time by part, by block and by kind of operator. Each of the three sums, with
            ``between``, to ``measured``.
        between: time between operators.
        measured: medians of unprofiled runs, to which the profile is scaled.
        profiled: the sums of the profile before it was scaled.
        lost_ms: the pruned network's time above the dense time times the FLOPs ratio.
        causes: the largest first; empty if ``doubt`` is set.
        doubt: why the breakdown cannot be trusted.
    """

    runtime: str
    batch_size: int
    parts: tuple[TimeRow, ...]
    blocks: tuple[TimeRow, ...]
    kinds: tuple[TimeRow, ...]
    between: TimeRow
    measured: WholeRow
    profiled: TimeRow
    lost_ms: float
    causes: tuple[Bottleneck, ...]
    doubt: str | None = None


@dataclass(frozen=True)
class Unprofiled:
    """A runtime whose layers could not be profiled, and the reason."""

    runtime: str
    unprofiled: str
