"""Whether scores say anything of the units, held against what the outputs do when units are masked.

Scores that are all zero, or all equal, are right where the outputs do not depend on those units, or on all of them
alike. Everything else is a score that saw nothing, and a search by it would prune at random.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from optin_deploy.criteria.gradient_reach import differ
from optin_deploy.criteria.trajectory_loss import Batch
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.masking import mask_units

# What scores of nothing are clamped to lies far below, whatever has its size from real numbers far above.
_FLOOR = 1e-250
_SAMPLES = 8
# Units of a group with equal scores that are masked one by one, and how far apart what they change may lie.
_TRIED = 8
_ALIKE = 1e-3


@torch.no_grad()
def check_signal(network: Network, structure: Structure, batch: Batch, scores: Mapping[str, Tensor]) -> str | None:
    """Raise UserError where ``scores`` (group -> ``(units,)``) carry no signal, as tried on some of ``batch``.

    Nothing runs where the units of every group differ in their scores.

    Returns:
        what is to be told of scores that are taken all the same: of random weights, of which speed alone is wanted, all
        units may do nothing, as where last norms begin at zero.
    """
    empty = [g for g in structure.groups if float(scores[g.name].max()) <= _FLOOR]
    equal = [g for g in structure.groups if g not in empty and g.units > 1 and _all_equal(scores[g.name])]
    if not empty and not equal:
        return None
    some = {name: t[:_SAMPLES] for name, t in batch.items()}
    dense = _outputs(network, some)
    if not dense:
        raise UserError(
            f"the network gives no floating-point numbers ({', '.join(network.outputs)}), which scores compare: "
            "have it give those that its answers are made of, too"
        )
    moving = [g for g in empty if differ(dense, _without(network, structure, g, range(g.units), some))]
    if moving:
        raise UserError(
            f"the scores of {named(moving)} are all zero, but the outputs change without these units: the criterion "
            "saw nothing of them; give --criterion trajectory --scorer exact, which masks each unit"
        )
    if len(empty) == len(structure.groups):
        told = "no unit changes the outputs on the calibration data"
        if network.weights == "random":
            return f"{told}: which units stay is arbitrary, as the weights are random"
        raise UserError(f"{told}: check the network's weights and the samples")
    for group in equal:
        if not _alike(network, structure, group, some, dense):
            raise UserError(
                f"the scores of {named([group])} are all equal, but the outputs change by different amounts without "
                "its units: this criterion cannot rank them; give another one"
            )
    return None


def named(groups: list[Group] | tuple[str, ...]) -> str:
    """The first names of groups, and how many more there are."""
    names = [group if isinstance(group, str) else group.name for group in groups]
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


def _all_equal(values: Tensor) -> bool:
    return float(values.max() - values.min()) <= 1e-12 * float(values.max().abs())


def _alike(network: Network, structure: Structure, group: Group, batch: Batch, dense: Mapping[str, Tensor]) -> bool:
    changes = []
    for unit in range(0, group.units, -(-group.units // _TRIED)):
        changed = _without(network, structure, group, [unit], batch)
        changes.append(sum(float((changed[n] - y).double().square().sum()) for n, y in dense.items()))
    return max(changes) - min(changes) <= _ALIKE * max(changes)


def _without(
    network: Network, structure: Structure, group: Group, units: "range | list[int]", batch: Batch
) -> dict[str, Tensor]:
    """The outputs with some units of a group masked."""
    like = next(iter(network.module.parameters()))
    mask = torch.ones(group.units, dtype=like.dtype, device=like.device)
    mask[list(units)] = 0.0
    with mask_units(network.module, structure, {group.name: mask}):
        return _outputs(network, batch)


def _outputs(network: Network, batch: Batch) -> dict[str, Tensor]:
    return {name: y for name, y in network.forward(batch).items() if y.is_floating_point()}
