"""A sweep's report for the terminal, within 100 columns."""

from __future__ import annotations

from rich.console import Group
from rich.text import Text

from optin_deploy.sweeps import wording
from optin_deploy.sweeps.schema import Front, Point, SweepReport
from optin_deploy.utils.display import Table, render_banner, render_table


def summary(report: SweepReport) -> Group:
    """Return banners and all Pareto fronts as one table for a rich console."""
    banners = [render_banner(banner.text, alarm=banner.level == "alarm") for banner in wording.banners(report)]
    notes = (Text(), Text(wording.judged_by(report.quality)), Text(wording.RULE, style="dim"))
    return Group(*banners, render_table(_fronts(report), f"\n{report.model.name}"), *notes)


def _fronts(report: SweepReport) -> Table:
    rows = [
        _row(report, front, point, first=number == 0)
        for front in report.fronts
        for number, point in enumerate(front.points)
    ]
    heading = ("cost", "network", "÷ dense", report.quality.name, "")
    return Table(heading, rows, left=frozenset({0, 1, 4}), widths={0: 28, 1: 20, 3: 16})


def _row(report: SweepReport, front: Front, point: Point, *, first: bool) -> list[Text]:
    style = "dim" if point.dominated else ""
    cells = (
        wording.title(front) if first else "",
        point.network,
        wording.cost(point, front),
        wording.worth(point.quality, report.quality),
        wording.standing(point),
    )
    row = [Text(cell, style=style) for cell in cells]
    failed = wording.failed(point.network, report)
    if failed:
        row[-1].append(f", {failed} gate failed", style="bold red")
    return row
