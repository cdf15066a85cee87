"""Prune a network in memory: score, search, slice and compensate."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from optin_deploy.criteria.scoring import Scoring, score
from optin_deploy.network import Network
from optin_deploy.nn.batches import Batches
from optin_deploy.nn.flops import count_flops
from optin_deploy.pruning.head_rotation import rotate_heads_to_pca
from optin_deploy.pruning.removal import Remover
from optin_deploy.pruning.rounds import remove_in_rounds
from optin_deploy.pruning.settings import PruneOptions, PruneSettings, Ridge
from optin_deploy.pruning.space import PruningSpace, analyze, analyze_for, validate_on
from optin_deploy.search.knapsack import check_budget
from optin_deploy.structure.groups import Group
from optin_deploy.structure.plan import Plan
from optin_deploy.tokens.costs import token_costs
from optin_deploy.tokens.merge_loss import MergeLoss, measure_merge_loss
from optin_deploy.tokens.schedule import best_schedule, share_schedule
from optin_deploy.utils.display import html_of, render_kept


@dataclass(frozen=True)
class Pruned:
    """A pruned network, its plan, and its scores.

    ``plan`` is in units of the dense network. ``scores`` is empty if the plan was an argument.
    """

    network: Network
    plan: Plan
    scores: Mapping[str, Tensor]
    space: PruningSpace

    def __repr__(self) -> str:
        share = count_flops(self.network.module, self.network.inputs) / self.space.costs.total
        parameters = sum(p.numel() for p in self.network.module.parameters())
        return f"<Pruned {self.network.source.name}: {share:.3f} of its FLOPs, {parameters:,} parameters>"

    def _repr_html_(self) -> str:
        kept = {group.name: len(self.plan.units(group)) for group in self._groups}
        return html_of(render_kept(repr(self)[1:-1], [(g.name, g.kind, g.units, kept[g.name]) for g in self._groups]))

    @property
    def _groups(self) -> tuple[Group, ...]:
        return self.space.structure.groups


@torch.inference_mode(False)
def prune(
    network: Network, batches: Batches, flops: float, *, ridge: Ridge = "auto", **options: Unpack[PruneOptions]
) -> Pruned:
    """Score, search, slice and compensate in one call.

    Args:
        batches: calibration inputs on the network's device.
        flops: fraction of the network's FLOPs to keep, above 0 and below 1.
        ridge, options: see `PruneSettings` and `PruneOptions`.

    Raises:
        UserError: nothing is prunable, tokens cannot merge, or the budget is out of range or below the floor.
        GateError: the sliced network differs from the masked one.
    """
    settings = PruneSettings(flops, ridge=ridge, **options)
    settings.check()
    scoring, tokens = settings.scoring or Scoring(), settings.tokens
    network = validate_on(network, batches)
    narrow = scoring.narrows_heads if settings.narrow is None else settings.narrow
    space = analyze(network, narrow=narrow, tokens=tokens != "off")
    check_budget(space.structure, space.costs, flops)
    dense = rotate_heads_to_pca(network, space.structure, batches)
    scores = score(dense, space.structure, space.costs, batches, scoring, labels=settings.labels)
    merge_loss = None
    if space.stack is not None and tokens == "auto":
        merge_loss = measure_merge_loss(dense, space.structure, space.stack, batches, scoring)
    schedule = token_schedule(dense, space, scores, settings, merge_loss)
    plan, small = remove_in_rounds(Remover(dense, space, batches, ridge), scores, settings, schedule)
    return Pruned(network.with_module(small), plan, scores, space)


@torch.inference_mode(False)
def prune_to(network: Network, batches: Batches, plan: Plan, ridge: Ridge = "auto") -> Pruned:
    """Slice by ``plan`` and compensate; the result has no scores.

    Raises:
        UserError: the plan does not fit the network.
        GateError: the sliced network differs from the masked one.
    """
    network = validate_on(network, batches)
    space = analyze_for(network, plan.kept, tokens=bool(plan.tokens))
    plan.check(space.structure)
    if space.stack is not None:
        space.stack.check(plan.tokens)
    dense = rotate_heads_to_pca(network, space.structure, batches)
    small = Remover(dense, space, batches, ridge).remove(plan)
    return Pruned(network.with_module(small), plan, {}, space)


def token_schedule(
    dense: Network,
    space: PruningSpace,
    scores: Mapping[str, Tensor],
    settings: PruneSettings,
    merge_loss: MergeLoss | None = None,
) -> tuple[int, ...]:
    """Return how many tokens enter each block; empty if none merge.

    Args:
        merge_loss: the loss of merging, by `measure_merge_loss`; needed if ``settings.tokens`` is "auto".
    """
    stack, structure = space.stack, space.structure
    if settings.tokens == "off" or stack is None:
        return ()
    if settings.tokens != "auto":
        schedule = tuple(int(n) for n in settings.tokens)
        stack.check(schedule)
        return schedule
    assert merge_loss is not None
    costs = token_costs(dense.module, structure, space.costs, stack, dense.inputs)
    if settings.tokens_share is not None:
        return share_schedule(structure, costs, 1 - settings.tokens_share * (1 - settings.flops), merge_loss)
    return best_schedule(structure, scores, costs, settings.flops, settings.align, merge_loss)
