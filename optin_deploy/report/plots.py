"""The report's plots, as SVG to be put inline into a page.

Text and lines take the page's text colour (currentColor), so one picture serves light and dark pages. The pictures
carry no legends: the page has one for all of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib
import numpy as np
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from optin_deploy.analysis.results import LayerBreakdown
from optin_deploy.report.schema import PlanEntry
from optin_deploy.report.svg import INK, STYLE, panel, svg
from optin_deploy.report.wording import runtime_name
from optin_deploy.utils import formatting
from profilers import Measurement

# Blue and vermilion are told apart with every common colour blindness, and both have a contrast of 3:1 or more on
# white and on near-black. The stylesheet's legend uses the same two.
DENSE = "#4a86c5"
PRUNED = "#d9622b"


def latency(measurement: Measurement) -> str:
    """The share of runs that took at most so long, for dense, dense again (A/A) and pruned, as an SVG string.

    The x axis ends past the largest p99, since one stray run in thousands would squeeze all the rest.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = panel(2.5)
        samples, summary = measurement.samples_ms, measurement.summary
        lowest, highest = summary.pruned.min_ms, summary.pruned.p99_ms
        for turns, figures, color, line, width in (
            (samples.dense, summary.dense, DENSE, "-", 1.8),
            (samples.dense_again, summary.dense_again, DENSE, ":", 1.3),
            (samples.pruned, summary.pruned, PRUNED, "-", 1.8),
        ):
            values, shares = _distribution([value for turn in turns for value in turn])
            axes.plot(values, shares, color=color, linestyle=line, linewidth=width)
            lowest, highest = min(lowest, figures.min_ms), max(highest, figures.p99_ms)
        margin = 0.06 * (highest - lowest) or 0.05 * highest
        axes.set_xlim(lowest - margin, highest + 2 * margin)
        axes.set_ylim(0, 101)
        axes.set_yticks([0, 50, 90, 99], ["0", "p50", "p90", "p99"])
        axes.set_xlabel("latency, ms")
        axes.set_title(f"{runtime_name(measurement.runtime)}, batch {measurement.batch_size}")
        axes.grid(True)
        case = f"{measurement.runtime}-{measurement.batch_size}"
        return svg(figure, f"latency-{case}", "Latency of every run, dense, dense again and pruned")


def throughput(measurements: Sequence[Measurement]) -> str:
    """Samples per second over batch size, dense beside pruned, for the measurements of one runtime, as SVG."""
    ordered = sorted(measurements, key=lambda item: item.batch_size)
    with matplotlib.rc_context(STYLE):
        figure, axes = panel(2.3)
        positions = np.arange(len(ordered))
        for offset, color, values in (
            (-0.19, DENSE, [item.throughput_per_s.dense for item in ordered]),
            (+0.19, PRUNED, [item.throughput_per_s.pruned for item in ordered]),
        ):
            bars = axes.bar(positions + offset, values, width=0.34, color=color)
            axes.bar_label(bars, [formatting.per_second(value) for value in values], padding=2, fontsize=8.5)
        axes.set_xticks(positions, [f"batch {item.batch_size}" for item in ordered])
        axes.set_xlim(-0.6, max(len(ordered), 2) - 0.4)
        axes.tick_params(axis="x", length=0)
        axes.margins(y=0.12)
        axes.set_ylabel("samples per second")
        axes.set_title(runtime_name(ordered[0].runtime))
        axes.grid(True, axis="y")
        axes.set_axisbelow(True)
        return svg(figure, f"throughput-{ordered[0].runtime}", "Throughput over batch size, dense and pruned")


def parts(breakdown: LayerBreakdown) -> str:
    """Milliseconds of one run by part of the network, dense above pruned, as an SVG string."""
    rows = [row for row in (*breakdown.parts, breakdown.between) if row.dense_ms or row.pruned_ms]
    with matplotlib.rc_context(STYLE):
        figure, axes = panel(0.9 + 0.36 * len(rows))
        positions = np.arange(len(rows))
        for offset, color, values in (
            (-0.19, DENSE, [row.dense_ms for row in rows]),
            (+0.19, PRUNED, [row.pruned_ms for row in rows]),
        ):
            bars = axes.barh(positions + offset, values, height=0.34, color=color)
            axes.bar_label(bars, [formatting.milliseconds(value) for value in values], padding=2, fontsize=8)
        axes.set_yticks(positions, [row.name for row in rows])
        axes.tick_params(axis="y", length=0)
        axes.invert_yaxis()
        axes.margins(x=0.12)
        axes.set_xlabel("milliseconds of one run")
        axes.set_title(f"{runtime_name(breakdown.runtime)}, batch {breakdown.batch_size}")
        axes.grid(True, axis="x")
        axes.set_axisbelow(True)
        return svg(figure, f"parts-{breakdown.runtime}-{breakdown.batch_size}", "Time by part, dense and pruned")


def blocks(breakdown: LayerBreakdown) -> str:
    """Milliseconds of one run by block, in the order they run, dense beside pruned, as SVG; "" for one block or none.

    What lies outside the blocks comes last.
    """
    rows = [row for row in breakdown.blocks if row.dense_ms or row.pruned_ms]
    if sum(bool(row.name) for row in rows) < 2:
        return ""
    with matplotlib.rc_context(STYLE):
        figure, axes = panel(2.1)
        positions = np.arange(len(rows))
        axes.bar(positions - 0.19, [row.dense_ms for row in rows], width=0.36, color=DENSE)
        axes.bar(positions + 0.19, [row.pruned_ms for row in rows], width=0.36, color=PRUNED)
        names = [str(number) if row.name else "other" for number, row in enumerate(rows)]
        # "other" is wide, and always shown.
        shown = [i for i, row in enumerate(rows) if not row.name or i % -(-len(rows) // 12) == 0]
        axes.set_xticks(shown, [names[i] for i in shown])
        axes.set_xlim(-0.6, len(rows) - 0.4)
        axes.tick_params(axis="x", length=0)
        axes.set_xlabel("block")
        axes.set_ylabel("ms")
        axes.set_title(f"{runtime_name(breakdown.runtime)}, batch {breakdown.batch_size}")
        axes.grid(True, axis="y")
        axes.set_axisbelow(True)
        return svg(figure, f"blocks-{breakdown.runtime}-{breakdown.batch_size}", "Time by block, dense and pruned")


def architecture(entries: Sequence[PlanEntry], title: str) -> str:
    """Units kept of those there were, layer by layer, for entries of one kind, as an SVG string."""
    with matplotlib.rc_context(STYLE):
        figure, axes = panel(2.1)
        positions = np.arange(len(entries))
        axes.bar(positions, [entry.units for entry in entries], width=0.72, color=INK, alpha=0.14)
        bars = axes.bar(positions, [entry.kept for entry in entries], width=0.72, color=PRUNED)
        if len(entries) <= 12:
            axes.bar_label(bars, [str(entry.kept) for entry in entries], padding=1.5, fontsize=8)
        step = -(-len(entries) // 16)
        axes.set_xticks(positions[::step], [str(entry.layer) for entry in entries[::step]])
        axes.set_xlim(-0.6, len(entries) - 0.4)
        axes.tick_params(axis="x", length=0)
        axes.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.margins(y=0.12)
        axes.set_xlabel("layer")
        axes.set_title(title)
        return svg(figure, f"architecture-{entries[0].kind}", "Kept layer by layer")


def _distribution(samples: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return latencies and the percentage of runs at or below each; at most 200 points, enough for a plot."""
    shares = np.linspace(0, 100, min(200, max(2, len(samples))))
    return np.percentile(samples, shares), shares
