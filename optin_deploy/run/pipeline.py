"""The main job: prune, export, measure, report. Everything that the user can get wrong is checked before any work."""

import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from operator import index
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from optin_deploy.config.recipe import Recipe
from optin_deploy.criteria.scoring import save_scores, score
from optin_deploy.data.calibration import Calibration
from optin_deploy.distributed.ranks import ALONE, Ranks, Shared
from optin_deploy.distributed.torchrun import joined, launched_ranks, local_device
from optin_deploy.errors import UserError
from optin_deploy.evaluation.agreement import Agreement, agreement
from optin_deploy.evaluation.example_images import pictures
from optin_deploy.latency.budget import edges_of
from optin_deploy.latency.tables import Measured
from optin_deploy.models import checkpoint
from optin_deploy.models.hub import CARD_NAME
from optin_deploy.models.libraries import task
from optin_deploy.network import Network
from optin_deploy.pruning.head_rotation import in_principal_bases
from optin_deploy.pruning.pruner import (
    PruneSettings,
    Ridge,
    make_sparse,
    remove,
    remove_in_rounds,
    token_schedule,
    told_plan,
)
from optin_deploy.report import Report, write_report
from optin_deploy.report.model_card import Facts
from optin_deploy.report.model_card import render as render_card
from optin_deploy.run import run_directory
from optin_deploy.run.job import Job, prepare, scoring_of
from optin_deploy.run.latency_stage import latency_fraction, latency_tables, plan_for_latency, read_latency
from optin_deploy.run.measure_stages import export_and_measure
from optin_deploy.run.report_builder import VARIANTS, again, assemble
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import sliced
from optin_deploy.tokens.damage import Damages, token_damages
from optin_deploy.tokens.stack import TokenStack
from optin_deploy.utils.atomic_files import remove_partial, write_text
from optin_deploy.utils.paths import regular
from optin_deploy.utils.progress import Stages, part, track
from optin_deploy.utils.spill import Shelf

logger = logging.getLogger(__name__)
# What the report says of how units were scored, where it is not just as the options say.
_NOTES_NAME = "scoring.json"


@dataclass(frozen=True)
class Result:
    """A finished run: its report, the pruned network, and where its files are."""

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
    """Run ``recipe`` in this process: score, slice, repair, make sparse, export, check, measure and report.

    Args:
        output: run directory; ``runs/MODEL-flopsF-HASH`` when None. A directory that holds the same run is continued.
        network: in place of what ``recipe.model`` names (which then is only a name), for a module of your own.
        calibration: in place of what ``recipe.calibration`` names.
        command: how to do it again, for the report; from the recipe, or from Python, when None.
        console: where progress goes; the standard error stream when None.

    Raises:
        UserError: something to be fixed by the user; nothing is left behind.
        GateError: what the plan leaves computes something else than the masked network; there is no checkpoint then.
        ExportError, ProfilingError: the export or a runtime failed; what was done before is kept.
    """
    with Stages(console or Console(stderr=True), quiet=quiet) as stages, ExitStack() as held:
        job, directory, plan, small = _small(recipe, output, network, calibration, stages, ALONE, held)
        given = [name for name, value in (("network", network), ("calibration", calibration)) if value is not None]
        return _finished(job, directory, plan, small, stages, command or again(directory, given))


def prune_export_together(
    recipe: Recipe,
    *,
    output: Path | None = None,
    command: str | None = None,
    console: Console | None = None,
    quiet: bool = False,
) -> Result | None:
    """`prune_export` by all processes that torchrun has started: they prune together, and the main one does the rest.

    Returns:
        None in the other processes, when their part is done.

    Raises:
        RankLostError: a process has ended too early.
    """
    main = launched_ranks()[0] == 0
    with Stages(console or Console(stderr=True), quiet=quiet or not main) as stages, ExitStack() as held:
        on_gpu = recipe.device != "cpu" and torch.cuda.is_available()
        with joined(lambda: stages.current, cuda=on_gpu) as ranks:
            job, directory, plan, small = _small(recipe, output, None, None, stages, ranks, held)
        return _finished(job, directory, plan, small, stages, command or again(directory, ())) if main else None


def _small(
    recipe: Recipe,
    output: Path | None,
    network: Network | None,
    calibration: Calibration | None,
    stages: Stages,
    ranks: Ranks,
    held: ExitStack,
) -> tuple[Job, Path, Plan, Network]:
    """Check everything and prune; ``held`` keeps the run's directory, which only the main process touches."""
    found: list[tuple[Job, Path]] = []

    def check() -> str:
        job = _on_own_device(prepare(recipe, network, calibration), ranks)
        directory = output or run_directory.default_directory(recipe, job.fingerprint)
        if ranks.main:
            run_directory.check(directory, job.fingerprint)
        found.append((job, directory))
        return job.fingerprint

    with stages.checks():
        ranks.agreed(check)
    job, directory = found[0]
    if ranks.told((directory / "checkpoint").exists):
        # Nothing is left to do together.
        ranks = replace(ranks, world=1)
        if not ranks.main:
            return job, directory, Plan({}), job.network
    measured: Measured | None = None

    def prepare_directory() -> None:
        nonlocal measured
        measured = latency_tables(job, directory, stages)
        held.enter_context(run_directory.held(directory, job.fingerprint, recipe))

    ranks.told(prepare_directory)
    job.network.module.to(job.device)
    batches = Shared(_on_device(job), ranks)
    dense, scores = _scored(job, batches, directory, stages) if recipe.has_budget else (job.network, {})
    return job, directory, *_pruned(job, dense, scores, measured, batches, directory, stages)


def _on_own_device(job: Job, ranks: Ranks) -> Job:
    """The job, on a GPU of this process's own where there are several processes."""
    batches = len(job.calibration.batches)
    if ranks.world > batches:
        raise UserError(
            f"--nproc-per-node: calibration data of {batches} batches cannot be shared by {ranks.world} processes; "
            f"start {batches} at most, or give more samples"
        )
    if ranks.world == 1 or job.device.type != "cuda":
        return job
    if local_device() >= torch.cuda.device_count():
        raise UserError(f"--nproc-per-node: process {local_device()} of this host has no GPU of its own; start fewer")
    torch.cuda.set_device(local_device())
    return replace(job, device=torch.device("cuda", local_device()))


def _finished(job: Job, directory: Path, plan: Plan, small: Network, stages: Stages, command: str) -> Result:
    """Export, measure and report."""
    results = _compared(job, small, directory, stages)
    served = replace(job, network=job.served(job.network))
    results |= export_and_measure(served, job.served(small), directory, stages)
    results["latency_budget"] = read_latency(directory) if job.recipe.has_latency else None
    notes = directory / _NOTES_NAME
    results["notes"] = run_directory.read_json(notes) if notes.is_file() and job.recipe.has_budget else []
    report = assemble(job, plan, small, results, directory, stages.seconds, command)
    write_report(report, directory)
    _write_card(report, job.network, directory / "checkpoint")
    return Result(report, small, directory)


def _write_card(report: Report, network: Network, checkpoint: Path) -> None:
    """Write the model card into the checkpoint, in the place of that of an earlier try."""
    remove_partial(checkpoint)
    facts = Facts(
        files={file.name for file in checkpoint.iterdir()},
        base_model=network.origin.base_model,
        license=network.origin.license,
        task=task(network),
    )
    with run_directory.recorded(checkpoint):
        write_text(checkpoint / CARD_NAME, render_card(report, facts))


def _on_device(job: Job) -> Sequence[Mapping[str, Tensor]]:
    """The calibration batches on the run's device; no more of them in its memory than a shelf keeps."""
    if job.device.type == "cpu":
        return job.calibration.batches
    return Shelf({name: t.to(job.device) for name, t in batch.items()} for batch in job.calibration.batches)


def _scored(job: Job, batches: Shared, directory: Path, stages: Stages) -> tuple[Network, dict[str, Tensor]]:
    """The network in the basis that it is scored and pruned in, on the run's device, and its scores.

    Of several processes only the main one has scores that were kept; no other needs any.
    """
    path, structure, scoring = directory / "scores.safetensors", job.anatomy.structure, scoring_of(job.recipe)
    labels, ranks = job.calibration.labels, batches.ranks
    with stages.stage("score"):
        if (directory / "checkpoint").exists() and path.is_file():
            return job.network, _kept_scores(path, structure)
        dense = in_principal_bases(job.network, structure, batches)
        if ranks.told(path.is_file):
            return dense, _kept_scores(path, structure) if ranks.main else {}
        told: list[str] = []

        def tell(sentence: str) -> None:
            logger.warning(sentence)
            told.append(f"{sentence[0].upper()}{sentence[1:]}.")

        costs = job.anatomy.costs
        scores = score(dense, structure, costs, batches, scoring, labels=labels, tell=tell)
        if not ranks.main:
            return dense, scores
        if told:
            # Before the scores, which tell a later try that nothing is left to do.
            with run_directory.recorded(directory / _NOTES_NAME):
                write_text(directory / _NOTES_NAME, json.dumps(told) + "\n")
        with run_directory.recorded(path):
            save_scores(scores, path)
        return dense, scores


def _kept_scores(path: Path, structure: Structure) -> dict[str, Tensor]:
    """The scores at ``path``; UserError unless they are those of ``structure``."""
    run_directory.keep(path)
    try:
        scores = load_file(regular(path))
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
    batches: Shared,
    directory: Path,
    stages: Stages,
) -> tuple[Plan, Network]:
    """Search, slice and repair, or read the checkpoint of an earlier try; the main process writes plan.json and the
    checkpoint, and only it has latencies ``measured``."""
    recipe, structure, path = job.recipe, job.anatomy.structure, directory / "checkpoint"
    kept = batches.ranks.told(path.exists)
    ridge: Ridge = recipe.ridge if recipe.compensate else None
    schedule = () if kept else _schedule(job, dense, scores, measured, batches, directory, stages)
    met: Plan | None = None
    if recipe.has_latency and not kept:

        def meet() -> Plan:
            assert measured is not None
            return plan_for_latency(job, dense, scores, measured, schedule, directory, stages)

        met = told_plan(batches, meet)
    with stages.stage("slice and repair"):
        if kept:
            run_directory.keep(path)
            plan = _read_plan(directory)
            plan.check(structure)
            small = remove(job.network, structure, plan, [], None, stack=job.anatomy.stack)
            checkpoint.load_weights(small, path)
        else:
            with part(1.0 if recipe.sparsity is None else 0.5):
                if not recipe.has_budget:
                    plan = Plan({g.name: tuple(range(g.units)) for g in structure.groups})
                    module = sliced(dense.module, structure, plan)
                elif met is not None:
                    plan, module = met, remove(dense, structure, met, batches, ridge, job.anatomy.stack)
                else:
                    assert recipe.flops is not None
                    edges = edges_of(structure, measured) if measured else None
                    settings = replace(_settings(recipe, recipe.flops), labels=job.calibration.labels, edges=edges)
                    plan, module = remove_in_rounds(dense, job.anatomy, scores, batches, settings, schedule)
            if recipe.sparsity is not None:
                make_sparse(dense, module, structure, plan, batches, ridge)
            small = module
            if not batches.ranks.main:
                return plan, job.network.with_module(small)
            written = {"flops": recipe.flops, "kept": dict(plan.kept), "tokens": plan.tokens}
            with run_directory.recorded(directory / "plan.json"):
                write_text(directory / "plan.json", json.dumps(written) + "\n")
        pruned = job.network.with_module(small.cpu())
        job.network.module.cpu()
        if not kept:
            with run_directory.recorded(path):
                checkpoint.save(pruned, plan.after(job.earlier), path)
    logger.info("units kept: %s", ", ".join(_kept(structure, plan)))
    return plan, pruned


def _kept(structure: Structure, plan: Plan) -> list[str]:
    """How many units of each kind are left of how many."""
    kinds = dict.fromkeys(group.kind for group in structure.groups)
    of = {kind: [group for group in structure.groups if group.kind == kind] for kind in kinds}
    return [
        f"{kind} {sum(len(plan.kept[g.name]) for g in groups)} of {sum(g.units for g in groups)}"
        for kind, groups in of.items()
    ]


def _settings(recipe: Recipe, flops: float) -> PruneSettings:
    """Return how units are removed down to ``flops`` of the dense FLOPs."""
    return PruneSettings(
        flops,
        scoring_of(recipe),
        align=recipe.alignment or 64,
        ridge=recipe.ridge if recipe.compensate else None,
        rounds=recipe.rounds,
        tokens=recipe.tokens,
        tokens_share=recipe.tokens_share,
    )


def _schedule(
    job: Job,
    dense: Network,
    scores: Mapping[str, Tensor],
    measured: Measured | None,
    batches: Shared,
    directory: Path,
    stages: Stages,
) -> tuple[int, ...]:
    """How many tokens enter each block; empty where none merge. Under a latency budget alone, what is best for as
    many FLOPs."""
    recipe, anatomy = job.recipe, job.anatomy
    if anatomy.stack is None:
        return ()
    damage = _damages(job, dense, anatomy.stack, batches, directory, stages) if recipe.tokens == "auto" else None

    def find() -> tuple[int, ...]:
        flops = recipe.flops
        if flops is None:
            assert measured is not None
            flops = latency_fraction(recipe, measured)
        return token_schedule(dense, anatomy, scores, _settings(recipe, flops), damage)

    return tuple(batches.ranks.told(find))


def _damages(job: Job, dense: Network, stack: TokenStack, batches: Shared, directory: Path, stages: Stages) -> Damages:
    """What merging tokens costs, measured once for all budgets."""
    scoring, path, ranks = scoring_of(job.recipe), directory / "merging.json", batches.ranks
    with stages.stage("try merging"):
        found: dict[str, Any] = {}
        if not ranks.told(path.is_file):
            found = token_damages(dense, job.anatomy.structure, stack, batches, scoring).to_dict()
        return Damages.from_dict(ranks.told(lambda: run_directory.kept_json(path, lambda: found)))


def _read_plan(directory: Path) -> Plan:
    path = directory / "plan.json"
    if not path.is_file():
        raise UserError(f"{path} is gone: remove {directory / 'checkpoint'} too, to prune again")
    try:
        written = run_directory.read_json(path)
        kept = {name: tuple(map(index, units)) for name, units in written["kept"].items()}
        return Plan(kept, tuple(map(index, written["tokens"])))
    except (KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is damaged: remove it and {directory / 'checkpoint'}, to prune again") from error


def _agreement(job: Job, small: Network) -> list[Agreement]:
    """Agreement of every output and, where the model says how they are made, of the sentence embeddings."""
    network, held_out = job.network, job.calibration.held_out
    found = [*agreement(network, small.module, held_out)]
    return found if network.sentences is None else [*found, *agreement(network.with_pooling(), small.module, held_out)]


def _compared(job: Job, small: Network, directory: Path, stages: Stages) -> dict[str, Any]:
    """Agreement on held-out inputs, and the labelled set where one is given."""
    with stages.stage("compare outputs"):
        agreed = run_directory.kept_json(
            directory / "agreement.json",
            lambda: [asdict(a) for a in _agreement(job, small)],
        )
        drawn = run_directory.kept_json(
            directory / "pictures.json",
            lambda: [asdict(p) for p in pictures(job.network, small.module, job.calibration.held_out)],
        )
    found = {"agreement": agreed, "pictures": drawn, "evaluation": None}
    if job.dataset is None:
        return found
    dataset = job.dataset
    with stages.stage("evaluate"):

        def measure() -> dict[str, Any]:
            figures = {}
            for name, module in track([*zip(VARIANTS, (job.network.module, small.module), strict=True)]):
                figures[name] = dataset.measure(module.to(job.device))
                module.cpu()
            return {"metric": dataset.metric, "dataset": dataset.name, "samples": dataset.samples, **figures}

        evaluated = run_directory.kept_json(directory / "evaluation.json", measure)
    return found | {"evaluation": evaluated}
