"""The report as Markdown, short enough for a pull request."""

from __future__ import annotations

from collections.abc import Sequence

from optin_deploy.report import wording
from optin_deploy.report.schema import Measurement, Report
from optin_deploy.utils import formatting

_CAUSES = 5
_LEFT_DENSE = 5


def render(report: Report) -> str:
    """The verdict, what qualifies it, size, speed, outputs, gates, and how to do it again."""
    title = f"{report.model.name}: {wording.change_of_flops(report)}"
    parts = [f"## {escaped(title)}", f"**{escaped(wording.verdict(report))}**"]
    parts += [f"> **{banner.level}:** {escaped(banner.text)}" for banner in wording.banners(report)]
    parts += figures(report)
    entry = wording.headline_layers(report)
    if entry is not None and (entry.causes or entry.doubt):
        where = f"{wording.runtime_name(entry.runtime)}, batch {entry.batch_size}"
        parts.append(f"**Why not faster** ({where})")
        causes = "\n".join(f"- {escaped(cause.sentence)}" for cause in entry.causes[:_CAUSES])
        parts.append(escaped(entry.doubt) if entry.doubt else causes)
    if report.left_dense:
        parts.append("**Left dense**")
        parts.append(table(["", "FLOPs", "why"], _left_dense(report)))
    parts.append(table(["gate", "", ""], _gates(report)))
    parts.append(f"{machine(report)}\n\n{fenced(report.command)}")
    return "\n\n".join(parts) + "\n"


def figures(report: Report) -> list[str]:
    """Size, speed and outputs of both networks: tables, and what is to be said of them."""
    parts = [table(["", "FLOPs", "parameters", "ONNX"], _sizes(report))]
    if report.profile:
        parts.append(table(_SPEED, [row for item in report.profile for row in _speed(report, item)]))
        parts.append("Brackets: 95 % interval. Realised: speed-up ÷ FLOP reduction.")
        parts.append(escaped(" ".join(wording.speed_notes(report.profile))))
    sentences = (wording.latency_budget(report), wording.sparsity(report), wording.precision(report))
    parts += [escaped(sentence) for sentence in sentences if sentence]
    outputs = _outputs(report)
    if outputs:
        parts.append(table(["output", "dense → pruned"], outputs))
    return parts


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; every cell is text, none is markup."""
    lines = [heading, ["---"] * len(heading), *([escaped(cell) for cell in row] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def escaped(text: str) -> str:
    """``text`` on one line, in which nothing is taken for markup, a table's end, a mention or HTML."""
    one_line = " ".join(text.split())
    for sign in "\\`*_{}[]<>|#":
        one_line = one_line.replace(sign, f"\\{sign}")
    # A zero-width space keeps "@name" from calling somebody.
    return one_line.replace("@", "@\u200b")


def fenced(text: str, language: str = "") -> str:
    """``text`` as a block of code, in a fence longer than any in it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def _sizes(report: Report) -> list[list[str]]:
    dense, pruned = report.dense, report.pruned
    rows = [
        [name, formatting.scaled(v.flops), formatting.scaled(v.parameters), f"{formatting.significant(v.onnx_mib)} MiB"]
        for name, v in (("dense", dense), ("pruned", pruned))
    ]
    pairs = (
        (dense.flops, pruned.flops),
        (dense.parameters, pruned.parameters),
        (dense.onnx_mib, pruned.onnx_mib),
    )
    return [*rows, ["change", *(formatting.change(before, after) for before, after in pairs)]]


_SPEED = ["runtime", "batch", "", "p50 ms", "p90 ms", "p99 ms", "samples/s", "speed-up", "realised"]


def _speed(report: Report, item: Measurement) -> list[list[str]]:
    rows = []
    first, last = [wording.runtime_name(item.runtime), str(item.batch_size)], ["", ""]
    for name in wording.VARIANTS:
        figures, rate = getattr(item.summary, name), getattr(item.throughput_per_s, name)
        latencies = [formatting.milliseconds(ms) for ms in (figures.p50_ms, figures.p90_ms, figures.p99_ms)]
        if name == "pruned":
            first, last = ["", ""], [speedup(item), realised(report, item)]
        rows.append([*first, name, *latencies, formatting.per_second(rate), *last])
    return rows


def speedup(item: Measurement) -> str:
    """A speed-up with its interval, and whether it is noise."""
    noise = "" if item.significant else ", not significant"
    return f"{formatting.times(item.speedup.value)} [{formatting.bounds(item.speedup)}]{noise}"


def realised(report: Report, item: Measurement) -> str:
    """The realised ratio; a dash where no FLOPs were removed."""
    ratio = report.realised_ratio(item)
    return "—" if ratio is None else f"{ratio.value:.2f}"


def _outputs(report: Report) -> list[list[str]]:
    rows = []
    for entry in report.agreement:
        rows.append([entry.output, wording.agreement(entry)])
    found = report.evaluation
    if found is not None:
        deployed = "" if found.deployed is None else f", {found.deployed:.2f} in {report.precision}"
        figures = f"{found.dense:.2f} → {found.pruned:.2f}{deployed}"
        rows.append([found.metric, f"{figures} on {found.dataset} ({found.samples} samples)"])
    return rows


def _left_dense(report: Report) -> list[list[str]]:
    shown, rest = report.left_dense[:_LEFT_DENSE], report.left_dense[_LEFT_DENSE:]
    rows = [[wording.left_dense(each), formatting.percent(each.flops_share), each.reason] for each in shown]
    if rest:
        rows.append(
            [f"{len(rest)} more", formatting.percent(sum(each.flops_share for each in rest)), "see report.html"]
        )
    return rows


def _gates(report: Report) -> list[list[str]]:
    return [[gate.name, "passed" if gate.passed else "FAILED", gate.detail] for gate in report.gates]


def machine(report: Report) -> str:
    """Devices, date and version, on one line."""
    devices = dict.fromkeys(wording.device_name(report, item.runtime) for item in report.profile)
    where = ", ".join(devices) or str(report.environment.get("cpu") or "")
    parts = [where, f"{report.created:%Y-%m-%d}", f"optin-deploy {report.version}"]
    return escaped(" · ".join(part for part in parts if part))
