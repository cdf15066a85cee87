"""A sweep's report as one self-contained web page, which links to the pages of its runs."""

from __future__ import annotations

from pathlib import Path

from markupsafe import Markup

from optin_deploy.report import plots as run_plots
from optin_deploy.report.web_page import page_style, template_environment, utc_minute
from optin_deploy.sweeps import plots, wording
from optin_deploy.sweeps.schema import DENSE, SweepReport


def render(report: SweepReport) -> str:
    """Return the whole page; all text of the report is escaped."""
    return (
        template_environment(Path(__file__).parent)
        .get_template("template.html.j2")
        .render(
            report=report,
            device=report.environment.get("cpu"),
            created=utc_minute(report.created),
            banners=wording.banners(report),
            wording=wording,
            dense=DENSE,
            style=page_style(),
            colors={"dense": run_plots.DENSE, "pruned": run_plots.PRUNED},
            pictures=[Markup(plots.draw_front(front, report.quality)) for front in report.fronts],
        )
    )
