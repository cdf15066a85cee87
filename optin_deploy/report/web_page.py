"""The report as one self-contained web page: style and images are inline, without scripts or requests."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime
from itertools import groupby
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from optin_deploy.report import plots, wording
from optin_deploy.report.schema import PlanEntry, Report
from optin_deploy.utils import formatting

_FOLDER = Path(__file__).parent
_KINDS = {
    "head": "Attention heads kept",
    "width": "Head width kept",
    "neuron": "FFN neurons kept",
    "channel": "Channels kept",
    "token": "Tokens that enter each block",
}


# Figures of agreement that only some outputs have: field, title, whether it is a share.
_ANSWERS = (
    ("top1_agreement", "Same top answer", True),
    ("sign_agreement", "Same yes or no", True),
    ("rank_correlation", "Rank correlation", False),
    ("correlation", "Correlation", False),
)


def template_environment(folder: Path) -> Environment:
    """Return an environment for the templates in ``folder`` and the shared ones, with filters for figures."""
    environment = Environment(
        loader=FileSystemLoader([folder, _FOLDER]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    for name in ("scaled", "milliseconds", "per_second", "times", "bounds", "percent", "scientific", "significant"):
        environment.filters[name] = getattr(formatting, name)
    return environment


def page_style() -> Markup:
    """Return the style sheet of all pages."""
    return Markup((_FOLDER / "style.css").read_text(encoding="utf-8"))


def utc_minute(time: datetime) -> str:
    """Return a time to the minute, in UTC."""
    return time.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC")


def render(report: Report) -> str:
    """Return the whole page; all text of the report is escaped."""
    environment = template_environment(_FOLDER)
    environment.filters |= {
        "noise": formatting.noise,
        "runtime": wording.runtime_name,
        "left_dense": wording.left_dense,
        "breakable": _breakable,
    }
    item = wording.headline(report)
    return environment.get_template("template.html.j2").render(
        report=report,
        created=utc_minute(report.created),
        banners=wording.banners(report),
        verdict=wording.verdict(report),
        change_of_flops=wording.change_of_flops(report),
        speed_notes=wording.speed_notes(report.profile),
        latency_budget=wording.latency_budget(report),
        builds=wording.builds(report),
        sparsity=wording.sparsity(report),
        precision=wording.precision(report),
        headline=item,
        likeness=_likeness(report),
        answers=[a for a in _ANSWERS if any(getattr(row, a[0]) is not None for row in report.agreement)],
        random=wording.has_random_weights(report.model),
        device=wording.device_name(report, item.runtime) if item else None,
        faster=wording.faster,
        on_gpu=wording.on_gpu(report),
        change=formatting.change,
        ratio=formatting.ratio,
        profiled_share=wording.profiled_share,
        style=page_style(),
        colors={"dense": plots.DENSE, "pruned": plots.PRUNED},
        latency=[Markup(plots.latency(entry)) for entry in report.profile],
        throughput=[Markup(picture) for picture in _throughputs(report)],
        layers=[(entry, Markup(plots.parts(entry)), Markup(plots.blocks(entry))) for entry in report.layers],
        architecture=[Markup(picture) for picture in _architectures(report.plan)],
        model=_rows(
            {
                "library": report.model.library,
                "weights": report.model.weights,
                "inputs": {name: " × ".join(map(str, shape)) for name, shape in report.model.inputs.items()},
            }
        ),
        settings=_rows({name: value for name, value in report.settings.items() if value is not None}),
        calibration=_rows(report.calibration.model_dump()),
        protocol=_rows(report.protocol),
        environment=_rows(report.environment),
    )


def _likeness(report: Report) -> tuple[str, str]:
    """Return a figure for the agreement of the first output, and its label."""
    if not report.agreement:
        return "—", ""
    first = report.agreement[0]
    if first.sign_agreement is not None:
        return formatting.percent(first.sign_agreement), "same yes or no as the dense network"
    if first.rank_correlation is not None:
        return f"{first.rank_correlation:.3f}", "rank correlation with the dense network"
    return f"{first.cosine:.3f}", "cosine with the dense network"


def _breakable(name: str) -> Markup:
    """Return a module's name that may break after its dots, and nowhere else."""
    return Markup(".<wbr>").join(name.split("."))


def _throughputs(report: Report) -> list[str]:
    return [plots.throughput(list(items)) for _, items in groupby(report.profile, key=lambda item: item.runtime)]


def _architectures(plan: list[PlanEntry]) -> list[str]:
    pictures = []
    for kind, title in _KINDS.items():
        entries = [entry for entry in plan if entry.kind == kind]
        if entries:
            kept, units = sum(entry.kept for entry in entries), sum(entry.units for entry in entries)
            pictures.append(plots.architecture(entries, f"{title}: {kept} of {units}"))
    return pictures


def _rows(values: Mapping[str, object], prefix: str = "") -> list[tuple[str, str]]:
    """Return a nested mapping as (label, text) rows, with inner keys after their outer ones."""
    rows: list[tuple[str, str]] = []
    for key, value in values.items():
        label = f"{prefix}{str(key).replace('_', ' ')}"
        if isinstance(value, Mapping):
            rows += _rows(value, f"{label} · ")
        else:
            rows.append((label, _text(value)))
    return rows


def _text(value: object) -> str:
    if value is None:
        return "—"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{str(key).replace('_', ' ')} {_text(inner)}" for key, inner in value.items())
    if isinstance(value, list | tuple):
        simple = all(isinstance(inner, int | float | str) for inner in value)
        return (", " if simple else "; ").join(map(_text, value)) or "none"
    return f"{value:g}" if isinstance(value, float) else str(value)
