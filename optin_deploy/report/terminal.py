"""The report for the terminal, within 100 columns."""

from __future__ import annotations

from textwrap import fill

from rich.console import Group, RenderableType
from rich.text import Text

from exporters import OutputParity
from optin_deploy.export.command import Exported
from optin_deploy.report import tables, wording
from optin_deploy.report.schema import Report
from optin_deploy.utils import formatting
from optin_deploy.utils.display import WIDTH, render_banner, render_table

_BOTTLENECKS = 3


def summary(report: Report) -> Group:
    """Return banners, size, speed, outputs and the verdict for a rich console."""
    parts: list[RenderableType] = [render_banner(b.text, alarm=b.level == "alarm") for b in wording.banners(report)]
    parts.append(render_table(tables.size(report), f"\n{report.model.name}"))
    parts += _section("sparsity", wording.sparsity(report))
    if report.left_dense:
        share = formatting.percent(sum(entry.flops_share for entry in report.left_dense))
        parts.append(render_table(tables.left_dense(report), f"\nleft dense, {share} of the dense FLOPs"))
    if report.profile:
        title = f"\nlatency and throughput{wording.in_precision(report)}"
        parts.append(render_table(tables.speed(report), title))
    parts += [Text(fill(note, WIDTH), style="dim") for note in wording.speed_notes(report.profile)]
    parts += _list("on the GPU", wording.on_gpu(report))
    builds = wording.builds(report)
    if builds is not None:
        parts.append(Text(fill(builds, WIDTH), style="dim"))
    if report.engines:
        parts.append(render_table(tables.engines(report), "\nengines"))
    parts += _section("latency budget", wording.latency_budget(report))
    parts += _bottlenecks(report)
    outputs = tables.outputs(report)
    if outputs.rows:
        parts.append(render_table(outputs, "\noutputs"))
    return Group(*parts, Text(), Text(wording.verdict(report), style="bold"))


def render_exported(exported: Exported) -> Group:
    """Return an export's files and the largest errors of ONNX Runtime and the engines against PyTorch."""
    lines = [f"\nlargest error of ONNX Runtime against PyTorch: {_errors(exported.parity)}"]
    lines += [
        f"largest error of {name} against PyTorch: {_errors(parity)}" for name, parity in exported.engines.items()
    ]
    if exported.unchecked:
        lines.append(exported.unchecked)
    return Group(render_table(tables.files(exported.files)), Text("\n".join(lines)))


def _errors(parity: tuple[OutputParity, ...]) -> str:
    errors = ", ".join(f"{p.output} {p.max_abs_error:.1e}" for p in parity)
    most = max(parity, key=lambda p: p.near_ties, default=None)
    if most is None or not most.near_ties:
        return errors
    return f"{errors} (rounding decided which tokens merge in {most.near_ties} of {most.samples} samples)"


def _section(title: str, text: str | None) -> list[RenderableType]:
    return [] if text is None else [Text(f"\n{title}", style="bold"), Text(fill(text, WIDTH))]


def _list(title: str, items: list[str]) -> list[RenderableType]:
    lines = [fill(item, WIDTH, initial_indent="- ", subsequent_indent="  ") for item in items]
    return [Text(f"\n{title}", style="bold"), Text("\n".join(lines))] if lines else []


def _bottlenecks(report: Report) -> list[RenderableType]:
    """Return the costliest bottlenecks of the headline's runtime, or why they are unknown."""
    entry = wording.headline_layers(report)
    if entry is None:
        return []
    title = f"why not faster ({wording.runtime_name(entry.runtime)}, batch {entry.batch_size})"
    if entry.doubt:
        return _section(title, entry.doubt)
    return _list(title, [cause.sentence for cause in entry.causes[:_BOTTLENECKS]])
