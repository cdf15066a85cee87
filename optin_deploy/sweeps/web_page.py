"""A sweep's report as one web page that needs nothing else but, behind its links, the pages of its runs."""

from __future__ import annotations

from datetime import UTC
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from optin_deploy import report as run_report
from optin_deploy.report import plots as run_plots
from optin_deploy.sweeps import plots, wording
from optin_deploy.sweeps.schema import DENSE, SweepReport
from optin_deploy.utils import formatting


def render(report: SweepReport) -> str:
    """The whole page. Every text of the report is escaped."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"scaled": formatting.scaled}
    style = Path(run_report.__file__).with_name("style.css")
    return environment.get_template("template.html.j2").render(
        report=report,
        created=report.created.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        banners=wording.banners(report),
        wording=wording,
        dense=DENSE,
        style=Markup(style.read_text(encoding="utf-8")),
        colors={"dense": run_plots.DENSE, "pruned": run_plots.PRUNED},
        pictures=[Markup(plots.front(front, report.quality)) for front in report.fronts],
    )
