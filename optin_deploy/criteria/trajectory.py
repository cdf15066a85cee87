"""OPTIN's criterion (Khaki & Plataniotis, ICLR 2024): the trajectory loss of masking a unit, by sketch or exactly.

A score is manifold + Σ factor · task (see ``criteria.trajectory_loss``) of the network with the unit masked, summed
over batches. `task_factors` finds factors that bring both parts to the same order of magnitude. The manifold part
includes the unit's own block.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map_only

from optin_deploy.criteria.trajectory_loss import (
    Batch,
    LossSettings,
    Trajectory,
    differentiable,
    gradients,
    probe_losses,
)
from optin_deploy.distributed.ranks import ranks_of
from optin_deploy.network import Network
from optin_deploy.nn.batches import PyTree
from optin_deploy.nn.calls import first_tensor
from optin_deploy.structure.groups import Group, Structure, channels_last
from optin_deploy.structure.masking import mask_units
from optin_deploy.utils.progress import track

# The exact scorer stacks copies of a batch, one mask each, up to about this many tokens.
STACKED_TOKENS = 16_384
_FACTOR_PROBES = 8


class Sketch(Protocol):
    """Estimates the scores of all units, as `sketch_scores` does."""

    def __call__(
        self,
        network: Network,
        structure: Structure,
        batches: Sequence[Batch],
        settings: LossSettings,
        *,
        probes: int,
    ) -> dict[str, Tensor]: ...


def sketch_scores(
    network: Network,
    structure: Structure,
    batches: Sequence[Batch],
    settings: LossSettings,
    *,
    probes: int,
) -> dict[str, Tensor]:
    """Score all units at once, to second order.

    The squared derivative of a probe (see `probe_losses`) for a unit's mask is an unbiased estimate of the score. One
    backward pass computes it for every unit of every block.

    The square of a sum over samples is mostly noise between samples. So each sample has its own masks. The sum of the
    samples' squares is far less noisy and ranks the units of a group. One factor per group, the ratio of both estimates
    summed over its units, adds what the samples' changes have in common.

    Args:
        probes: random draws per batch; the error of a score falls with the root of probes times samples.

    Returns:
        group name -> float64 ``(units,)`` on the CPU.
    """
    device = next(network.module.parameters()).device
    joint = {g.name: torch.zeros(g.units, dtype=torch.float64, device=device) for g in structure.groups}
    single = {name: zeros.clone() for name, zeros in joint.items()}
    ranks = ranks_of(batches)
    own = ranks.shard(len(batches) * probes)
    for index in track(range(own.start // probes, -(-own.stop // probes))):
        trajectory = Trajectory(network, structure, batches[index], settings.seed + index)
        generator = torch.Generator(device).manual_seed(settings.seed + index)
        masks = [torch.ones(trajectory.size, g.units, device=device, requires_grad=True) for g in structure.groups]
        named = dict(zip(joint, masks, strict=True))
        with differentiable(network), mask_units(network.module, structure, named):
            blocks, outputs = trajectory.run()
            grams = trajectory.grams(blocks) if settings.manifold else {}
            for probe in track(range(probes)):
                loss = probe_losses(trajectory, grams, outputs, settings, generator)
                if index * probes + probe not in own:
                    # It is drawn anyway, so that a probe does not depend on the process that takes it.
                    continue
                for name, gradient in zip(joint, gradients(loss, masks, keep=True), strict=True):
                    joint[name] += gradient.double().sum(0).square() / probes
                    single[name] += gradient.double().square().sum(0) / probes
    joint, single = ranks.all_reduce(joint), ranks.all_reduce(single)
    return {n: (s * (joint[n].sum() / s.sum().clamp_min(1e-300))).cpu() for n, s in single.items()}


def task_factors(
    network: Network,
    structure: Structure,
    batches: Sequence[Batch],
    weight: float,
    seed: int,
    sketch: Sketch = sketch_scores,
) -> dict[str, float]:
    """Return factors of the outputs' task terms that make the task part ``weight`` times the manifold part.

    Both parts are summed over all units.

    All outputs that masks change at all have equal parts.

    Args:
        batches: one batch.
        sketch: estimates the scores.
    """

    def total(manifold: float, factors: Mapping[str, float]) -> float:
        scores = sketch(network, structure, batches, LossSettings(factors, manifold, seed), probes=_FACTOR_PROBES)
        return sum(float(t.sum()) for t in scores.values())

    with torch.no_grad():
        names = [name for name, y in network.forward(batches[0]).items() if y.is_floating_point()]
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
    settings: LossSettings,
    *,
    only: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """Score the units of ``groups`` by masking each one and running the network on from its block.

    The manifold part has the weight 1.

    Args:
        only: group name -> the units to score, if not all; the others get 0.
    """
    scores = {g.name: torch.zeros(g.units, dtype=torch.float64) for g in groups}
    for index, inputs in enumerate(track(batches)):
        trajectory = Trajectory(network, structure, inputs, settings.seed + index)
        blocks, outputs = trajectory.run()
        dense = _DenseRun(blocks, trajectory.grams(blocks), outputs)
        for group in track(groups, [group.units for group in groups]):
            wanted = torch.tensor((only or {}).get(group.name, range(group.units)), dtype=torch.long)
            for units, moved in _masked_runs(trajectory, group, wanted, dense, settings.factors):
                scores[group.name][units] += moved
    return scores


@dataclass(frozen=True)
class _DenseRun:
    """Outputs of the blocks, their Gram matrices, and the outputs of the network, without masks."""

    blocks: Mapping[str, PyTree]
    grams: Mapping[str, Tensor]
    outputs: Mapping[str, Tensor]


def _masked_runs(
    trajectory: Trajectory, group: Group, wanted: Tensor, dense: _DenseRun, factors: Mapping[str, float]
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield ``(units, loss)``, a stack of the units ``wanted`` at a time."""
    earlier = trajectory.structure.blocks[: group.layer]
    some = first_tensor(dense.blocks[trajectory.structure.blocks[group.layer]])
    assert some is not None
    tokens = channels_last(some, group.axis).shape[:-1].numel()
    for units in track(wanted.split(max(1, STACKED_TOKENS // max(1, tokens)))):
        copies = len(units)
        masks = 1 - F.one_hot(units.to(some.device), group.units).to(some.dtype)
        given = {b: repeat_output(dense.blocks[b], copies, trajectory.size) for b in earlier}
        with mask_units(trajectory.network.module, trajectory.structure, {group.name: masks}):
            later, changed = trajectory.run(copies, given)
        moved = torch.zeros(copies, dtype=torch.float64)
        for block, output in trajectory.compared(later).items():
            change = trajectory.gram(block, output, copies) - dense.grams[block]
            moved += change.square().sum((-1, -2)).double().cpu()
        for name, factor in factors.items():
            if factor:
                moved += factor * trajectory.task_change(name, dense.outputs[name], changed[name], copies)
        yield units, moved


def masked_totals(
    network: Network,
    structure: Structure,
    batches: Sequence[Batch],
    settings: LossSettings,
    *,
    probes: int,
) -> dict[str, Tensor]:
    """Score ``probes`` units of each group by masking them one by one; the others get 0.

    It replaces `sketch_scores` in `task_factors` for networks without derivatives.
    """
    only = {g.name: range(0, g.units, -(-g.units // probes)) for g in structure.groups}
    groups = structure.groups
    no_task = replace(settings, factors={})
    without_task = exact_scores(network, structure, groups, batches, no_task, only=only)
    manifold = settings.manifold
    if not settings.factors:
        return {name: manifold * values for name, values in without_task.items()}
    both = exact_scores(network, structure, groups, batches, settings, only=only)
    return {name: values - (1 - manifold) * without_task[name] for name, values in both.items()}


def repeat_output(output: PyTree, copies: int, batch: int) -> PyTree:
    """Return a block's output for stacked copies of the batch."""

    def repeat(tensor: Tensor) -> Tensor:
        stacked = tensor.dim() > 0 and tensor.shape[0] == batch
        return tensor.repeat(copies, *[1] * (tensor.dim() - 1)) if stacked else tensor

    return tree_map_only(Tensor, repeat, output)
