"""The report's plots, as SVG to be put inline into a page.

Text and lines take the page's text colour (currentColor), so one picture serves light and dark pages. The pictures
carry no legends: the page has one for all of them.
"""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from optin_deploy.report import numbers
from optin_deploy.report.schema import Measurement, PlanEntry
from optin_deploy.report.wording import runtime_name

# Blue and vermilion are told apart with every common colour blindness, and both have a contrast of 3:1 or more on
# white and on near-black. The stylesheet's legend uses the same two.
DENSE = "#4a86c5"
PRUNED = "#d9622b"

_INK = "#010203"
"""Stands for currentColor, which matplotlib cannot write."""

_STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "optin-deploy",
    "font.family": "sans-serif",
    "text.parse_math": False,
    "font.size": 9.5,
    "text.color": _INK,
    "axes.edgecolor": _INK,
    "axes.labelcolor": _INK,
    "axes.linewidth": 0.6,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.color": _INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
}
_WIDTH = 4.6
"""Inches. A panel fills a phone's width at its own size, and two stand side by side on a desktop."""


def latency(measurement: Measurement) -> str:
    """The share of runs that took at most so long, for dense, dense again (A/A) and pruned, as an SVG string.

    The x axis ends past the largest p99, since one stray run in thousands would squeeze all the rest.
    """
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panel(2.5)
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
        return _svg(figure, f"latency-{measurement.runtime}-{measurement.batch_size}")


def throughput(measurements: Sequence[Measurement]) -> str:
    """Samples per second over batch size, dense beside pruned, for the measurements of one runtime, as SVG."""
    ordered = sorted(measurements, key=lambda item: item.batch_size)
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panel(2.3)
        positions = np.arange(len(ordered))
        for offset, color, values in (
            (-0.19, DENSE, [item.throughput_per_s.dense for item in ordered]),
            (+0.19, PRUNED, [item.throughput_per_s.pruned for item in ordered]),
        ):
            bars = axes.bar(positions + offset, values, width=0.34, color=color)
            axes.bar_label(bars, [numbers.per_second(value) for value in values], padding=2, fontsize=8.5)
        axes.set_xticks(positions, [f"batch {item.batch_size}" for item in ordered])
        axes.set_xlim(-0.6, max(len(ordered), 2) - 0.4)
        axes.tick_params(axis="x", length=0)
        axes.margins(y=0.12)
        axes.set_ylabel("samples per second")
        axes.set_title(runtime_name(ordered[0].runtime))
        axes.grid(True, axis="y")
        axes.set_axisbelow(True)
        return _svg(figure, f"throughput-{ordered[0].runtime}")


def architecture(entries: Sequence[PlanEntry], title: str) -> str:
    """Units kept of those there were, layer by layer, for entries of one kind, as an SVG string."""
    with matplotlib.rc_context(_STYLE):
        figure, axes = _panel(2.1)
        positions = np.arange(len(entries))
        axes.bar(positions, [entry.units for entry in entries], width=0.72, color=_INK, alpha=0.14)
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
        return _svg(figure, f"architecture-{entries[0].kind}")


def _panel(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def _distribution(samples: Sequence[float]) -> tuple[Any, Any]:
    """Latencies and the percentage of runs at or below each; at most 200 points, which the eye cannot tell from all."""
    shares = np.linspace(0, 100, min(200, max(2, len(samples))))
    return np.percentile(samples, shares), shares


def _svg(figure: Figure, name: str) -> str:
    """The figure without prologue and metadata, its ids made the page's only ones by the plot's name."""
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = buffer.getvalue()
    prefix = re.sub(r"[^\w-]", "_", name)
    text = text[text.index("<svg") :].replace(_INK, "currentColor")
    text = text.replace("<svg", f'<svg role="img" aria-label="{prefix}"', 1)
    # A style element inside an SVG would restyle the whole page.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    return re.sub(r"(font(?:-family)?:[^;\"]*?)'[^;\"]*", r"\1inherit", text)
