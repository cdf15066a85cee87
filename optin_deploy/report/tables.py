"""The tables of reports as values, which the terminal, the notebook and Markdown render alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.text import Text

from optin_deploy.report import wording
from optin_deploy.report.schema import Report
from optin_deploy.utils import formatting
from optin_deploy.utils.display import Cell, Table
from profilers import Measurement

if TYPE_CHECKING:
    from torch import Tensor

_LEFT_DENSE = 5
_CASE = ("runtime", "batch", "", "p50 ms", "p90 ms", "p99 ms")
# Columns of the case and the network are read as text.
_CASE_LEFT = frozenset({0, 2})


def size(report: Report) -> Table:
    """Return FLOPs, parameters and ONNX files of both networks, and their relative changes."""
    dense, pruned = report.dense, report.pruned
    rows = [
        (name, formatting.scaled(v.flops), formatting.scaled(v.parameters), f"{formatting.significant(v.onnx_mib)} MiB")
        for name, v in (("dense", dense), ("pruned", pruned))
    ]
    changes = (
        formatting.change(dense.flops, pruned.flops),
        formatting.change(dense.parameters, pruned.parameters),
        formatting.change(dense.onnx_mib, pruned.onnx_mib),
    )
    return Table(("", "FLOPs", "parameters", "ONNX"), [*rows, ("change", *changes)])


def speed(report: Report) -> Table:
    """Return latencies, throughput, speed-ups and realised ratios of a report, two rows for each measurement."""
    reduction = report.flops_reduction if report.realised else None
    rows: list[Sequence[Cell]] = []
    for item in report.profile:
        dense, pruned = _latencies(item)
        rates = item.throughput_per_s
        rows.append((*dense, formatting.per_second(rates.dense), "", ""))
        rows.append((*pruned, formatting.per_second(rates.pruned), speedup(item), realised(item, reduction)))
    heading = (*_CASE, "samples/s", "speed-up", "realised")
    return Table(heading, rows, left=_CASE_LEFT, widths={0: 20}, fold_figures=False)


def comparison(measurements: Sequence[Measurement], flops_reduction: float | None) -> Table:
    """Return latencies, speed-ups, A/A noise and realised ratios, two rows for each measurement."""
    rows: list[Sequence[Cell]] = []
    for item in measurements:
        dense, pruned = _latencies(item)
        rows.append((*dense, "", "", ""))
        rows.append((*pruned, speedup(item), formatting.noise(item.noise), realised(item, flops_reduction)))
    return Table((*_CASE, "speed-up", "A/A noise", "realised"), rows, left=_CASE_LEFT)


def comparison_lines(measurements: Sequence[Measurement], flops_reduction: float | None) -> str:
    """Return the figures of `comparison` as text, a line for each measurement."""
    lines = []
    for item in measurements:
        dense_ms, pruned_ms = map(formatting.milliseconds, wording.medians_ms(item))
        lines.append(
            f"{wording.runtime_name(item.runtime)}, batch {item.batch_size}: {speedup(item)} by round, "
            f"p50 {dense_ms} -> {pruned_ms} ms, A/A noise {formatting.noise(item.noise)}, "
            f"realised {realised(item, flops_reduction)}"
        )
    return "\n".join(lines)


def _latencies(item: Measurement) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the cells below `_CASE` of the dense and of the pruned network."""
    dense, pruned = (
        tuple(formatting.milliseconds(ms) for ms in (summary.p50_ms, summary.p90_ms, summary.p99_ms))
        for summary in (item.summary.dense, item.summary.pruned)
    )
    return (wording.runtime_name(item.runtime), str(item.batch_size), "dense", *dense), ("", "", "pruned", *pruned)


def speedup(item: Measurement) -> Text:
    """Return a speed-up with its interval, marked where it is not significant."""
    text = Text(f"{formatting.times(item.speedup.value)} [{formatting.bounds(item.speedup)}]")
    if item.significant:
        text.stylize("bold green" if item.speedup.value > 1 else "bold red")
    else:
        text.append(" ~noise", style="yellow")
    return text


def realised(item: Measurement, flops_reduction: float | None) -> str:
    """Return the realised ratio; a dash where no FLOPs were removed or their number is unknown."""
    return "—" if flops_reduction is None else f"{item.speedup.value / flops_reduction:.2f}"


def left_dense(report: Report) -> Table:
    """Return the modules left dense that take the most FLOPs, and how many more there are."""
    rows = [
        (wording.left_dense(entry), formatting.percent(entry.flops_share), entry.reason)
        for entry in report.left_dense[:_LEFT_DENSE]
    ]
    rest = report.left_dense[_LEFT_DENSE:]
    if rest:
        share = formatting.percent(sum(entry.flops_share for entry in rest))
        rows.append((f"{len(rest)} more", share, "see report.html"))
    return Table(("module", "FLOPs", "why"), rows, left=frozenset({0, 2}), widths={0: 34, 2: 54}, fold_figures=False)


def engines(report: Report) -> Table:
    """Return the engine files, their builders and sizes."""
    rows = [(engine.file, engine.builder, f"{formatting.significant(engine.mib)} MiB") for engine in report.engines]
    return Table(("file", "built by", "size"), rows, left=frozenset({0, 1}))


def outputs(report: Report) -> Table:
    """Return how close the pruned outputs are to the dense ones, and the metric on labelled data."""
    rows = [(entry.output, wording.agreement(entry)) for entry in report.agreement]
    result = report.evaluation
    if result is not None:
        deployed = "" if result.deployed is None else f", {result.deployed:.2f} in {report.precision}"
        figures = f"{result.dense:.2f} → {result.pruned:.2f}{deployed}"
        rows.append((result.metric, f"{figures} on {result.dataset} ({result.samples} samples)"))
    return Table(("output", "dense → pruned"), rows, left=frozenset({0, 1}), widths={0: 30, 1: 66})


def gates(report: Report) -> Table:
    """Return the gates, whether they passed, and why."""
    rows = [(gate.name, "passed" if gate.passed else "FAILED", gate.detail) for gate in report.gates]
    return Table(("gate", "result", "detail"), rows, left=frozenset({0, 1, 2}))


def files(sizes: Mapping[str, int]) -> Table:
    """Return the files of an export with their sizes; ``sizes`` are in bytes."""
    rows = [
        (name, f"{formatting.significant(size / 2**20)} MiB" if size >= 2**20 else f"{size} bytes")
        for name, size in sizes.items()
    ]
    return Table(("file", "size"), rows)


def scores(scores_by_group: Mapping[str, Tensor]) -> Table:
    """Return the number of units of every group, and the range of their scores."""
    rows = [
        (name, str(len(t)), *(f"{float(score):.3g}" for score in (t.min(), t.median(), t.max())))
        for name, t in scores_by_group.items()
    ]
    return Table(("group", "units", "least", "median", "most"), rows)
