"""A sweep: prune-export at several budgets in one directory. The runs share what does not depend on the budget."""

import logging
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Unpack

from rich.console import Console

from optin_deploy.config.recipe import Recipe
from optin_deploy.config.sweep_plan import Budgets, Planned, as_yaml, plan
from optin_deploy.errors import UserError
from optin_deploy.export.requirements import check_measurable
from optin_deploy.report import Report, read_report
from optin_deploy.run import run_directory
from optin_deploy.run.context import RunContext
from optin_deploy.run.latency_stage import check_latency, measure_tables
from optin_deploy.run.options import RunArguments, RunOptions
from optin_deploy.run.pipeline import prune_export
from optin_deploy.run.prepare import VERSION, PreparedRun, prepare
from optin_deploy.sweeps.report_builder import build_sweep_report
from optin_deploy.sweeps.schema import SweepReport
from optin_deploy.sweeps.web_page import render
from optin_deploy.utils.atomic_files import link_or_copy, write_text
from optin_deploy.utils.progress import Stages

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class SweepResult:
    """A finished sweep: its report, and the directory of the report and the runs."""

    report: SweepReport
    directory: Path


@dataclass(frozen=True)
class _Checked:
    """A sweep with checked inputs: its directory and fingerprint, and its runs with a fingerprint each."""

    directory: Path
    fingerprint: str
    runs: tuple[tuple[Planned, str], ...]

    def directory_of(self, run: Planned) -> Path:
        return self.directory / run.name


def sweep(recipe: Recipe, budgets: Budgets, **options: Unpack[RunOptions]) -> SweepResult:
    """Run ``recipe`` once per budget and compare the runs: sweep.json and sweep.html in the sweep's directory.

    Scores, the dense ONNX file and latency tables are computed once. A repeated sweep continues where it stopped and
    reads the finished runs, also those of other budgets of the same recipe. A failed gate of a run does not stop the
    sweep; see ``report.runs``.

    Args:
        recipe: the settings of all runs, without a budget.
        budgets: values of "flops" and "latency", fractions of the dense network's above 0 and below 1, and of
            "latency_ms"; one run each, like ``{"flops": [0.8, 0.6]}``.
        options: see `RunOptions`; each budget has a run directory in ``output``, like ``flops-0.8``.

    Raises:
        UserError: a budget or an input is wrong; found before the first run, and no file is written.
        ExportError, ProfilingError: the export or a runtime failed; finished stages are kept.
    """
    arguments = RunArguments(**options)
    with arguments.show_stages() as stages:
        checked = _check(recipe, plan(recipe, budgets), arguments, stages)
    with run_directory.hold(checked.directory, checked.fingerprint, recipe):
        # This recipe has the budgets: it repeats the sweep.
        write_text(checked.directory / "recipe.yaml", as_yaml(recipe, [run for run, _ in checked.runs]))
        reports = {run.name: _read_or_run(checked, number, arguments) for number, (run, _) in enumerate(checked.runs)}
        again = shlex.join(["optin-deploy", "sweep", "--recipe", str(checked.directory / "recipe.yaml")])
        report = build_sweep_report(reports, recipe.model_dump(mode="json"), arguments.command or again)
        write_text(checked.directory / "sweep.json", report.model_dump_json(indent=1) + "\n")
        write_text(checked.directory / "sweep.html", render(report))
    return SweepResult(report, checked.directory)


def _read_or_run(checked: _Checked, index: int, arguments: RunArguments) -> Report:
    """Return the report of a run; run it unless it is finished."""
    run, fingerprint = checked.runs[index]
    directory = checked.directory_of(run)
    report = _read_finished(directory)
    console = arguments.console or Console(stderr=True)
    heading = f"{index + 1} of {len(checked.runs)}: {run.name}{', done before' if report else ''}"
    logger.info(heading)
    if console.is_terminal and not arguments.quiet:
        console.print(heading, style="bold")
    if report is not None:
        return report
    with run_directory.hold(directory, fingerprint, run.recipe):
        _link_shared_files(checked, directory)
    return prune_export(
        run.recipe,
        output=directory,
        network=arguments.network,
        calibration=arguments.calibration,
        console=console,
        quiet=arguments.quiet,
    ).report


def _check(recipe: Recipe, runs: tuple[Planned, ...], arguments: RunArguments, stages: Stages) -> _Checked:
    """Check the inputs of all runs, without writing a file."""
    with stages.checks():
        for runtime in recipe.measured_runtimes:
            check_measurable(runtime)
        # If the smallest FLOP budget is above the floor, all are.
        smallest = min(runs, key=lambda run: run.recipe.flops or 1.0)
        prepared = prepare(smallest.recipe, arguments.network, arguments.calibration)

        def fingerprint(of: Recipe) -> str:
            return run_directory.compute_fingerprint(of, prepared.network.module, prepared.calibration.digest, VERSION)

        sweep_fingerprint = fingerprint(recipe)
        name = Path(recipe.model).name or "model"
        checked = _Checked(
            arguments.output or Path("runs") / f"{name}-sweep-{sweep_fingerprint[:8]}",
            sweep_fingerprint,
            tuple((run, fingerprint(run.recipe)) for run in runs),
        )
        run_directory.check(checked.directory, sweep_fingerprint)
        for run, expected in checked.runs:
            run_directory.check(checked.directory_of(run), expected)
    _check_latencies(prepared, checked, stages)
    return checked


def _check_latencies(prepared: PreparedRun, checked: _Checked, stages: Stages) -> None:
    """Check that all latency budgets can be reached. The runs reuse the measured tables from the cache."""
    pending = [
        run.recipe
        for run, _ in checked.runs
        if run.recipe.has_latency and not (checked.directory_of(run) / "checkpoint").exists()
    ]
    if not pending:
        return
    tables = measure_tables(RunContext(replace(prepared, recipe=pending[0]), checked.directory, stages))
    for recipe in pending:
        check_latency(prepared.space.structure, recipe, tables)


def _read_finished(directory: Path) -> Report | None:
    """Return the report of a finished run; None if there is none or it cannot be read, so that it is made again."""
    try:
        return read_report(directory / "report.json")
    except UserError:
        return None


def _link_shared_files(checked: _Checked, directory: Path) -> None:
    """Link the files of other runs that do not depend on the budget: scores, merge losses and the dense ONNX file.

    The sweep's directory keeps them too, for budgets that are added later.
    """
    for run, _ in checked.runs:
        _link(checked.directory_of(run), checked.directory)
    _link(checked.directory, directory)


def _link(source: Path, target: Path) -> None:
    # The weights of a large ONNX file are in a file next to it. The ONNX file comes last: it marks them as complete.
    dense = source / "dense.onnx"
    files = [*sorted(source.glob("dense.onnx?*")), dense] if dense.is_file() else []
    scores = [source / name for name in ("scoring.json", "scores.safetensors", "merging.json")]
    for file in [*files, *(path for path in scores if path.is_file())]:
        with run_directory.recording(target / file.name):
            link_or_copy(file, target / file.name)
