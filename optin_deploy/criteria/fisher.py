"""The Fisher criterion: Fisher information of the masks, from labels.

Mask search of Kwon et al., "A Fast Post-Training Pruning Framework for Transformers" (NeurIPS 2022, arXiv 2204.09656),
written from the paper. Let g_s be the gradient of sample s's cross entropy with respect to the masks of a group, all of
them one. The empirical Fisher information of the group is I = (1/S) Σ_s g_s g_sᵀ, and masks m cost about
½ (1 − m)ᵀ I (1 − m). The scores are the diagonal of I. Binary logits (``task_head``) use the cross entropy of the
sigmoids. Unlike the paper's code, gradients are per sample, not per mini-batch.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy.criteria.scoring import ScoringInputs
from optin_deploy.distributed.ranks import own_indices, ranks_of
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.nn.freezing import freeze_parameters
from optin_deploy.nn.task_head import is_single
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.masking import mask_units
from optin_deploy.utils.progress import track

# Label of positions that do not count, as in torch and transformers.
IGNORED = -100

Batch = Mapping[str, Tensor]


def score_fisher(inputs: ScoringInputs) -> dict[str, Tensor]:
    """Return `fisher_scores` of all batches, those of other processes too."""
    gradients = mask_gradients(inputs.network, inputs.structure, inputs.batches, inputs.labels)
    sums = {name: len(gradients[name]) * score for name, score in fisher_scores(gradients).items()}
    samples = sum(len(next(iter(batch.values()))) for batch in inputs.batches)
    return {name: total / samples for name, total in ranks_of(inputs.batches).all_reduce(sums).items()}


def mask_gradients(
    network: Network,
    structure: Structure,
    batches: Sequence[Batch],
    labels: Sequence[Tensor],
) -> dict[str, Tensor]:
    """Return the gradient of each sample's cross entropy for every unit's mask.

    A sample's cross entropy is the mean over its labelled positions. Processes that share the batches get the gradients
    of their own ones.

    Args:
        labels: int64 classes of each batch, ``(batch,)``, or ``(batch, tokens)`` (any number of axes) if the network
            returns logits for every position; positions with -100 do not count. For logits that are a yes or no each,
            1 or 0 for each of them; the axis of a single logit may be left out.

    Returns:
        group name -> float64 ``(samples, units)`` on the CPU.

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
    """Raise UserError if the network has no class logits."""
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
    """Return the gradient of a loss for every unit's mask and sample: group name -> float64 ``(batch, units)``, CPU.

    Every sample has its own masks, so one backward pass of the sum computes all gradients.

    Args:
        loss: from the logits to the sum of the samples' losses.
        module: used instead of the network's; it must have all units of ``structure``.
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
    """Return the sum of the samples' cross entropies; classes are on the last axis, in maps on the second."""
    if logits.shape[:-1] != labels.shape and logits.movedim(1, -1).shape[:-1] == labels.shape:
        logits = logits.movedim(1, -1)
    if logits.shape[:-1] != labels.shape:
        raise UserError(f"labels of shape {tuple(labels.shape)} do not fit logits of shape {tuple(logits.shape)}")
    labels = labels.to(logits.device)
    each = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORED, reduction="none")
    counted = (labels != IGNORED).reshape(len(labels), -1).sum(1).clamp_min(1)
    return (each.reshape(len(labels), -1).sum(1) / counted).sum()


def _binary_cross_entropy(labels: Tensor, logits: Tensor) -> Tensor:
    """Return the sum of the samples' cross entropies, each the mean over its labelled logits."""
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
    """Return the diagonal of the Fisher information, (1/S) Σ_s g_s²: group name -> float64 ``(units,)``.

    Args:
        gradients: from `mask_gradients`.
    """
    return {name: gradient.square().mean(0) for name, gradient in gradients.items()}
