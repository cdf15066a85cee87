"""A sweep's report for the terminal, within 100 columns."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from optin_deploy.sweeps import wording
from optin_deploy.sweeps.schema import SweepReport

_WIDTH = 100


def summary(report: SweepReport) -> Group:
    """Banners, and the fronts as one table, as one renderable for a rich console."""
    parts: list[RenderableType] = []
    for banner in wording.banners(report):
        style = "bold red" if banner.level == "alarm" else "yellow"
        parts.append(Panel(Text(banner.text), border_style=style, style=style, width=_WIDTH))
    notes = (Text(), Text(wording.judged_by(report.quality)), Text(wording.RULE, style="dim"))
    return Group(*parts, _fronts(report), *notes)


def _fronts(report: SweepReport) -> Table:
    table = Table(
        title=Text(f"\n{report.model.name}"),
        title_justify="left",
        title_style="bold",
        header_style="dim",
        box=None,
        pad_edge=False,
    )
    table.add_column("cost", max_width=28)
    table.add_column("network", max_width=20)
    table.add_column("÷ dense", justify="right", no_wrap=True)
    table.add_column(report.quality.name, justify="right", max_width=16)
    table.add_column("", no_wrap=True)
    for front in report.fronts:
        for number, point in enumerate(front.points):
            standing = Text(wording.standing(point))
            failed = wording.failed(point.network, report)
            if failed:
                standing.append(f", {failed} gate failed", style="bold red")
            table.add_row(
                Text("" if number else wording.title(front)),
                Text(point.network),
                Text(wording.cost(point, front)),
                wording.worth(point.quality, report.quality),
                standing,
                style="dim" if point.dominated else "",
                end_section=point is front.points[-1],
            )
    return table
