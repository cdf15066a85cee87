"""Style of the plots, and their conversion to inline SVG."""

from __future__ import annotations

import io
import re
from html import escape

from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

INK = "#010203"
"""Replaced by currentColor, which matplotlib cannot write."""

STYLE: dict[str, object] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "optin-deploy",
    "font.family": "sans-serif",
    "text.parse_math": False,
    "font.size": 9.5,
    "text.color": INK,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "grid.color": INK,
    "grid.alpha": 0.13,
    "grid.linewidth": 0.6,
}
_WIDTH = 4.6
"""Inches. A panel fills the width of a phone; two fit next to each other on a desktop."""


def panel(height: float) -> tuple[Figure, Axes]:
    """Return a figure of the usual width and ``height`` inches, and its axes. Draw and save it under `STYLE`."""
    figure = Figure(figsize=(_WIDTH, height), layout="constrained")
    FigureCanvasSVG(figure)
    return figure, figure.add_subplot()


def svg(figure: Figure, name: str, what: str) -> str:
    """Return the figure as SVG without prologue and metadata; the plot's name makes its ids unique in the page.

    Args:
        what: is shown, for those who are told of it; the titles of the axes follow.
    """
    label = escape("; ".join([what, *(axes.get_title(loc="left") for axes in figure.axes)]), quote=True)
    buffer = io.StringIO()
    figure.savefig(
        buffer, format="svg", transparent=True, metadata=dict.fromkeys(("Date", "Creator", "Format", "Type"))
    )
    text = buffer.getvalue()
    prefix = re.sub(r"[^\w-]", "_", name)
    text = text[text.index("<svg") :].replace(INK, "currentColor")
    text = text.replace("<svg", f'<svg role="img" aria-label="{label}"', 1)
    # A style element inside an SVG would restyle the whole page.
    text = re.sub(r"<style.*?</style>", "", text, flags=re.DOTALL)
    text = re.sub(r'\bid="', f'id="{prefix}-', text)
    text = re.sub(r'href="#', f'href="#{prefix}-', text)
    text = re.sub(r"url\(#", f"url(#{prefix}-", text)
    return re.sub(r"(font(?:-family)?:[^;\"]*?)'[^;\"]*", r"\1inherit", text)
