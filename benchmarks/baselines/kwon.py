"""Mask rearrangement and mask tuning of Kwon et al., "A Fast Post-Training Pruning Framework for Transformers".

NeurIPS 2022, arXiv 2204.09656, written from the paper. Its three steps:

1. *Mask search* uses the diagonal of the Fisher information (`optin_deploy.criteria.fisher`). The search is ours.
2. *Mask rearrangement* (`rearrange`) also uses the other entries, one group at a time.
3. *Mask tuning* (`rescale`) replaces the ones in the masks of the remaining units by other numbers.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.network import Network
from optin_deploy.nn.partial_forward import forward_until, keep_shapes_only, replay_blocks
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan

from .shared import Batch, ends_linear, sublayer_moments


def rearrange(plan: Plan, gradients: Mapping[str, Tensor]) -> Plan:
    """Swap kept and removed units where that lowers (1 − m)ᵀ I (1 − m); the number of units of a group is unchanged.

    I is the Fisher information of a group, ``(units, units)``. One sweep visits the kept units in ascending order of
    their diagonal entry, and swaps each with the removed unit that lowers the cost most, if one does. The cost never
    rises. Groups without ``gradients`` are unchanged.
    """
    return Plan(
        {
            name: _rearrange(kept, gradients[name]) if name in gradients else tuple(kept)
            for name, kept in plan.kept.items()
        }
    )


def _rearrange(kept: tuple[int, ...], gradients: Tensor) -> tuple[int, ...]:
    information = gradients.T @ gradients / len(gradients)
    diagonal = information.diagonal()
    removed = torch.ones(len(information), dtype=torch.bool)
    removed[list(kept)] = False
    if not kept or not removed.any():
        return tuple(kept)
    # Row sums over the removed units. Updating them makes a swap cost O(units).
    products = information[:, removed].sum(1)
    for unit in sorted(kept, key=lambda u: (float(diagonal[u]), u)):
        with_unit = products + information[unit]
        # By how much the cost falls if a unit of removed ∪ {unit} is kept again.
        relief = (2 * with_unit - diagonal).masked_fill(~removed, -torch.inf)
        back = int(relief.argmax())
        if relief[back] > 2 * with_unit[unit] - diagonal[unit]:
            removed[unit], removed[back] = True, False
            products = with_unit - information[back]
    return tuple(torch.nonzero(~removed).flatten().tolist())


@torch.no_grad()
def rescale(
    network: Network,
    pruned: nn.Module,
    structure: Structure,
    plan: Plan,
    batches: Sequence[Batch],
    *,
    damp: float = 1.0,
    limit: float = 10.0,
) -> dict[str, Tensor]:
    """Multiply each unit of ``pruned`` (a sliced copy of ``network``) by a factor, in place.

    Groups are tuned in the order they run, from the first pruned one on. Let A m be the output of the group's sublayer
    in the pruned network, with one column of A per kept unit and a row per token and feature. Let t be the output that
    would make the residual stream after the sublayer equal to that of the dense network, bias aside. The factors are

        m = 1 + argmin_r ‖A (1 + r) − t‖² + damp² ‖r‖²        ⇔        (AᵀA + damp² 1) r = Aᵀ(t − A 1)

    They are folded into the columns of the output projection. Where no stream is known, t is the output of the dense
    sublayer. As in the paper, tuning stops at the first group with a factor outside ±``limit``: this group and the
    following ones are unchanged. Groups that end in a convolution are skipped.

    Differences from the paper: it runs LSMR with a damp of 1, we solve the normal equations. Its code adds a constant
    column to A for heads, leaves out the first attention, and counts only the first token in a classifier's last FFN.
    We do none of these.

    Args:
        structure: of the dense network, without widths of heads.
        damp: in units of the residual stream.

    Returns:
        group name -> factors ``(units kept,)``, float64, of the groups that were changed.
    """
    factors: dict[str, Tensor] = {}
    done: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, {}) for _ in batches]
    began = False
    for layer, block in enumerate(structure.blocks):
        for group in (g for g in structure.groups if g.layer == layer):
            kept = len(plan.units(group))
            began = began or kept < group.units
            if not began or not kept or not ends_linear(network.module, group):
                continue
            gram, cross, weight = sublayer_moments(network, pruned, structure, group, batches, done)
            group_factors = _solve_factors(gram, cross, weight, group.width, damp)
            if not bool(group_factors.isfinite().all()) or bool(group_factors.abs().max() > limit):
                return factors
            parameter = pruned.get_parameter(f"{group.output}.weight")
            parameter.mul_(group_factors.repeat_interleave(group.width).to(parameter))
            factors[group.name] = group_factors.cpu()
        for batch, outputs in zip(batches, done, strict=True):
            for module, earlier in zip((network.module, pruned), outputs, strict=True):
                with replay_blocks(module, earlier):
                    output = forward_until(module, batch, block)
                    keep_shapes_only(earlier)
                    earlier[block] = output
    return factors


def _solve_factors(gram: Tensor, cross: Tensor, weight: Tensor, width: int, damp: float) -> Tensor:
    """Return the factors of a group's units.

    AᵀA is the entrywise product of the Gram matrices of activations and weights, summed over each unit's features.
    """
    units = len(gram) // width
    normal = (gram * (weight.T @ weight)).reshape(units, width, units, width).sum((1, 3))
    right = (cross * weight.T).sum(1).reshape(units, width).sum(1)
    penalty = damp**2 * torch.eye(units, dtype=normal.dtype, device=normal.device)
    return 1 + torch.linalg.solve(normal + penalty, right - normal.sum(1))
