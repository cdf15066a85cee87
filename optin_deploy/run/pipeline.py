"""The main pipeline: prune, export, measure, report. All inputs are checked before any work starts."""

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path

import torch
from rich.console import Console

from optin_deploy.config.recipe import Recipe
from optin_deploy.data.calibration import Calibration
from optin_deploy.distributed.ranks import SINGLE_PROCESS, Ranks
from optin_deploy.distributed.torchrun import launched_ranks, local_device, process_group
from optin_deploy.errors import UserError
from optin_deploy.latency.tables import LatencyModel
from optin_deploy.models.hub import CARD_NAME
from optin_deploy.models.libraries import task
from optin_deploy.network import Network
from optin_deploy.report import Report, write_report
from optin_deploy.report.model_card import Facts
from optin_deploy.report.model_card import render as render_card
from optin_deploy.run import run_directory
from optin_deploy.run.compare_stage import compare_outputs
from optin_deploy.run.context import PrunedRun, RunContext
from optin_deploy.run.latency_stage import measure_tables, read_latency
from optin_deploy.run.measure_stages import export_and_measure
from optin_deploy.run.prepare import PreparedRun, prepare
from optin_deploy.run.prune_stage import prune_network, read_notes
from optin_deploy.run.report_builder import StageResults, build_report, rerun_command
from optin_deploy.utils.atomic_files import remove_partial, write_text
from optin_deploy.utils.progress import Stages


@dataclass(frozen=True)
class Result:
    """A finished run: its report, the pruned network, and the directory of its files."""

    report: Report
    network: Network
    directory: Path

    def __repr__(self) -> str:
        return f"<Result in {self.directory}: {self.report!r}>"

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def prune_export(
    recipe: Recipe,
    *,
    output: Path | None = None,
    network: Network | None = None,
    calibration: Calibration | None = None,
    command: str | None = None,
    console: Console | None = None,
    quiet: bool = False,
) -> Result:
    """Run ``recipe`` in this process: score, slice, compensate, make sparse, export, check, measure and report.

    Args:
        output: run directory; ``runs/MODEL-flopsF-HASH`` when None. A directory of the same run is continued.
        network: used instead of the model that ``recipe`` names, for a module of your own.
        calibration: used instead of the calibration data that ``recipe`` names.
        command: the command that repeats the run, for the report; derived from the other arguments when None.
        console: shows the progress; the standard error stream when None.

    Raises:
        UserError: an input is wrong; nothing is left behind.
        GateError: the sliced network computes something else than the masked one; there is no checkpoint then.
        ExportError, ProfilingError: the export or a runtime failed; finished stages are kept.
    """
    with Stages(console or Console(stderr=True), quiet=quiet) as stages:
        with stages.checks():
            context = _in_directory(prepare(recipe, network, calibration), output, stages, SINGLE_PROCESS)
        tables = _measure_tables(context)
        with _hold_directory(context):
            pruned = prune_network(context, tables)
            arguments = {"network": network, "calibration": calibration}
            replaced = [name for name, argument in arguments.items() if argument is not None]
            return _finish(context, pruned, command or rerun_command(context.directory, replaced))


def prune_export_together(
    recipe: Recipe,
    *,
    output: Path | None = None,
    command: str | None = None,
    console: Console | None = None,
    quiet: bool = False,
) -> Result | None:
    """Run `prune_export` in all processes that torchrun has started: they prune together, the main one does the rest.

    Returns:
        None in the other processes, once the network is pruned.

    Raises:
        RankLostError: a process has ended too early.
    """
    main = launched_ranks()[0] == 0
    with Stages(console or Console(stderr=True), quiet=quiet or not main) as stages, ExitStack() as held:
        on_gpu = recipe.device != "cpu" and torch.cuda.is_available()
        with process_group(lambda: stages.current, cuda=on_gpu) as ranks:
            with stages.checks():
                make = partial(_prepare_together, recipe, output, stages, ranks)
                context = ranks.check_consistent(make, attrgetter("prepared.fingerprint"))
            if ranks.broadcast_object(context.checkpoint.exists):
                # The network is pruned: nothing is left to do together.
                context = replace(context, ranks=SINGLE_PROCESS)
                if not main:
                    return None
            tables = context.ranks.on_main(partial(_measure_tables, context))
            context.ranks.on_main(partial(held.enter_context, _hold_directory(context)))
            pruned = prune_network(context, tables)
        return _finish(context, pruned, command or rerun_command(context.directory, ())) if main else None


def _prepare_together(recipe: Recipe, output: Path | None, stages: Stages, ranks: Ranks) -> RunContext:
    return _in_directory(_on_own_device(prepare(recipe), ranks), output, stages, ranks)


def _on_own_device(prepared: PreparedRun, ranks: Ranks) -> PreparedRun:
    """Return the run on this process's own GPU if there are several processes."""
    batches = len(prepared.calibration.batches)
    if ranks.world > batches:
        raise UserError(
            f"--nproc-per-node: calibration data of {batches} batches cannot be shared by {ranks.world} processes; "
            f"start {batches} at most, or give more samples"
        )
    if ranks.world == 1 or prepared.device.type != "cuda":
        return prepared
    if local_device() >= torch.cuda.device_count():
        raise UserError(f"--nproc-per-node: process {local_device()} of this host has no GPU of its own; start fewer")
    torch.cuda.set_device(local_device())
    return replace(prepared, device=torch.device("cuda", local_device()))


def _in_directory(prepared: PreparedRun, output: Path | None, stages: Stages, ranks: Ranks) -> RunContext:
    """Choose the run directory, and check that the run can start or continue there."""
    directory = output or run_directory.default_directory(prepared.recipe, prepared.fingerprint)
    if ranks.main:
        run_directory.check(directory, prepared.fingerprint)
    return RunContext(prepared, directory, stages, ranks)


def _measure_tables(context: RunContext) -> LatencyModel | None:
    """Measure latency tables if the search needs them.

    This comes before the run directory is made: an unreachable latency leaves nothing behind.
    """
    needed = context.recipe.needs_table and not context.checkpoint.exists()
    return measure_tables(context) if needed else None


def _hold_directory(context: RunContext) -> AbstractContextManager[None]:
    return run_directory.hold(context.directory, context.prepared.fingerprint, context.recipe)


def _finish(context: RunContext, pruned: PrunedRun, command: str) -> Result:
    """Compare, export, measure and report."""
    outputs = compare_outputs(context, pruned.network)
    deployment = export_and_measure(context, pruned.network)
    results = StageResults(outputs, deployment, read_latency(context), read_notes(context))
    report = build_report(context, pruned, results, command)
    write_report(report, context.directory)
    _write_card(report, context)
    return Result(report, pruned.network, context.directory)


def _write_card(report: Report, context: RunContext) -> None:
    """Write the model card into the checkpoint, over that of an earlier try."""
    directory, network = context.checkpoint, context.network
    remove_partial(directory)
    facts = Facts(
        files={file.name for file in directory.iterdir()},
        base_model=network.origin.base_model,
        license=network.origin.license,
        task=task(network),
    )
    with run_directory.recording(directory):
        write_text(directory / CARD_NAME, render_card(report, facts))
