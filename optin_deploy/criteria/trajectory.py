"""OPTIN's criterion (Khaki & Plataniotis, ICLR 2024): the trajectory loss of masking a unit, by sketch or exactly.

A score is manifold + Σ factor · task (see ``criteria.loss``) of the network with the unit masked, summed over batches;
`task_factors` finds the factors that bring both parts to the same order of magnitude. The manifold part includes the
unit's own block.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from optin_deploy.criteria.trajectory_loss import Batch, Trajectory, differentiable, gradients, probe_losses
from optin_deploy.distributed.ranks import ranks_of
from optin_deploy.network import Network
from optin_deploy.nn.calls import first_tensor
from optin_deploy.structure.groups import Group, Structure, channels_last
from optin_deploy.structure.masking import mask_units
from optin_deploy.utils.progress import track

# The exact scorer stacks copies of a batch, one mask each, up to about this many tokens.
STACKED_TOKENS = 16_384
_FACTOR_PROBES = 8


def sketch_scores(
    network: Network,
    structure: Structure,
    batches: Sequence[Batch],
    *,
    probes: int,
    factors: Mapping[str, float],
    seed: int,
    manifold: float = 1.0,
) -> dict[str, Tensor]:
    """Scores of all units at once, to second order: group name -> float64 ``(units,)``.

    The squared derivative of a probe (see ``criteria.loss``) for a unit's mask is an unbiased estimate of the score;
    one backward pass gives it for every unit of every block.

    The square of a sum over samples is nearly all noise between samples. So the masks are per sample: the sum of the
    samples' squares, far less noisy, ranks the units of a group, and one factor per group, the ratio of both estimates
    summed over its units, brings in what the samples' changes have in common.

    Args:
        probes: random draws per batch; the error of a score falls with the root of probes times samples.
        factors: weights of the outputs' task terms, by output name.
        manifold: weight of the manifold part.
    """
    device = next(network.module.parameters()).device
    joint = {g.name: torch.zeros(g.units, dtype=torch.float64, device=device) for g in structure.groups}
    single = {name: zeros.clone() for name, zeros in joint.items()}
    ranks = ranks_of(batches)
    own = ranks.shard(len(batches) * probes)
    for index in track(range(own.start // probes, -(-own.stop // probes))):
        trajectory = Trajectory(network, structure, batches[index], seed + index)
        generator = torch.Generator(device).manual_seed(seed + index)
        masks = [torch.ones(trajectory.size, g.units, device=device, requires_grad=True) for g in structure.groups]
        named = dict(zip(joint, masks, strict=True))
        with differentiable(network), mask_units(network.module, structure, named):
            blocks, outputs = trajectory.run()
            grams = trajectory.grams(blocks) if manifold else {}
            for probe in track(range(probes)):
                loss = probe_losses(trajectory, grams, outputs, manifold, factors, generator)
                if index * probes + probe not in own:
                    # Drawn all the same, so that a probe is the same whoever takes it.
                    continue
                for name, gradient in zip(joint, gradients(loss, masks, keep=True), strict=True):
                    joint[name] += gradient.double().sum(0).square() / probes
                    single[name] += gradient.double().square().sum(0) / probes
    joint, single = ranks.all_reduce(joint), ranks.all_reduce(single)
    return {n: (s * (joint[n].sum() / s.sum().clamp_min(1e-300))).cpu() for n, s in single.items()}


def task_factors(
    network: Network,
    structure: Structure,
    batch: Batch,
    weight: float,
    seed: int,
    sketch: Callable[..., dict[str, Tensor]] = sketch_scores,
) -> dict[str, float]:
    """What each output's task term is multiplied by, so that over all units the task is ``weight`` times the manifold.

    The outputs that masks move at all get equal parts of it.

    Args:
        sketch: what estimates the scores; it is called like `sketch_scores`.
    """

    def total(manifold: float, factors: Mapping[str, float]) -> float:
        scores = sketch(
            network, structure, [batch], probes=_FACTOR_PROBES, factors=factors, seed=seed, manifold=manifold
        )
        return sum(float(t.sum()) for t in scores.values())

    with torch.no_grad():
        names = [name for name, y in network.forward(batch).items() if y.is_floating_point()]
    manifold = total(1.0, {})
    tasks = {name: total(0.0, {name: 1.0}) for name in names}
    moving = sum(1 for task in tasks.values() if task)
    return {name: weight * manifold / task / moving if task else 0.0 for name, task in tasks.items()}


@torch.no_grad()
def exact_scores(
    network: Network,
    structure: Structure,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    *,
    factors: Mapping[str, float],
    seed: int,
    only: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """Scores of the units of ``groups`` by masking each one and running the network on from its block.

    Args:
        factors: weights of the outputs' task terms, see `task_factors`.
        only: group name -> the units to score, where not all of the group are wanted; the others get 0.
    """
    scores = {g.name: torch.zeros(g.units, dtype=torch.float64) for g in groups}
    for index, inputs in enumerate(track(batches)):
        trajectory = Trajectory(network, structure, inputs, seed + index)
        blocks, outputs = trajectory.run()
        dense = trajectory.grams(blocks)
        for group in track(groups, [group.units for group in groups]):
            wanted = torch.tensor((only or {}).get(group.name, range(group.units)), dtype=torch.long)
            for units, moved in _masked_runs(trajectory, group, wanted, blocks, dense, outputs, factors):
                scores[group.name][units] += moved
    return scores


def _masked_runs(
    trajectory: Trajectory,
    group: Group,
    wanted: Tensor,
    blocks: Mapping[str, Any],
    dense: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    factors: Mapping[str, float],
) -> Any:
    """Yield ``(units, loss)``, a stack of the units ``wanted`` at a time."""
    earlier = trajectory.structure.blocks[: group.layer]
    some = first_tensor(blocks[trajectory.structure.blocks[group.layer]])
    assert some is not None
    tokens = channels_last(some, group.axis).shape[:-1].numel()
    for units in track(wanted.split(max(1, STACKED_TOKENS // max(1, tokens)))):
        copies = len(units)
        masks = 1 - F.one_hot(units.to(some.device), group.units).to(some.dtype)
        given = {b: repeated(blocks[b], copies, trajectory.size) for b in earlier}
        with mask_units(trajectory.network.module, trajectory.structure, {group.name: masks}):
            later, changed = trajectory.run(copies, given)
        moved = torch.zeros(copies, dtype=torch.float64)
        for block, output in trajectory.compared(later).items():
            change = trajectory.gram(block, output, copies) - dense[block]
            moved += change.square().sum((-1, -2)).double().cpu()
        for name, factor in factors.items():
            if factor:
                moved += factor * trajectory.task_change(name, outputs[name], changed[name], copies)
        yield units, moved


def masked_totals(
    network: Network,
    structure: Structure,
    batches: Sequence[Batch],
    *,
    probes: int,
    factors: Mapping[str, float],
    seed: int,
    manifold: float = 1.0,
) -> dict[str, Tensor]:
    """In the place of `sketch_scores` for `task_factors`, without derivatives: ``probes`` units of each group, masked
    one by one; the others get 0."""
    only = {g.name: range(0, g.units, -(-g.units // probes)) for g in structure.groups}
    groups = structure.groups
    without_task = exact_scores(network, structure, groups, batches, factors={}, seed=seed, only=only)
    if not factors:
        return {name: manifold * values for name, values in without_task.items()}
    both = exact_scores(network, structure, groups, batches, factors=factors, seed=seed, only=only)
    return {name: values - (1 - manifold) * without_task[name] for name, values in both.items()}


def repeated(output: Any, copies: int, batch: int) -> Any:
    """A block's output for stacked copies of the batch."""

    def each(tensor: Tensor) -> Tensor:
        stacked = tensor.dim() > 0 and tensor.shape[0] == batch
        return tensor.repeat(copies, *[1] * (tensor.dim() - 1)) if stacked else tensor

    return tree_map_only(Tensor, each, output)
