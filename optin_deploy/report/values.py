"""What the values of the Python interface show: scores, what is kept, files, and comparisons."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.text import Text

from optin_deploy.report import wording
from optin_deploy.utils import formatting
from optin_deploy.utils.display import table
from profilers import Interval, Measurement

if TYPE_CHECKING:
    from torch import Tensor


def scores_view(title: str, scores: Mapping[str, Tensor]) -> RenderableType:
    """A line for each group: how many units, and the range of what they are worth."""
    rows = [
        (name, str(len(t)), *(f"{float(figure):.3g}" for figure in (t.min(), t.median(), t.max())))
        for name, t in scores.items()
    ]
    return Group(Text(title, style="bold"), table(("group", "units", "least", "median", "most"), rows))


def comparison_view(measurements: Sequence[Measurement], flops_reduction: float | None) -> RenderableType:
    """Latencies, speed-ups with their intervals, the noise, and what of the FLOPs' reduction came true."""
    rows = []
    for item in measurements:
        for name in wording.VARIANTS:
            figures = item.summary[name]
            latencies = [formatting.milliseconds(ms) for ms in (figures.p50_ms, figures.p90_ms, figures.p99_ms)]
            first = (wording.runtime_name(item.runtime), str(item.batch_size)) if name == "dense" else ("", "")
            last = (
                ("", "", "")
                if name == "dense"
                else (speedup(item), _noise(item.noise), _realised(item, flops_reduction))
            )
            rows.append((*first, name, *latencies, *last))
    heading = ("runtime", "batch", "", "p50 ms", "p90 ms", "p99 ms", "speed-up", "A/A noise", "realised")
    return Group(table(heading, rows), *(Text(note, style="dim") for note in wording.speed_notes(measurements)))


def speedup(item: Measurement) -> str:
    """A speed-up with its interval, and whether it is noise."""
    noise = "" if item.significant else " ~noise"
    return f"{formatting.times(item.speedup.value)} [{item.speedup.low:.2f}–{item.speedup.high:.2f}]{noise}"


def comparison_lines(measurements: Sequence[Measurement], flops_reduction: float | None) -> str:
    """The same, a line for each measurement."""
    return "\n".join(
        f"{wording.runtime_name(item.runtime)}, batch {item.batch_size}: {speedup(item)} by round, {_medians(item)}, "
        f"A/A noise {_noise(item.noise)}, realised {_realised(item, flops_reduction)}"
        for item in measurements
    )


def _medians(item: Measurement) -> str:
    dense, pruned = (formatting.milliseconds(item.summary[name].p50_ms) for name in wording.VARIANTS)
    return f"p50 {dense} -> {pruned} ms"


def _realised(item: Measurement, flops_reduction: float | None) -> str:
    return "—" if flops_reduction is None else f"{item.speedup.value / flops_reduction:.2f}"


def _noise(interval: Interval) -> str:
    return f"±{100 * max(abs(interval.low - 1), abs(interval.high - 1)):.1f} %"
