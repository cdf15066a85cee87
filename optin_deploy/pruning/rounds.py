"""Pruning in rounds: each scores the network that the last one left."""

from collections.abc import Mapping
from dataclasses import replace

from torch import Tensor, nn

from optin_deploy.criteria.scoring import score
from optin_deploy.distributed.ranks import ranks_of
from optin_deploy.network import Network
from optin_deploy.nn.batches import Batches
from optin_deploy.pruning.removal import Remover
from optin_deploy.pruning.settings import PruneSettings
from optin_deploy.pruning.space import PruningSpace, analyze
from optin_deploy.search.costs import CostModel
from optin_deploy.search.knapsack import Budget, search, search_all
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.tokens.costs import token_costs
from optin_deploy.utils.progress import progress_until, track


def remove_in_rounds(
    remover: Remover, scores: Mapping[str, Tensor], settings: PruneSettings, schedule: tuple[int, ...] = ()
) -> tuple[Plan, nn.Module]:
    """Search, slice and compensate, in ``settings.rounds`` rounds.

    Args:
        scores: of the dense network, for the first round.
        schedule: tokens that enter each block, in one round only; empty if all do.

    Returns:
        the plan, in units of the dense network, and the pruned module.
    """
    dense, space, batches = remover.dense, remover.space, remover.batches
    costs: CostModel = space.costs
    if schedule and space.stack is not None:
        costs = token_costs(dense.module, space.structure, space.costs, space.stack, dense.inputs).at(schedule)
    rounds = settings.rounds
    budget = Budget(costs, settings.flops ** (1 / rounds))

    def first_plan() -> Plan:
        return search_all(space.structure, scores, [budget], settings.align, settings.step_sizes)

    plan = replace(ranks_of(batches).broadcast_object(first_plan), tokens=schedule)
    with progress_until(1 / rounds):
        small = remover.remove(plan)
    for number in track(range(2, rounds + 1)):
        flops = settings.flops ** (number / rounds)
        step = next_step(dense.with_module(small), space, batches, replace(settings, flops=flops))
        plan, small = remover.remove_more((plan, small), step)
    return plan, small


def next_step(small: Network, space: PruningSpace, batches: Batches, settings: PruneSettings) -> tuple[Structure, Plan]:
    """Score a pruned network again, and search the units that it loses next.

    Args:
        space: of the dense network; ``settings.flops`` is a fraction of its FLOPs.

    Returns:
        the structure of ``small``, and the plan in its units.
    """
    narrow = any(g.kind == "width" for g in space.structure.groups)
    rest = analyze(small, narrow=narrow)
    structure = rest.structure
    scores = score(small, structure, rest.costs, batches, settings.scoring, labels=settings.labels)
    flops = settings.flops * space.costs.total / rest.costs.total
    return structure, ranks_of(batches).broadcast_object(
        lambda: search(structure, scores, rest.costs, flops, settings.align)
    )
