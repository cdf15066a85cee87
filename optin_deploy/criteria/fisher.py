"""Fisher information of the masks, and what its authors build on it; the only criterion that needs labels.

Kwon et al., "A Fast Post-Training Pruning Framework for Transformers" (NeurIPS 2022, arXiv 2204.09656), from the paper.
With g_s the gradient of sample s's cross entropy for the masks of a group, all of them one, the group's empirical
Fisher information is I = (1/S) Σ_s g_s g_sᵀ, and masks m cost about ½ (1 − m)ᵀ I (1 − m). Where every logit is a yes or
no (``task_head``) it is the cross entropy of the sigmoids. Three steps:

1. *Mask search* takes the diagonal of I (`fisher_scores`). The search itself is ours (``search``).
2. *Mask rearrangement* (`rearranged`) counts in the rest of I, group by group.
3. *Mask tuning* (`rescale`) lets the masks that are left be other numbers than one.

Where we differ: gradients are per sample, not per mini-batch; `rescale` says what differs there.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy.distributed.ranks import own_indices
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.nn.freezing import freeze_parameters
from optin_deploy.nn.partial_forward import (
    forward_until,
    keep_shapes_only,
    record_inputs,
    record_outputs,
    replay_blocks,
)
from optin_deploy.nn.task_head import is_single
from optin_deploy.nn.unfold import valid_rows
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.masking import mask_units
from optin_deploy.structure.plan import Plan
from optin_deploy.utils.progress import track

# Label of positions that do not count, as in torch and transformers.
IGNORED = -100

Batch = Mapping[str, Tensor]


def mask_gradients(
    network: Network,
    structure: Structure,
    batches: Sequence[Batch],
    labels: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Gradient of each sample's cross entropy for the mask of every unit: name -> float64 ``(samples, units)``, CPU.

    A sample's cross entropy is the mean over its labelled positions. Of batches that several processes share, each gets
    the gradients of its own.

    Args:
        labels: for each batch the int64 classes, ``(batch,)``, or ``(batch, tokens)`` (any number of axes) where the
            network gives logits for every position; positions of -100 do not count. Where logits are a yes or no each,
            1 or 0 for each of them; the axis of a single logit may be left out.

    Raises:
        UserError: the network has no class logits, or the labels do not fit them.
    """
    check_head(network)
    if len(labels) != len(batches):
        raise UserError(f"fisher needs labels for every batch: {len(labels)} given for {len(batches)} batches")
    gradients: dict[str, list[Tensor]] = {g.name: [] for g in structure.groups}
    entropy = _binary_cross_entropy if network.head == "binary" else _cross_entropy
    for index in track(own_indices(batches)):
        found = sample_gradients(network, structure, batches[index], partial(entropy, labels[index]))
        for name, gradient in found.items():
            gradients[name].append(gradient)
    return {name: torch.cat(parts) for name, parts in gradients.items()}


def check_head(network: Network) -> None:
    """Raise UserError where the network has no logits whose cross entropy with labels could be taken."""
    if network.logits is None:
        raise UserError("--criterion fisher: the network has no class logits; take another criterion")
    if network.head == "regression":
        raise UserError("--criterion fisher: the network gives numbers, not classes; take another criterion")


def sample_gradients(
    network: Network,
    structure: Structure,
    batch: Batch,
    loss: Callable[[Tensor], Tensor],
    module: nn.Module | None = None,
) -> dict[str, Tensor]:
    """Gradient of a loss for every unit's mask, sample by sample: group name -> float64 ``(batch, units)`` on the CPU.

    Every sample has masks of its own, so one backward pass of the sum gives them all.

    Args:
        loss: from the logits to the sum of the samples' losses.
        module: stands in the network's place; the groups of ``structure`` must be whole in it.
    """
    assert network.logits is not None
    module = module or network.module
    like = next(module.parameters())
    size = len(next(iter(batch.values())))
    masks = {
        g.name: torch.ones(size, g.units, device=like.device, dtype=like.dtype, requires_grad=True)
        for g in structure.groups
    }
    with freeze_parameters(module), torch.enable_grad(), mask_units(module, structure, masks):
        total = loss(network.forward(batch, module)[network.logits])
        found = torch.autograd.grad(total, list(masks.values()), materialize_grads=True, allow_unused=True)
    return {name: gradient.double().cpu() for name, gradient in zip(masks, found, strict=True)}


def _cross_entropy(labels: Tensor, logits: Tensor) -> Tensor:
    """Sum of the samples' cross entropies; classes lie on the last axis of ``logits`` or, in maps, on the second."""
    if logits.shape[:-1] != labels.shape and logits.movedim(1, -1).shape[:-1] == labels.shape:
        logits = logits.movedim(1, -1)
    if logits.shape[:-1] != labels.shape:
        raise UserError(f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}")
    labels = labels.to(logits.device)
    each = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    counted = (labels != IGNORED).reshape(len(labels), -1).sum(1).clamp_min(1)
    return (each.reshape(len(labels), -1).sum(1) / counted).sum()


def _binary_cross_entropy(labels: Tensor, logits: Tensor) -> Tensor:
    """Sum of the samples' cross entropies, each the mean over its labelled logits."""
    if logits.numel() == labels.numel() and is_single(logits):
        labels = labels.reshape(logits.shape)
    if logits.shape != labels.shape:
        raise UserError(
            f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}, each of which is "
            "a yes or no: give 1 or 0 for each"
        )
    labels = labels.to(logits.device)
    counted = labels != IGNORED
    if not bool(((labels == 0) | (labels == 1) | ~counted).all()):
        raise UserError(f"labels of a yes or no are 1 or 0, not {labels[counted].unique().tolist()[:5]}")
    wanted = labels.clamp_min(0).to(logits.dtype)
    each = F.binary_cross_entropy_with_logits(logits, wanted, reduction="none") * counted
    each, counted = (t.reshape(len(labels), -1) for t in (each, counted))
    return (each.sum(1) / counted.sum(1).clamp_min(1)).sum()


def fisher_scores(gradients: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Diagonal of the Fisher information, (1/S) Σ_s g_s²: group name -> float64 ``(units,)``.

    Args:
        gradients: from `mask_gradients`.
    """
    return {name: gradient.square().mean(0) for name, gradient in gradients.items()}


def rearranged(plan: Plan, gradients: Mapping[str, Tensor]) -> Plan:
    """Mask rearrangement: as many units in every group, others where the whole Fisher information prefers them.

    Lowers (1 − m)ᵀ I (1 − m) group by group, I the group's units × units Fisher information. In one sweep over the
    units kept, those with the least diagonal first, each changes places with the removed unit that lowers the cost
    most, if any does; so the cost never rises. Groups that ``gradients`` does not name stay as they are.
    """
    return Plan(
        {
            name: _rearranged(kept, gradients[name]) if name in gradients else tuple(kept)
            for name, kept in plan.kept.items()
        }
    )


def _rearranged(kept: tuple[int, ...], gradients: Tensor) -> tuple[int, ...]:
    information = gradients.T @ gradients / len(gradients)
    diagonal = information.diagonal()
    removed = torch.ones(len(information), dtype=torch.bool)
    removed[list(kept)] = False
    if not kept or not removed.any():
        return tuple(kept)
    # The products of every unit with the sum over the removed ones, kept up to date, make a swap cost only O(units).
    products = information[:, removed].sum(1)
    for unit in sorted(kept, key=lambda u: (float(diagonal[u]), u)):
        with_unit = products + information[unit]
        # What the cost falls by when a unit of removed ∪ {unit} comes back.
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
    """Mask tuning: give each unit of ``pruned`` (a sliced copy of ``network``) a factor, in place.

    Group by group in the order they run, from the first pruned one on. With A m the output of the group's sublayer in
    the pruned network (one column of A per unit kept, all tokens and features stacked) and t what would bring the
    residual stream there to where the dense network's stream is after the sublayer, bias aside, the factors are

        m = 1 + argmin_r ‖A (1 + r) − t‖² + damp² ‖r‖²        ⇔        (AᵀA + damp² 1) r = Aᵀ(t − A 1)

    They are folded into the columns of the output projection. Where no stream is known, t is the dense sublayer's
    output. As in the paper, when a group's factors leave ±``limit`` they are dropped and tuning stops: that group and
    all behind it keep factors of 1. So do groups that end in a convolution.

    Where we differ: the paper runs LSMR with a damp of 1, we solve its normal equations; its code adds a constant
    column to A for heads, leaves out the first attention, and lets only the first token count in a classifier's last
    FFN. We do none of these.

    Args:
        structure: of the dense network, without widths of heads.
        damp: in units of the residual stream.

    Returns:
        group name -> factors ``(units kept,)``, float64, of the groups that were changed.
    """
    factors: dict[str, Tensor] = {}
    done: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, {}) for _ in batches]
    began = stopped = False
    for layer, block in enumerate(structure.blocks):
        for group in (g for g in structure.groups if g.layer == layer):
            kept = len(plan.units(group))
            began = began or kept < group.units
            if stopped or not began or not kept or not ends_linear(network.module, group):
                continue
            found = _factors(network, pruned, structure, group, batches, done, damp)
            stopped = bool(found.abs().max() > limit) or not bool(found.isfinite().all())
            if not stopped:
                weight = pruned.get_parameter(f"{group.output}.weight")
                weight.mul_(found.repeat_interleave(group.width).to(weight))
                factors[group.name] = found.cpu()
        for batch, outputs in zip(batches, done, strict=True):
            for module, earlier in zip((network.module, pruned), outputs, strict=True):
                with replay_blocks(module, earlier):
                    output = forward_until(module, batch, block)
                    keep_shapes_only(earlier)
                    earlier[block] = output
    return factors


def _factors(
    network: Network,
    pruned: nn.Module,
    structure: Structure,
    group: Group,
    batches: Sequence[Batch],
    done: Sequence[tuple[dict[str, Any], dict[str, Any]]],
    damp: float,
) -> Tensor:
    """Solve for one group: AᵀA is the Gram matrix of activations times, entry by entry, that of weights, summed over
    the features of each unit."""
    gram, cross, weight = sublayer_moments(network, pruned, structure, group, batches, done)
    units = len(gram) // group.width
    normal = (gram * (weight.T @ weight)).reshape(units, group.width, units, group.width).sum((1, 3))
    right = (cross * weight.T).sum(1).reshape(units, group.width).sum(1)
    penalty = damp**2 * torch.eye(units, dtype=normal.dtype, device=normal.device)
    return 1 + torch.linalg.solve(normal + penalty, right - normal.sum(1))


@torch.no_grad()
def sublayer_moments(
    network: Network,
    pruned: nn.Module,
    structure: Structure,
    group: Group,
    batches: Sequence[Batch],
    done: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """What least squares on one sublayer needs: ``XᵀX``, ``XᵀT`` and V, all float64, summed over the valid tokens.

    X ``(tokens, features)`` are the activations that enter the group's output projection in ``pruned``; V
    ``(outputs, features)`` are its weights there times LayerScale; T ``(tokens, outputs)`` is what X Vᵀ should be for
    the residual stream to be the dense network's behind the sublayer, bias aside (the dense sublayer's output where
    the structure names no module whose input is the stream). The group must end in a linear projection and have a unit
    left.

    Args:
        done: for each batch the outputs of the blocks before the group's, of the dense and of the pruned network;
            without them the networks run from their inputs.
    """
    projection = pruned.get_submodule(group.output)
    assert isinstance(projection, nn.Linear)
    block = structure.blocks[group.layer]
    residual = (group.stream.residual,) if group.stream.residual else ()
    scale = pruned.get_parameter(group.stream.scale).double().reshape(-1) if group.stream.scale else 1.0
    weight = projection.weight.double().T.mul(scale).T
    bias = projection.bias.double() * scale if projection.bias is not None else 0.0
    gram, cross = weight.new_zeros(2 * weight.shape[1:]), weight.new_zeros(weight.shape[::-1])
    for batch, (dense_done, pruned_done) in zip(batches, done or [({}, {})] * len(batches), strict=True):
        with (
            replay_blocks(network.module, dense_done),
            record_inputs(network.module, residual) as streams,
            record_outputs(network.module, (group.output,)) as outputs,
        ):
            forward_until(network.module, batch, block)
        with replay_blocks(pruned, pruned_done), record_inputs(pruned, (*residual, group.output)) as seen:
            forward_until(pruned, batch, block)
        target = outputs[group.output].double() * scale - bias
        for name in residual:
            target = target + (streams[name].double() - seen[name].double())
        valid = network.valid_tokens(batch)
        x, target = valid_rows(seen[group.output].double(), valid), valid_rows(target, valid)
        gram += x.T @ x
        cross += x.T @ target
    return gram, cross, weight


def ends_linear(module: nn.Module, group: Group) -> bool:
    """Whether a linear projection stands behind the units of ``group``."""
    return isinstance(module.get_submodule(group.output), nn.Linear)
