"""Check scores without differences against masking.

Scores that are all zero are right if the outputs do not depend on the units; equal scores are right if they depend on
all of them equally. Otherwise the criterion saw nothing, and a search with its scores would prune at random.
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

# Scores of nothing are clamped to far less than this; real scores are far larger.
_FLOOR = 1e-250
_SAMPLES = 8
# Units of a group with equal scores that are masked one by one, and the tolerance between their effects.
_TRIED = 8
_ALIKE = 1e-3


@torch.no_grad()
def check_signal(network: Network, structure: Structure, batch: Batch, scores: Mapping[str, Tensor]) -> str | None:
    """Raise UserError if ``scores`` (group -> ``(units,)``) carry no signal on some samples of ``batch``.

    Nothing runs if the scores differ within every group.

    Returns:
        a warning if the scores are used anyway: with random weights only speed matters, and all units may have no
        effect, for example if the last norms start at zero.
    """
    empty = [g for g in structure.groups if float(scores[g.name].max()) <= _FLOOR]
    equal = [g for g in structure.groups if g not in empty and g.units > 1 and _all_equal(scores[g.name])]
    if not empty and not equal:
        return None
    some = {name: t[:_SAMPLES] for name, t in batch.items()}
    dense = _outputs(network, some)
    if not dense:
        raise UserError(
            f"the network returns no floating-point outputs ({', '.join(network.outputs)}), which scores need: "
            "let it also return the logits or features behind its answers"
        )
    moving = [g for g in empty if differ(dense, _without(network, structure, g, range(g.units), some))]
    if moving:
        raise UserError(
            f"the scores of {names_of(moving)} are all zero, but the outputs change without these units: the criterion "
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
                f"the scores of {names_of([group])} are all equal, but the outputs change by different amounts without "
                "its units: this criterion cannot rank them; give another one"
            )
    return None


def names_of(groups: list[Group] | tuple[str, ...]) -> str:
    """Return the first name of groups, and how many more there are."""
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
    """Return the outputs with some units of a group masked."""
    like = next(iter(network.module.parameters()))
    mask = torch.ones(group.units, dtype=like.dtype, device=like.device)
    mask[list(units)] = 0.0
    with mask_units(network.module, structure, {group.name: mask}):
        return _outputs(network, batch)


def _outputs(network: Network, batch: Batch) -> dict[str, Tensor]:
    return {name: y for name, y in network.forward(batch).items() if y.is_floating_point()}
