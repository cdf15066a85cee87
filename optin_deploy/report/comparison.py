"""Several reports beside each other: one line each, for the terminal, for Markdown and as JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from optin_deploy.report import markdown, numbers, wording
from optin_deploy.report.schema import Report

HEADING = ("run", "FLOPs", "parameters", "measured with", "p50 ms", "speed-up", "realised", "outputs", "gates")


@dataclass(frozen=True)
class Line:
    """One run. Speed is that of its headline measurement (`wording.headline`), None where nothing was measured."""

    run: str
    model: str
    device: str | None
    flops_ratio: float
    parameters_ratio: float
    runtime: str | None
    batch_size: int | None
    dense_p50_ms: float | None
    pruned_p50_ms: float | None
    speedup: float | None
    speedup_interval: tuple[float, float] | None
    significant: bool | None
    realised_ratio: float | None
    metric: str | None
    dense_metric: float | None
    pruned_metric: float | None
    failed_gates: tuple[str, ...]

    @classmethod
    def of(cls, run: str, report: Report) -> Line:
        """The line of ``report``, which is called ``run``."""
        item, found = wording.headline(report), report.evaluation
        ratio = None if item is None else report.realised_ratio(item)
        agreed = report.agreement[0] if report.agreement else None
        cosine = None if agreed is None else f"cosine of {agreed.output}"
        return cls(
            run=run,
            model=report.model.name,
            device=None if item is None else wording.device_name(report, item.runtime),
            flops_ratio=report.flops_ratio,
            parameters_ratio=report.pruned.parameters / report.dense.parameters,
            runtime=None if item is None else item.runtime,
            batch_size=None if item is None else item.batch_size,
            dense_p50_ms=None if item is None else item.summary.dense.p50_ms,
            pruned_p50_ms=None if item is None else item.summary.pruned.p50_ms,
            speedup=None if item is None else item.speedup.value,
            speedup_interval=None if item is None else (item.speedup.low, item.speedup.high),
            significant=None if item is None else item.significant,
            realised_ratio=None if ratio is None else ratio.value,
            metric=cosine if found is None else found.metric,
            dense_metric=(None if agreed is None else 1.0) if found is None else found.dense,
            pruned_metric=(None if agreed is None else agreed.cosine) if found is None else found.kept,
            failed_gates=tuple(gate.name for gate in report.gates if not gate.passed),
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict whose keys are the attributes."""
        return dict(self.__dict__)

    @property
    def cells(self) -> tuple[str, ...]:
        """The texts below `HEADING`."""
        measured, p50, speed = "not measured", "—", "—"
        if self.runtime is not None and self.dense_p50_ms is not None and self.pruned_p50_ms is not None:
            measured = f"{wording.runtime_name(self.runtime)}, batch {self.batch_size}"
            p50 = f"{numbers.milliseconds(self.dense_p50_ms)} → {numbers.milliseconds(self.pruned_p50_ms)}"
        if self.speedup is not None and self.speedup_interval is not None:
            low, high = self.speedup_interval
            speed = f"{numbers.times(self.speedup)} [{low:.2f}–{high:.2f}]{'' if self.significant else ' ~noise'}"
        return (
            self.run,
            f"{self.flops_ratio:.3f}",
            f"{self.parameters_ratio:.3f}",
            measured,
            p50,
            speed,
            "—" if self.realised_ratio is None else f"{self.realised_ratio:.2f}",
            self._outputs,
            f"FAILED: {', '.join(self.failed_gates)}" if self.failed_gates else "passed",
        )

    @property
    def _outputs(self) -> str:
        if self.metric is None or self.dense_metric is None or self.pruned_metric is None:
            return "—"
        if self.metric.startswith("cosine"):
            return f"{self.metric} {self.pruned_metric:.4f}"
        return f"{self.metric} {self.dense_metric:.2f} → {self.pruned_metric:.2f}"


def lines(reports: Mapping[str, Report]) -> list[Line]:
    """A line for each report, by the name of its run."""
    return [Line.of(run, report) for run, report in reports.items()]


def notes(compared: list[Line]) -> list[str]:
    """What keeps the lines from being compared, a sentence each."""
    found = []
    for what, values in (
        ("networks", {line.model for line in compared}),
        ("devices", {line.device for line in compared if line.device is not None}),
        ("runtimes or batch sizes", {(line.runtime, line.batch_size) for line in compared if line.runtime is not None}),
    ):
        if len(values) > 1:
            found.append(f"These runs are of different {what}: compare their ratios with care.")
    return found


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
