"""The pruning stage: from a network and calibration data to a smaller network, in memory."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from optin_deploy.compensation import compensate
from optin_deploy.costs import Costs, flop_costs
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.plan import Plan
from optin_deploy.scoring import Scorer, score
from optin_deploy.search import check_budget, search
from optin_deploy.slicing import sliced
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Structure

Batches = Sequence[Mapping[str, Tensor]]
Advance = Callable[[float], None]


@dataclass(frozen=True)
class Anatomy:
    """What can be removed from a network and what it costs, in FLOPs."""

    structure: Structure
    costs: Costs


@dataclass(frozen=True)
class Pruned:
    """A smaller network, and how it came about. ``plan`` counts units of the network that was pruned."""

    network: Network
    plan: Plan
    scores: Mapping[str, Tensor]
    anatomy: Anatomy


def examine(network: Network) -> Anatomy:
    """Find and count the prunable groups; UserError when there are none."""
    structure = describe(network.module, network.inputs)
    if not structure.groups:
        raise UserError(
            f"nothing prunable found in {network.source.name}: looked for timm's Attention and Mlp, for attentions of "
            "transformers with separate query, key and value, and for two-layer feed-forward networks beside them"
        )
    return Anatomy(structure, flop_costs(network.module, structure, network.inputs))


def prune(
    network: Network,
    batches: Batches,
    flops: float,
    *,
    scorer: Scorer = "sketch",
    probes: int = 4,
    task_weight: float = 1.0,
    align: int = 64,
    repair: bool = True,
    ridge: float = 0.1,
    seed: int = 0,
) -> Pruned:
    """Score, search, slice and repair in one call.

    Args:
        batches: calibration inputs on the network's device.
        flops: part of the network's FLOPs to keep, above 0 and below 1.
        scorer, probes, task_weight, seed: see `scoring.score`.
        align: see `search.search`.
        repair: refit the output projections (see ``compensation``) with this ``ridge``.

    Raises:
        UserError: nothing is prunable, or the budget is out of range or below the floor.
    """
    if not 0 < flops < 1:
        raise UserError(f"flops={flops:g}: give the part of the FLOPs to keep, above 0 and below 1, like 0.5")
    anatomy = examine(network)
    check_budget(anatomy.costs, flops)
    scores = score(
        network, anatomy.structure, batches, scorer=scorer, probes=probes, task_weight=task_weight, seed=seed
    )
    plan = search(anatomy.structure, scores, anatomy.costs, flops, align)
    small = remove(network, anatomy.structure, plan, batches, ridge if repair else None)
    return Pruned(network.with_module(small), plan, scores, anatomy)


def remove(
    network: Network,
    structure: Structure,
    plan: Plan,
    batches: Batches,
    ridge: float | None,
    advance: Advance = lambda _: None,
) -> nn.Module:
    """Slice by ``plan`` and, where ``ridge`` is not None, repair; ``advance`` is called once per block."""
    small = sliced(network.module, structure, plan)
    if ridge is not None:
        compensate(network, small, structure, plan, batches, ridge, advance)
    return small
