"""The Pareto fronts of a sweep as SVG, in the style of ``report/plots.py``."""

from __future__ import annotations

import matplotlib

from optin_deploy.report.plots import DENSE, PRUNED
from optin_deploy.report.svg import INK, STYLE, panel, svg
from optin_deploy.sweeps import schema, wording


def draw_front(drawn: schema.Front, quality: schema.Quality) -> str:
    """Return quality over cost as SVG: intervals as bars, the front as a line, dominated points hollow."""
    scale = 100 if quality.kind in ("top1", "sign") else 1
    with matplotlib.rc_context(STYLE):
        figure, axes = panel(3.0)
        best = [point for point in drawn.points if not point.dominated]
        axes.plot([p.cost.value for p in best], [p.quality * scale for p in best], color=INK, alpha=0.4, linewidth=1)
        for point in drawn.points:
            color, marker = (DENSE, "s") if point.network == schema.DENSE else (PRUNED, "o")
            at = (point.cost.value, point.quality * scale)
            axes.plot([point.cost.low, point.cost.high], [at[1]] * 2, color=color, alpha=0.5, linewidth=1.4)
            axes.plot(
                *at,
                marker=marker,
                markersize=6,
                markeredgecolor=color,
                markerfacecolor="none" if point.dominated else color,
                gid=f"{point.network}-{wording.standing(point)}",
            )
            # Labels of points on the front are below, others above, so that neighbours do not overlap.
            offset = (4, 6) if point.dominated else (4, -11)
            axes.annotate(point.network, at, offset, textcoords="offset points", fontsize=8)
        axes.margins(x=0.16, y=0.14)
        axes.set_xlabel("FLOPs, pruned ÷ dense" if drawn.cost == "flops" else "p50 latency, pruned ÷ dense")
        axes.set_ylabel(f"{quality.name}, %" if quality.kind in ("top1", "sign") else quality.name)
        axes.set_title(wording.title(drawn))
        axes.grid(True)
        return svg(figure, f"front-{wording.title(drawn)}", "Quality over cost, dense and pruned")
