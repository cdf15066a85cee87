"""The report as Markdown, short enough for a pull request."""

from __future__ import annotations

from optin_deploy.report import tables, wording
from optin_deploy.report.schema import Report
from optin_deploy.utils.display import Table

_BOTTLENECKS = 5


def render(report: Report) -> str:
    """Return the verdict, the banners, size, speed, outputs and gates, and the command that repeats the run."""
    title = f"{report.model.name}: {wording.change_of_flops(report)}"
    parts = [f"## {escaped(title)}", f"**{escaped(wording.verdict(report))}**", *banners(report), *figures(report)]
    entry = wording.headline_layers(report)
    if entry is not None and (entry.causes or entry.doubt):
        parts.append(f"**Why not faster** ({wording.runtime_name(entry.runtime)}, batch {entry.batch_size})")
        bottlenecks = "\n".join(f"- {escaped(cause.sentence)}" for cause in entry.causes[:_BOTTLENECKS])
        parts.append(escaped(entry.doubt) if entry.doubt else bottlenecks)
    if report.left_dense:
        parts += ["**Left dense**", table(tables.left_dense(report))]
    parts += [table(tables.gates(report)), f"{machine(report)}\n\n{fenced(report.command)}"]
    return "\n\n".join(parts) + "\n"


def banners(report: Report) -> list[str]:
    """Return the banners as quotations."""
    return [f"> **{banner.level}:** {escaped(banner.text)}" for banner in wording.banners(report)]


def figures(report: Report) -> list[str]:
    """Return size, speed and outputs of both networks as tables, each with its notes."""
    parts = [table(tables.size(report))]
    if report.profile:
        parts += [
            table(tables.speed(report)),
            "Brackets: 95 % interval. \\~noise: not distinguishable from the A/A noise. "
            "Realised: speed-up ÷ FLOP reduction.",
            escaped(" ".join(wording.speed_notes(report.profile))),
        ]
    sentences = (wording.latency_budget(report), wording.sparsity(report), wording.precision(report))
    parts += [escaped(sentence) for sentence in sentences if sentence]
    outputs = tables.outputs(report)
    return [*parts, table(outputs)] if outputs.rows else parts


def table(content: Table) -> str:
    """Return a Markdown table; no cell is read as markup."""
    rows = [[escaped(str(cell)) for cell in row] for row in content.rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in (content.heading, ["---"] * len(content.heading), *rows))


def escaped(text: str) -> str:
    """Return ``text`` on one line, escaped so that no part is read as markup, a cell's end, a mention or HTML."""
    one_line = " ".join(text.split())
    for sign in "\\`*_{}[]<>|#~":
        one_line = one_line.replace(sign, f"\\{sign}")
    # A zero-width space keeps "@name" from notifying somebody.
    return one_line.replace("@", "@\u200b")


def fenced(text: str, language: str = "") -> str:
    """Return ``text`` as a code block whose fence is longer than any fence inside it."""
    fence = "```"
    while fence in text:
        fence += "`"
    return f"{fence}{language}\n{text}\n{fence}"


def machine(report: Report) -> str:
    """Return devices, date and version on one line."""
    devices = dict.fromkeys(wording.device_name(report, item.runtime) for item in report.profile)
    where = ", ".join(devices) or str(report.environment.get("cpu") or "")
    parts = [where, f"{report.created:%Y-%m-%d}", f"optin-deploy {report.version}"]
    return escaped(" · ".join(part for part in parts if part))
