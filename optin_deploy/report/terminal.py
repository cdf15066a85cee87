"""The report for the terminal, within 100 columns."""

from __future__ import annotations

from textwrap import fill

from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from exporters import OutputParity
from optin_deploy.export.command import Exported
from optin_deploy.report import wording
from optin_deploy.report.schema import Measurement, Report
from optin_deploy.utils import formatting

_WIDTH = 100
_CAUSES = 3
_LEFT_DENSE = 5


def summary(report: Report) -> Group:
    """Banners, size, speed, outputs and the verdict, as one renderable for a rich console."""
    parts: list[RenderableType] = [_banner(banner) for banner in wording.banners(report)]
    parts.append(_size(report))
    sparsity = wording.sparsity(report)
    if sparsity is not None:
        parts += [Text("\nsparsity", style="bold"), Text(fill(sparsity, _WIDTH))]
    if report.left_dense:
        parts.append(_left_dense(report))
    if report.profile:
        parts.append(_speed(report))
    parts += [Text(fill(note, _WIDTH), style="dim") for note in wording.speed_notes(report.profile)]
    parts += _on_gpu(report)
    builds = wording.builds(report)
    if builds is not None:
        parts.append(Text(fill(builds, _WIDTH), style="dim"))
    if report.engines:
        parts.append(_engines(report))
    budget = wording.latency_budget(report)
    if budget is not None:
        parts += [Text("\nlatency budget", style="bold"), Text(fill(budget, _WIDTH))]
    parts += _causes(report)
    outputs = _outputs(report)
    if outputs.row_count:
        parts.append(outputs)
    parts += [Text(), Text(wording.verdict(report), style="bold")]
    return Group(*parts)


def exported_view(exported: Exported) -> Group:
    """The files of an export, how far ONNX is from torch, and how far the engines are."""
    table = _table("files")
    table.add_column("", overflow="fold")
    table.add_column("", justify="right")
    table.show_header = False
    for file, size in exported.files.items():
        table.add_row(Text(file), f"{formatting.significant(size / 2**20)} MiB" if size >= 2**20 else f"{size} bytes")
    lines = [f"\nlargest error of ONNX Runtime against PyTorch: {_errors(exported.parity)}"]
    lines += [f"largest error of {name} against PyTorch: {_errors(found)}" for name, found in exported.engines.items()]
    return Group(table, Text("\n".join([*lines, *filter(None, [exported.unchecked])])))


def _errors(parity: tuple[OutputParity, ...]) -> str:
    told = ", ".join(f"{p.output} {p.max_abs_error:.1e}" for p in parity)
    most = max(parity, key=lambda p: p.near_ties, default=None)
    if most is None or not most.near_ties:
        return told
    return f"{told} ({most.near_ties} of {most.samples} samples with other tokens merged, where rounding decides)"


def _banner(banner: wording.Banner) -> Panel:
    style = "bold red" if banner.level == "alarm" else "yellow"
    return Panel(Text(banner.text), border_style=style, style=style, width=_WIDTH)


def _table(title: str | Text) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", header_style="dim", box=None, pad_edge=False)


def _size(report: Report) -> Table:
    table = _table(Text(f"\n{report.model.name}"))
    table.add_column("")
    for column in ("FLOPs", "parameters", "ONNX"):
        table.add_column(column, justify="right")
    for name, variant in (("dense", report.dense), ("pruned", report.pruned)):
        mib = f"{formatting.significant(variant.onnx_mib)} MiB"
        table.add_row(name, formatting.scaled(variant.flops), formatting.scaled(variant.parameters), mib)
    table.add_row(
        "change",
        formatting.change(report.dense.flops, report.pruned.flops),
        formatting.change(report.dense.parameters, report.pruned.parameters),
        formatting.change(report.dense.onnx_mib, report.pruned.onnx_mib),
    )
    return table


def _left_dense(report: Report) -> Table:
    """What takes most of the FLOPs that could not be pruned."""
    share = sum(each.flops_share for each in report.left_dense)
    table = _table(f"\nleft dense, {formatting.percent(share)} of the dense FLOPs")
    table.show_header = False
    table.add_column("", max_width=34, overflow="fold")
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("", max_width=_WIDTH - 46)
    for each in report.left_dense[:_LEFT_DENSE]:
        table.add_row(Text(wording.left_dense(each)), formatting.percent(each.flops_share), Text(each.reason))
    rest = report.left_dense[_LEFT_DENSE:]
    if rest:
        table.add_row(
            f"{len(rest)} more", formatting.percent(sum(each.flops_share for each in rest)), "see report.html"
        )
    return table


def _speed(report: Report) -> Table:
    table = _table(f"\nlatency and throughput{wording.in_precision(report)}")
    table.add_column("runtime", max_width=20)
    table.add_column("batch", justify="right")
    table.add_column("")
    for column in ("p50 ms", "p90 ms", "p99 ms", "samples/s", "speed-up", "realised"):
        table.add_column(column, justify="right", no_wrap=True)
    for item in report.profile:
        runtime, batch = wording.runtime_name(item.runtime), str(item.batch_size)
        dense, pruned = item.summary.dense, item.summary.pruned
        throughput = item.throughput_per_s
        for name, figures, rate, first, last in (
            ("dense", dense, throughput.dense, (runtime, batch), ("", "")),
            ("pruned", pruned, throughput.pruned, ("", ""), (_speedup(item), _realised(report, item))),
        ):
            latencies = (formatting.milliseconds(ms) for ms in (figures.p50_ms, figures.p90_ms, figures.p99_ms))
            table.add_row(*map(Text, first), name, *latencies, formatting.per_second(rate), *last)
    return table


def _on_gpu(report: Report) -> list[RenderableType]:
    lines = [fill(line, _WIDTH, initial_indent="- ", subsequent_indent="  ") for line in wording.on_gpu(report)]
    return [Text("\non the GPU", style="bold"), Text("\n".join(lines))] if lines else []


def _engines(report: Report) -> Table:
    table = _table("\nengines")
    for column in ("file", "built by"):
        table.add_column(column)
    table.add_column("size", justify="right")
    for engine in report.engines:
        table.add_row(Text(engine.file), Text(engine.builder), f"{formatting.significant(engine.mib)} MiB")
    return table


def _speedup(item: Measurement) -> Text:
    text = Text(f"{formatting.times(item.speedup.value)} [{formatting.bounds(item.speedup)}]")
    if item.significant:
        text.stylize("bold green" if wording.faster(item) else "bold red")
    else:
        text.append(" ~noise", style="yellow")
    return text


def _realised(report: Report, item: Measurement) -> str:
    ratio = report.realised_ratio(item)
    return "—" if ratio is None else f"{ratio.value:.2f}"


def _causes(report: Report) -> list[RenderableType]:
    """The most costly reasons why it is not faster, for the headline's runtime."""
    entry = wording.headline_layers(report)
    if entry is None or not (entry.causes or entry.doubt):
        return []
    where = f"{wording.runtime_name(entry.runtime)}, batch {entry.batch_size}"
    lines = (
        [fill(entry.doubt, _WIDTH)]
        if entry.doubt
        else [
            fill(cause.sentence, _WIDTH, initial_indent="- ", subsequent_indent="  ")
            for cause in entry.causes[:_CAUSES]
        ]
    )
    return [Text(f"\nwhy not faster ({where})", style="bold"), Text("\n".join(lines))]


def _outputs(report: Report) -> Table:
    table = _table("\noutputs, pruned against dense")
    table.show_header = False
    table.add_column("", max_width=30)
    table.add_column("", max_width=_WIDTH - 34)
    for entry in report.agreement:
        table.add_row(Text(entry.output), wording.agreement(entry))
    if report.evaluation is not None:
        figures = f"{report.evaluation.dense:.2f} → {report.evaluation.pruned:.2f}"
        if report.evaluation.deployed is not None:
            figures += f", {report.evaluation.deployed:.2f} in {report.precision},"
        told = f"{figures} on {report.evaluation.dataset} ({report.evaluation.samples} samples)"
        table.add_row(Text(report.evaluation.metric), Text(told))
    return table
