"""The main job: prune, export, measure, report. Everything that the user can get wrong is checked before any work."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from operator import index
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from optin_deploy import checkpoint, rundir
from optin_deploy.assembly import VARIANTS, assemble
from optin_deploy.calibration import Calibration
from optin_deploy.errors import UserError
from optin_deploy.evaluation import agreement
from optin_deploy.files import write_text
from optin_deploy.job import Job, prepare
from optin_deploy.latency.budget import edges_of
from optin_deploy.latency.measure import Measured
from optin_deploy.latency.stage import latency_fraction, latency_tables, plan_for_latency, read_latency
from optin_deploy.measuring import export_and_measure
from optin_deploy.network import Network
from optin_deploy.pictures import pictures
from optin_deploy.plan import Plan
from optin_deploy.progress import Stages
from optin_deploy.pruning import Ridge, make_sparse, remove, remove_in_rounds, token_schedule
from optin_deploy.recipe import Recipe
from optin_deploy.report import Report, write_report
from optin_deploy.rotation import in_principal_bases
from optin_deploy.schedule import Damages
from optin_deploy.scoring import Scoring, save_scores, score, scoring_steps, token_damages, token_steps
from optin_deploy.slicing import sliced
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.token_stack import TokenStack


@dataclass(frozen=True)
class Result:
    """A finished run: its report, the pruned network, and where its files are."""

    report: Report
    network: Network
    directory: Path


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
    """Run ``recipe``: score, slice, repair, make sparse, export, check, measure and report.

    Args:
        output: run directory; ``runs/MODEL-flopsF-HASH`` when None. A directory that holds the same run is continued.
        network: in place of what ``recipe.model`` names (which then is only a name), for a module of your own.
        calibration: in place of what ``recipe.calibration`` names.
        command: how to do it again, for the report.
        console: where progress goes; the standard error stream when None.

    Raises:
        UserError: something to be fixed by the user; nothing is left behind.
        ExportError, ProfilingError: the export or a runtime failed; what was done before is kept.
    """
    console = console or Console(stderr=True)
    with Stages(console, quiet=quiet) as stages:
        with stages.checks():
            job = prepare(recipe, network, calibration)
            directory = output or rundir.default_directory(recipe, job.fingerprint)
            rundir.check(directory, job.fingerprint)
        measured = latency_tables(job, directory, stages)
        job.network.module.to(job.device)
        with rundir.held(directory, job.fingerprint, recipe):
            dense, scores = _scored(job, directory, stages) if recipe.has_budget else (job.network, {})
            plan, small = _pruned(job, dense, scores, measured, directory, stages)
            results = _compared(job, small, directory, stages)
            results |= export_and_measure(job, small, directory, stages)
            results["latency_budget"] = read_latency(directory) if recipe.has_latency else None
            report = assemble(job, plan, small, results, directory, stages.seconds, command)
            write_report(report, directory)
    return Result(report, small, directory)


def _batches(batches: tuple[dict[str, Tensor], ...], device: torch.device) -> list[Mapping[str, Tensor]]:
    return [{name: t.to(device) for name, t in batch.items()} for batch in batches]


def _scoring(recipe: Recipe) -> Scoring:
    return Scoring(recipe.criterion, recipe.scorer, recipe.probes, recipe.task_weight, recipe.seed)


def _scored(job: Job, directory: Path, stages: Stages) -> tuple[Network, dict[str, Tensor]]:
    """The network in the basis that it is scored and pruned in, on the run's device, and its scores."""
    path, structure, scoring = directory / "scores.safetensors", job.anatomy.structure, _scoring(job.recipe)
    calibration = job.calibration
    with stages.stage("score", scoring_steps(structure, calibration.batches, scoring)) as advance:
        if (directory / "checkpoint").exists() and path.is_file():
            return job.network, _kept_scores(path, structure)
        batches = _batches(calibration.batches, job.device)
        dense = in_principal_bases(job.network, structure, batches)
        if path.is_file():
            return dense, _kept_scores(path, structure)
        scores = score(
            dense, structure, job.anatomy.costs, batches, scoring, labels=calibration.labels, advance=advance
        )
        with rundir.recorded(path):
            save_scores(scores, path)
        return dense, scores


def _kept_scores(path: Path, structure: Structure) -> dict[str, Tensor]:
    """The scores at ``path``; UserError unless they are those of ``structure``."""
    rundir.record(path)
    try:
        scores = load_file(path)
    except (OSError, SafetensorError):
        scores = {}
    if {name: tuple(t.shape) for name, t in scores.items()} != {g.name: (g.units,) for g in structure.groups}:
        raise UserError(f"{path} is damaged or of another network: remove it, and it is made again")
    return scores


def _pruned(
    job: Job,
    dense: Network,
    scores: Mapping[str, Tensor],
    measured: Measured | None,
    directory: Path,
    stages: Stages,
) -> tuple[Plan, Network]:
    """Search, slice and repair, or read the checkpoint of an earlier try; writes plan.json and the checkpoint."""
    recipe, structure, path = job.recipe, job.anatomy.structure, directory / "checkpoint"
    ridge: Ridge = recipe.ridge if recipe.compensate else None
    schedule = () if path.exists() else _schedule(job, dense, scores, measured, directory, stages)
    met = None
    if recipe.has_latency and measured:
        met = plan_for_latency(job, dense, scores, measured, schedule, directory, stages)
    rounds = recipe.rounds * recipe.has_budget + (recipe.sparsity is not None)
    with stages.stage("slice and repair", len(structure.blocks) * rounds) as advance:
        if path.exists():
            plan = _read_plan(directory)
            plan.check(structure)
            small = remove(job.network, structure, plan, [], None, stack=job.anatomy.stack)
            checkpoint.load_weights(small, path)
        else:
            batches = _batches(job.calibration.batches, job.device)
            if not recipe.has_budget:
                plan = Plan({g.name: tuple(range(g.units)) for g in structure.groups})
                module = sliced(dense.module, structure, plan)
            elif met is not None:
                plan, module = met, remove(dense, structure, met, batches, ridge, advance, job.anatomy.stack)
            else:
                assert recipe.flops is not None
                plan, module = remove_in_rounds(
                    dense,
                    job.anatomy,
                    scores,
                    batches,
                    recipe.flops,
                    scoring=_scoring(recipe),
                    labels=job.calibration.labels,
                    align=recipe.alignment or 64,
                    ridge=ridge,
                    rounds=recipe.rounds,
                    edges=edges_of(structure, measured) if measured else None,
                    schedule=schedule,
                    advance=advance,
                )
            if recipe.sparsity is not None:
                make_sparse(dense, module, structure, plan, batches, ridge, advance)
            small = module
            written = {"flops": recipe.flops, "kept": dict(plan.kept), "tokens": plan.tokens}
            with rundir.recorded(directory / "plan.json"):
                write_text(directory / "plan.json", json.dumps(written) + "\n")
        pruned = job.network.with_module(small.cpu())
        job.network.module.cpu()
        if path.exists():
            rundir.record(path)
        else:
            with rundir.recorded(path):
                checkpoint.save(pruned, plan.after(job.earlier), path)
    return plan, pruned


def _schedule(
    job: Job,
    dense: Network,
    scores: Mapping[str, Tensor],
    measured: Measured | None,
    directory: Path,
    stages: Stages,
) -> tuple[int, ...]:
    """How many tokens enter each block; empty where none merge. Under a latency budget alone, what is best for as
    many FLOPs."""
    recipe, anatomy = job.recipe, job.anatomy
    if anatomy.stack is None:
        return ()
    flops = recipe.flops
    if flops is None:
        assert measured is not None
        flops = latency_fraction(recipe, measured)
    damage = _damages(job, dense, anatomy.stack, directory, stages) if recipe.tokens == "auto" else None
    align = recipe.alignment or 64
    return token_schedule(dense, anatomy, scores, flops, align, recipe.tokens, recipe.tokens_share, damage)


def _damages(job: Job, dense: Network, stack: TokenStack, directory: Path, stages: Stages) -> Damages:
    """What merging tokens costs, measured once for all budgets."""
    calibration, scoring = job.calibration, _scoring(job.recipe)
    with stages.stage("try merging", token_steps(stack, calibration.batches)) as advance:

        def measure() -> dict[str, Any]:
            batches = _batches(calibration.batches, job.device)
            return token_damages(dense, job.anatomy.structure, stack, batches, scoring, advance).to_dict()

        return Damages.from_dict(rundir.kept_json(directory / "merging.json", measure))


def _read_plan(directory: Path) -> Plan:
    path = directory / "plan.json"
    if not path.is_file():
        raise UserError(f"{path} is gone: remove {directory / 'checkpoint'} too, to prune again")
    try:
        written = rundir.read_json(path)
        kept = {name: tuple(map(index, units)) for name, units in written["kept"].items()}
        return Plan(kept, tuple(map(index, written["tokens"])))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: remove it and {directory / 'checkpoint'}, to prune again") from error


def _compared(job: Job, small: Network, directory: Path, stages: Stages) -> dict[str, Any]:
    """Agreement on held-out inputs, and the labelled set where one is given."""
    with stages.stage("compare outputs"):
        agreed = rundir.kept_json(
            directory / "agreement.json",
            lambda: [asdict(a) for a in agreement(job.network, small.module, job.calibration.held_out)],
        )
        drawn = rundir.kept_json(
            directory / "pictures.json",
            lambda: [asdict(p) for p in pictures(job.network, small.module, job.calibration.held_out)],
        )
    found = {"agreement": agreed, "pictures": drawn, "evaluation": None}
    if job.dataset is None:
        return found
    dataset = job.dataset
    with stages.stage("evaluate", 2 * dataset.steps) as advance:

        def measure() -> dict[str, Any]:
            figures = {}
            for name, module in zip(VARIANTS, (job.network.module, small.module), strict=True):
                figures[name] = dataset.measure(module.to(job.device), advance)
                module.cpu()
            return {"metric": dataset.metric, "dataset": dataset.name, "samples": dataset.samples, **figures}

        evaluated = rundir.kept_json(directory / "evaluation.json", measure)
    return found | {"evaluation": evaluated}
