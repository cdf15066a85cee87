"""The stages of a run that make the network smaller: scores, the plan, and the pruned network."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from optin_deploy.config.recipe import Recipe
from optin_deploy.criteria.scoring import save_scores, score
from optin_deploy.distributed.ranks import Shared, ranks_of
from optin_deploy.errors import UserError
from optin_deploy.latency.budget import find_step_sizes
from optin_deploy.latency.tables import LatencyModel
from optin_deploy.models import checkpoint
from optin_deploy.network import Network
from optin_deploy.nn.batches import Batches
from optin_deploy.pruning.head_rotation import rotate_heads_to_pca
from optin_deploy.pruning.pruner import token_schedule
from optin_deploy.pruning.removal import Remover
from optin_deploy.pruning.rounds import remove_in_rounds
from optin_deploy.pruning.settings import PruneSettings
from optin_deploy.run import run_directory
from optin_deploy.run.context import PrunedRun, RunContext
from optin_deploy.run.latency_stage import latency_fraction, plan_for_latency
from optin_deploy.run.prepare import PreparedRun, scoring_of
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network
from optin_deploy.tokens.merge_loss import MergeLoss, measure_merge_loss
from optin_deploy.tokens.stack import TokenStack
from optin_deploy.utils.paths import require_regular
from optin_deploy.utils.progress import progress_until
from optin_deploy.utils.spill import SpillList

logger = logging.getLogger(__name__)
_SCORES, _NOTES, _PLAN, _MERGE_LOSS = "scores.safetensors", "scoring.json", "plan.json", "merging.json"


@dataclass(frozen=True)
class _Scored:
    """The scored network, from which pruning starts.

    Attributes:
        dense: the network in the basis that it is scored and pruned in, on the run's device.
        scores: empty in all but the main process if they were kept, and if no units are removed.
        batches: calibration batches on the run's device, shared by all processes.
        tables: the latency tables; only the main process has them, and only if the recipe needs them.
    """

    dense: Network
    scores: Mapping[str, Tensor]
    batches: Shared
    tables: LatencyModel | None

    @property
    def measured(self) -> LatencyModel:
        """The latency tables of a run that needs them, in the main process."""
        if self.tables is None:
            raise RuntimeError("there are no latency tables in this process")
        return self.tables


@dataclass(frozen=True)
class _PlanFile:
    flops: float | None
    kept: Mapping[str, tuple[int, ...]]
    tokens: tuple[int, ...]


def prune_network(context: RunContext, tables: LatencyModel | None) -> PrunedRun:
    """Score the network and prune it, by all processes together; or read what an earlier try left.

    Args:
        tables: latency tables, in the main process, if the recipe needs them.
    """
    prepared, ranks = context.prepared, context.ranks
    prepared.network.module.to(prepared.device)
    batches = Shared(_batches_on_device(prepared), ranks)
    dense, scores = _score(context, batches) if context.recipe.has_budget else (context.network, {})
    if ranks.broadcast_object(context.checkpoint.exists):
        pruned = _read_checkpoint(context)
    else:
        pruned = _prune(context, _Scored(dense, scores, batches, tables))
    logger.info("units kept: %s", ", ".join(_count_kept(prepared.space.structure, pruned.plan)))
    return pruned


def read_notes(context: RunContext) -> list[str]:
    """Read the sentences on how scoring differed from the options; empty if it did not."""
    path = context.directory / _NOTES
    return run_directory.read_json(path, list[str]) if path.is_file() and context.recipe.has_budget else []


def _batches_on_device(prepared: PreparedRun) -> Batches:
    """Return the calibration batches on the run's device; a spill list keeps only some of them in its memory."""
    if prepared.device.type == "cpu":
        return prepared.calibration.batches
    return SpillList(
        {name: t.to(prepared.device) for name, t in batch.items()} for batch in prepared.calibration.batches
    )


def _score(context: RunContext, batches: Shared) -> tuple[Network, dict[str, Tensor]]:
    """Return the network in the basis that it is scored and pruned in, and its scores."""
    path, structure, ranks = context.directory / _SCORES, context.space.structure, context.ranks
    with context.stages.stage("score"):
        if context.checkpoint.exists() and path.is_file():
            return context.network, _keep_scores(path, structure)
        dense = rotate_heads_to_pca(context.network, structure, batches)
        if ranks.broadcast_object(path.is_file):
            return dense, _keep_scores(path, structure) if ranks.main else {}
        notes: list[str] = []
        costs, labels = context.space.costs, context.prepared.calibration.labels
        scores = score(dense, structure, costs, batches, scoring_of(context.recipe), labels=labels, tell=notes.append)
        for note in notes:
            logger.warning(note)
        if ranks.main:
            _save_scores(path, scores, [f"{note[0].upper()}{note[1:]}." for note in notes])
        return dense, scores


def _save_scores(path: Path, scores: Mapping[str, Tensor], notes: list[str]) -> None:
    # The scores come last: a later try that finds them does not score again.
    if notes:
        run_directory.write_json(path.with_name(_NOTES), notes, indent=None)
    with run_directory.recording(path):
        save_scores(scores, path)


def _keep_scores(path: Path, structure: Structure) -> dict[str, Tensor]:
    """Read the scores of an earlier try; UserError unless they fit ``structure``."""
    run_directory.keep(path)
    try:
        scores = load_file(require_regular(path))
    except (OSError, SafetensorError):
        scores = {}
    if {name: tuple(t.shape) for name, t in scores.items()} != {g.name: (g.units,) for g in structure.groups}:
        raise UserError(f"{path} is damaged or of another network: remove it to compute it again")
    return scores


def _read_checkpoint(context: RunContext) -> PrunedRun:
    """Read the pruned network of an earlier try."""
    structure = context.space.structure
    with context.stages.stage("slice and compensate"):
        run_directory.keep(context.checkpoint)
        written = run_directory.read_with_checkpoint(context.directory, _PLAN, _PlanFile)
        plan = Plan(written.kept, written.tokens)
        plan.check(structure)
        module = Remover(context.network, context.space, [], None).remove(plan)
        checkpoint.load_weights(module, context.checkpoint)
        return _on_cpu(context, plan, module)


def _prune(context: RunContext, scored: _Scored) -> PrunedRun:
    """Search, slice and compensate by all processes together; the main one saves the plan and the checkpoint."""
    recipe = context.recipe
    remover = Remover(scored.dense, context.space, scored.batches, recipe.ridge if recipe.compensate else None)
    schedule = _schedule_tokens(context, scored)
    plan = _plan_for_latency(context, scored, schedule) if recipe.has_latency else None
    with context.stages.stage("slice and compensate"):
        with progress_until(1.0 if recipe.sparsity is None else 0.5):
            if plan is not None:
                module = remover.remove(plan)
            elif recipe.flops is not None:
                plan, module = _prune_to_flops(context, scored, remover, recipe.flops, schedule)
            else:
                plan, module = _keep_all_units(context)
        if recipe.sparsity is not None:
            remover.make_sparse(module, plan)
        pruned = _on_cpu(context, plan, module)
        if context.ranks.main:
            _save_checkpoint(context, pruned)
        return pruned


def _save_checkpoint(context: RunContext, pruned: PrunedRun) -> None:
    plan = pruned.plan
    run_directory.write_json(
        context.directory / _PLAN, _PlanFile(context.recipe.flops, plan.kept, plan.tokens), indent=None
    )
    with run_directory.recording(context.checkpoint):
        checkpoint.save(pruned.network, plan.after(context.prepared.earlier), context.checkpoint)


def _plan_for_latency(context: RunContext, scored: _Scored, schedule: tuple[int, ...]) -> Plan:
    def plan() -> Plan:
        return plan_for_latency(context, scored.dense, scored.scores, scored.measured, schedule)

    return ranks_of(scored.batches).broadcast_object(plan)


def _prune_to_flops(
    context: RunContext, scored: _Scored, remover: Remover, flops: float, schedule: tuple[int, ...]
) -> tuple[Plan, nn.Module]:
    settings = replace(
        _settings(context.recipe, flops),
        labels=context.prepared.calibration.labels,
        step_sizes=find_step_sizes(context.space.structure, scored.tables.costs) if scored.tables else None,
    )
    return remove_in_rounds(remover, scored.scores, settings, schedule)


def _settings(recipe: Recipe, flops: float) -> PruneSettings:
    """Return the settings of pruning to ``flops`` of the dense FLOPs."""
    return PruneSettings(
        flops,
        scoring_of(recipe),
        align=recipe.alignment or 64,
        ridge=recipe.ridge if recipe.compensate else None,
        rounds=recipe.rounds,
        tokens=recipe.tokens,
        tokens_share=recipe.tokens_share,
    )


def _keep_all_units(context: RunContext) -> tuple[Plan, nn.Module]:
    structure = context.space.structure
    plan = Plan({group.name: tuple(range(group.units)) for group in structure.groups})
    return plan, slice_network(context.network.module, structure, plan)


def _schedule_tokens(context: RunContext, scored: _Scored) -> tuple[int, ...]:
    """Return how many tokens enter each block; empty if none merge."""
    stack = context.space.stack
    if stack is None:
        return ()
    merge_loss = _measure_merge_loss(context, scored, stack) if context.recipe.tokens == "auto" else None
    return tuple(context.ranks.broadcast_object(partial(_search_schedule, context, scored, merge_loss)))


def _search_schedule(context: RunContext, scored: _Scored, merge_loss: MergeLoss | None) -> tuple[int, ...]:
    """Search the schedule for the FLOPs budget, or under a latency budget alone, for the same fraction of the FLOPs."""
    recipe = context.recipe
    flops = latency_fraction(recipe, scored.measured) if recipe.flops is None else recipe.flops
    settings = _settings(recipe, flops)
    return token_schedule(scored.dense, context.space, scored.scores, settings, merge_loss)


def _measure_merge_loss(context: RunContext, scored: _Scored, stack: TokenStack) -> MergeLoss | None:
    """Measure the loss of merging tokens, once for all budgets; or let the main process read an earlier result."""
    path, ranks = context.directory / _MERGE_LOSS, context.ranks
    with context.stages.stage("try merging"):
        if ranks.broadcast_object(path.is_file):
            return ranks.on_main(partial(_read_merge_loss, path))
        scoring = scoring_of(context.recipe)
        merge_loss = measure_merge_loss(scored.dense, context.space.structure, stack, scored.batches, scoring)
        if ranks.main:
            run_directory.write_json(path, merge_loss.to_dict())
        return merge_loss


def _read_merge_loss(path: Path) -> MergeLoss:
    run_directory.keep(path)
    return MergeLoss.from_dict(run_directory.read_json(path, dict[str, list[object]]))


def _on_cpu(context: RunContext, plan: Plan, module: nn.Module) -> PrunedRun:
    """Return the pruned network after both networks have left the run's device."""
    network = context.network.with_module(module.cpu())
    context.network.module.cpu()
    return PrunedRun(plan, network)


def _count_kept(structure: Structure, plan: Plan) -> list[str]:
    """Return, for each kind of unit, how many are kept of how many."""
    kinds = dict.fromkeys(group.kind for group in structure.groups)
    groups_of = {kind: [group for group in structure.groups if group.kind == kind] for kind in kinds}
    return [
        f"{kind} {sum(len(plan.kept[g.name]) for g in groups)} of {sum(g.units for g in groups)}"
        for kind, groups in groups_of.items()
    ]
