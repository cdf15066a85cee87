"""A sweep: prune-export at several budgets in one directory, everything that they have in common done once."""

import logging
import shlex
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console

from optin_deploy.config.recipe import Recipe
from optin_deploy.config.sweep_plan import Budgets, Planned, as_yaml, plan
from optin_deploy.data.calibration import Calibration
from optin_deploy.errors import UserError
from optin_deploy.export.requirements import check_measurable
from optin_deploy.network import Network
from optin_deploy.report import Report, read_report
from optin_deploy.run import run_directory
from optin_deploy.run.context import RunContext
from optin_deploy.run.latency_stage import check_latency, measure_tables
from optin_deploy.run.pipeline import prune_export
from optin_deploy.run.prepare import VERSION, PreparedRun, prepare
from optin_deploy.sweeps.report_builder import assemble
from optin_deploy.sweeps.schema import SweepReport
from optin_deploy.sweeps.web_page import render
from optin_deploy.utils.atomic_files import link_or_copy, write_text
from optin_deploy.utils.progress import Stages

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep: its report, and the directory with that and the runs."""

    report: SweepReport
    directory: Path


@dataclass(frozen=True)
class _Checked:
    """Where the runs of a sweep go, all of whose inputs are right; a fingerprint per run, and that of the sweep."""

    directory: Path
    fingerprint: str
    runs: tuple[tuple[Planned, str], ...]

    def place(self, run: Planned) -> Path:
        return self.directory / run.name


def sweep(
    recipe: Recipe,
    budgets: Budgets,
    *,
    output: Path | None = None,
    network: Network | None = None,
    calibration: Calibration | None = None,
    command: str | None = None,
    console: Console | None = None,
    quiet: bool = False,
) -> SweepResult:
    """Run ``recipe`` once per budget, and compare: sweep.json and sweep.html in the sweep's directory.

    Scores, the dense ONNX file and latency tables are made once. A sweep given again goes on where it stopped; runs
    that are done are read, also where the directory has them from other budgets of the same recipe. A failed gate of
    one run stops nothing; see ``report.runs``.

    Args:
        recipe: what all runs share, without a budget.
        budgets: values of "flops" and "latency", parts of the dense network's above 0 and below 1, and of
            "latency_ms"; a run each, like ``{"flops": [0.8, 0.6]}``.
        output: sweep directory, ``runs/MODEL-sweep-HASH`` when None, with a run directory per budget, ``flops-0.8``.
        network: in place of what ``recipe.model`` names, as for `prune_export`.
        calibration: in place of what ``recipe.calibration`` names.
        command: how to do it again, for the report.
        console: where progress goes; the standard error stream when None.

    Raises:
        UserError: a budget or an input is wrong, found before the first run; nothing is left behind.
        ExportError, ProfilingError: the export or a runtime failed; what was done before is kept.
    """
    console = console or Console(stderr=True)
    with Stages(console, quiet=quiet) as stages:
        checked = _check(recipe, plan(recipe, budgets), output, network, calibration, stages)
    with run_directory.hold(checked.directory, checked.fingerprint, recipe):
        # With its budgets, it makes the sweep again.
        write_text(checked.directory / "recipe.yaml", as_yaml(recipe, [run for run, _ in checked.runs]))
        reports: dict[str, Report] = {}
        for number, (run, fingerprint) in enumerate(checked.runs, 1):
            place = checked.place(run)
            report = _finished(place)
            standing = f"{number} of {len(checked.runs)}: {run.name}{', done before' if report else ''}"
            logger.info(standing)
            if console.is_terminal and not quiet:
                console.print(standing, style="bold")
            if report is None:
                with run_directory.hold(place, fingerprint, run.recipe):
                    _share(checked, place)
                report = prune_export(
                    run.recipe, output=place, network=network, calibration=calibration, console=console, quiet=quiet
                ).report
            reports[run.name] = report
        again = shlex.join(["optin-deploy", "sweep", "--recipe", str(checked.directory / "recipe.yaml")])
        found = assemble(reports, recipe.model_dump(mode="json"), command or again)
        write_text(checked.directory / "sweep.json", found.model_dump_json(indent=1) + "\n")
        write_text(checked.directory / "sweep.html", render(found))
    return SweepResult(found, checked.directory)


def _check(
    recipe: Recipe,
    runs: tuple[Planned, ...],
    output: Path | None,
    network: Network | None,
    calibration: Calibration | None,
    stages: Stages,
) -> _Checked:
    """All that can be wrong with any of the runs is told here; writes nothing."""
    with stages.checks():
        for runtime in recipe.measured_runtimes:
            check_measurable(runtime)
        # Where the smallest budget of FLOPs is above the floor, all are.
        prepared = prepare(min(runs, key=lambda run: run.recipe.flops or 1.0).recipe, network, calibration)

        def fingerprint(of: Recipe) -> str:
            return run_directory.compute_fingerprint(of, prepared.network.module, prepared.calibration.digest, VERSION)

        own = fingerprint(recipe)
        name = Path(recipe.model).name or "model"
        checked = _Checked(
            output or Path("runs") / f"{name}-sweep-{own[:8]}",
            own,
            tuple((run, fingerprint(run.recipe)) for run in runs),
        )
        run_directory.check(checked.directory, own)
        for run, expected in checked.runs:
            run_directory.check(checked.place(run), expected)
    _check_latencies(prepared, checked, stages)
    return checked


def _check_latencies(prepared: PreparedRun, checked: _Checked, stages: Stages) -> None:
    """Whether a latency can be reached is known once there are tables, which the runs then find in the cache."""
    pending = [
        run.recipe
        for run, _ in checked.runs
        if run.recipe.has_latency and not (checked.place(run) / "checkpoint").exists()
    ]
    if not pending:
        return
    tables = measure_tables(RunContext(replace(prepared, recipe=pending[0]), checked.directory, stages))
    for recipe in pending:
        check_latency(prepared.space.structure, recipe, tables)


def _finished(place: Path) -> Report | None:
    """The report of a run that is done. One that cannot be read is made again, from the stages that were kept."""
    try:
        return read_report(place / "report.json")
    except UserError:
        return None


def _share(checked: _Checked, place: Path) -> None:
    """Give a run what others have made that depends on no budget: scores, what merging tokens costs, and the dense
    network's ONNX file.

    The sweep's directory keeps them too, for budgets that come later.
    """
    for run, _ in checked.runs:
        _link(checked.place(run), checked.directory)
    _link(checked.directory, place)


def _link(source: Path, target: Path) -> None:
    # The weights of a large ONNX file lie beside it; it comes last, since it is what tells that all are there.
    dense = source / "dense.onnx"
    files = [*sorted(source.glob("dense.onnx?*")), dense] if dense.is_file() else []
    scores = [source / name for name in ("scoring.json", "scores.safetensors", "merging.json")]
    for file in [*files, *(each for each in scores if each.is_file())]:
        with run_directory.recording(target / file.name):
            link_or_copy(file, target / file.name)
