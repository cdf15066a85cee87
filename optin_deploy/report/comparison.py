"""Several reports beside each other: one line each, for the terminal, for Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from optin_deploy.report import markdown, wording
from optin_deploy.report.schema import Report
from optin_deploy.utils import formatting

HEADING = ("run", "FLOPs", "parameters", "measured with", "p50 ms", "speed-up", "realised", "outputs", "gates")


@dataclass(frozen=True)
class Speed:
    """A run's headline measurement (`wording.headline`)."""

    device: str
    runtime: str
    batch_size: int
    dense_p50_ms: float
    pruned_p50_ms: float
    speedup: float
    speedup_interval: tuple[float, float]
    significant: bool
    realised_ratio: float | None


@dataclass(frozen=True)
class Line:
    """One run; ``speed`` is None where nothing was measured, ``outputs`` says how good or how alike they are."""

    run: str
    model: str
    flops_ratio: float
    parameters_ratio: float
    speed: Speed | None
    outputs: str
    failed_gates: tuple[str, ...]

    @classmethod
    def of(cls, run: str, report: Report) -> Line:
        """The line of ``report``, which is called ``run``."""
        return cls(
            run=run,
            model=report.model.name,
            flops_ratio=report.flops_ratio,
            parameters_ratio=report.pruned.parameters / report.dense.parameters,
            speed=_speed(report),
            outputs=_outputs(report),
            failed_gates=tuple(gate.name for gate in report.gates if not gate.passed),
        )

    @property
    def cells(self) -> tuple[str, ...]:
        """The texts below `HEADING`."""
        return (
            self.run,
            f"{self.flops_ratio:.3f}",
            f"{self.parameters_ratio:.3f}",
            *(("not measured", "—", "—", "—") if self.speed is None else _speed_cells(self.speed)),
            self.outputs,
            f"FAILED: {', '.join(self.failed_gates)}" if self.failed_gates else "passed",
        )


def _speed(report: Report) -> Speed | None:
    item = wording.headline(report)
    if item is None:
        return None
    ratio = report.realised_ratio(item)
    return Speed(
        device=wording.device_name(report, item.runtime),
        runtime=item.runtime,
        batch_size=item.batch_size,
        dense_p50_ms=item.summary.dense.p50_ms,
        pruned_p50_ms=item.summary.pruned.p50_ms,
        speedup=item.speedup.value,
        speedup_interval=(item.speedup.low, item.speedup.high),
        significant=item.significant,
        realised_ratio=None if ratio is None else ratio.value,
    )


def _speed_cells(speed: Speed) -> tuple[str, str, str, str]:
    low, high = speed.speedup_interval
    return (
        f"{wording.runtime_name(speed.runtime)}, batch {speed.batch_size}",
        f"{formatting.milliseconds(speed.dense_p50_ms)} → {formatting.milliseconds(speed.pruned_p50_ms)}",
        f"{formatting.times(speed.speedup)} [{low:.2f}–{high:.2f}]{'' if speed.significant else ' ~noise'}",
        "—" if speed.realised_ratio is None else f"{speed.realised_ratio:.2f}",
    )


def _outputs(report: Report) -> str:
    found = report.evaluation
    if found is not None:
        return f"{found.metric} {found.dense:.2f} → {found.kept:.2f}"
    if not report.agreement:
        return "—"
    first = report.agreement[0]
    if first.sign_agreement is not None or first.rank_correlation is not None:
        return f"{first.output}: {wording.likeness(first)}"
    return f"cosine of {first.output} {first.cosine:.4f}"


def lines(reports: Mapping[str, Report]) -> list[Line]:
    """A line for each report, by the name of its run."""
    return [Line.of(run, report) for run, report in reports.items()]


def notes(compared: list[Line]) -> list[str]:
    """What keeps the lines from being compared, or their figures from being read, a sentence each."""
    measured = [line.speed for line in compared if line.speed is not None]
    found = []
    for what, values in (
        ("networks", {line.model for line in compared}),
        ("devices or threads", {speed.device for speed in measured}),
        ("runtimes or batch sizes", {(speed.runtime, speed.batch_size) for speed in measured}),
    ):
        if len(values) > 1:
            found.append(f"These runs are of different {what}: compare their ratios with care.")
    return [*found, *([wording.SPEED_UP] if measured else []), *filter(None, map(_changed_pace, compared))]


def _changed_pace(line: Line) -> str | None:
    speed = line.speed
    if speed is None:
        return None
    return wording.changed_pace(line.run, speed.dense_p50_ms, speed.pruned_p50_ms, *speed.speedup_interval)


def view(compared: list[Line]) -> RenderableType:
    """The lines as one renderable for a rich console."""
    table = Table(header_style="dim", box=None, pad_edge=False)
    for number, column in enumerate(HEADING):
        table.add_column(column, justify="left" if number in (0, 3, 7, 8) else "right", overflow="fold")
    for line in compared:
        table.add_row(*(Text(cell) for cell in line.cells), style="red" if line.failed_gates else "")
    return Group(table, *(Text(note, style="yellow") for note in notes(compared)))


def as_markdown(compared: list[Line]) -> str:
    """The lines as a Markdown table, with what keeps them from being compared."""
    parts = [markdown.table(HEADING, [line.cells for line in compared]), *map(markdown.escaped, notes(compared))]
    return "\n\n".join(parts) + "\n"
