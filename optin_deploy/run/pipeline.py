"""The main pipeline: prune, export, measure, report. All inputs are checked before any work starts."""

from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass, replace
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Unpack

import torch
from rich.console import Console

from optin_deploy.config.recipe import Recipe
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
from optin_deploy.run.options import RunArguments, RunOptions
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


def prune_export(recipe: Recipe, **options: Unpack[RunOptions]) -> Result:
    """Run ``recipe`` in this process: score, slice, compensate, make sparse, export, check, measure and report.

    Example:
        ``prune_export(Recipe(model="deit_small_patch16_224", flops=0.5), output=Path("run"), quiet=True)``

    Args:
        options: see `RunOptions`.

    Raises:
        UserError: an input is wrong; no file is written.
        GateError: the sliced network differs from the masked one; no checkpoint is written.
        ExportError, ProfilingError: the export or a runtime failed; finished stages are kept.
    """
    arguments = RunArguments(**options)
    with arguments.show_stages() as stages:
        with stages.checks():
            prepared = prepare(recipe, arguments.network, arguments.calibration)
            context = _in_directory(prepared, arguments.output, stages, SINGLE_PROCESS)
        tables = _measure_tables(context)
        with _hold_directory(context):
            pruned = prune_network(context, tables)
            replaced = [name for name in ("network", "calibration") if getattr(arguments, name) is not None]
            return _finish(context, pruned, arguments.command or rerun_command(context.directory, replaced))


def prune_export_together(
    recipe: Recipe,
    *,
    output: Path | None = None,
    command: str | None = None,
    console: Console | None = None,
    quiet: bool = False,
) -> Result | None:
    """Run `prune_export` in all processes that torchrun has started.

    They prune together; the main process does the rest.

    Returns:
        the result in the main process; None in the others, once the network is pruned.

    Raises:
        RankLostError: a process ended too early.
    """
    main = launched_ranks()[0] == 0
    with Stages(console or Console(stderr=True), quiet=quiet or not main) as stages, ExitStack() as held:
        on_gpu = recipe.device != "cpu" and torch.cuda.is_available()
        with process_group(lambda: stages.current, cuda=on_gpu) as ranks:
            with stages.checks():
                make = partial(_prepare_on_rank, recipe, output, stages, ranks)
                context = ranks.check_consistent(make, attrgetter("prepared.fingerprint"))
            if ranks.broadcast_object(context.checkpoint.exists):
                # The network is already pruned, so the main process continues alone.
                context = replace(context, ranks=SINGLE_PROCESS)
                if not main:
                    return None
            tables = context.ranks.on_main(partial(_measure_tables, context))
            context.ranks.on_main(partial(held.enter_context, _hold_directory(context)))
            pruned = prune_network(context, tables)
        return _finish(context, pruned, command or rerun_command(context.directory, ())) if main else None


def _prepare_on_rank(recipe: Recipe, output: Path | None, stages: Stages, ranks: Ranks) -> RunContext:
    return _in_directory(_assign_device(prepare(recipe), ranks), output, stages, ranks)


def _assign_device(prepared: PreparedRun, ranks: Ranks) -> PreparedRun:
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

    This happens before the run directory is made, so that an unreachable latency writes no file.
    """
    needed = context.recipe.needs_table and not context.checkpoint.exists()
    return measure_tables(context) if needed else None


def _hold_directory(context: RunContext) -> AbstractContextManager[None]:
    return run_directory.hold(context.directory, context.prepared.fingerprint, context.recipe)


def _finish(context: RunContext, pruned: PrunedRun, command: str) -> Result:
    """Compare, export, measure and report."""
    outputs = compare_outputs(context, pruned.network)
    # Engines are built and timed in other processes, which need the GPU memory that this one still reserves.
    torch.cuda.empty_cache()
    deployment = export_and_measure(context, pruned.network)
    results = StageResults(outputs, deployment, read_latency(context), read_notes(context))
    report = build_report(context, pruned, results, command)
    write_report(report, context.directory)
    _write_card(report, context)
    return Result(report, pruned.network, context.directory)


def _write_card(report: Report, context: RunContext) -> None:
    """Write the model card into the checkpoint, replacing that of an earlier try."""
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
