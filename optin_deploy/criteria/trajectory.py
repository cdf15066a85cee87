"""OPTIN's trajectory loss (Khaki & Plataniotis, ICLR 2024), by sketch or exactly.

The score of a unit is how far the network's trajectory moves when the unit is masked:

    manifold  Σ_l' w_l' ‖G(F_l') − G(F̃_l')‖²_F        task  T² Σ KL(p ‖ p̃)

F_l' are the token features that block l' gives, for the unit's own block and all behind it; G(F) is the Gram matrix of
the L2-normalised features of a fixed sample of tokens; w is 1, and 0.5 for the last block; p is the softmax of the
logits at temperature T. A network without logits (a backbone, an embedding model) is used for its features, so there
the task part is w_L ‖G(F_L) − G(F̃_L)‖²_F of the last block L. A score is manifold + factor · task, summed over batches;
`task_factor` finds the factor that brings both parts to the same order of magnitude.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from optin_deploy.masking import frozen, masked
from optin_deploy.network import Network
from optin_deploy.replay import recorded_outputs, resumed
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.residual import first_tensor

TEMPERATURE = 4.0
GRAM_TOKENS = 768
LAST_BLOCK_WEIGHT = 0.5
# The exact scorer stacks copies of a batch, one mask each, up to about this many tokens.
_STACKED_TOKENS = 16_384
_FACTOR_PROBES = 3

Batch = Mapping[str, Tensor]
Advance = Callable[[int], None]


def gram(features: Tensor, tokens: Tensor, copies: int = 1) -> Tensor:
    """Gram matrices ``(copies, K, K)`` of the normalised features of K tokens.

    Args:
        features: ``(copies * batch, …, width)``.
        tokens: ``(K,)`` indices into one copy's tokens, flattened over batch and positions.
    """
    sampled = features.reshape(copies, -1, features.shape[-1])[:, tokens]
    normalised = F.normalize(sampled, dim=-1)
    return normalised @ normalised.transpose(-1, -2)


def sample_tokens(count: int, valid: Tensor | None, seed: int) -> Tensor:
    """Indices of at most 768 tokens out of ``count``, padding left out; the same for the same arguments."""
    usable = torch.arange(count)
    if valid is not None and valid.numel() == count:
        usable = usable[valid.flatten().cpu()]
    generator = torch.Generator().manual_seed(seed)
    return usable[torch.randperm(len(usable), generator=generator)[:GRAM_TOKENS]].sort().values


class _Batch:
    """One calibration batch with what comparisons on it need: its token sample, and how blocks are weighted."""

    def __init__(self, network: Network, structure: Structure, inputs: Batch, seed: int) -> None:
        self.network, self.structure, self.inputs, self.seed = network, structure, inputs, seed
        self.valid = network.valid_tokens(inputs)
        self.size = next(iter(inputs.values())).shape[0]

    def run(self, copies: int = 1, outputs: Mapping[str, Any] | None = None) -> tuple[dict[str, Any], Tensor | None]:
        """Outputs of the blocks, and the logits, for stacked copies of the batch; blocks in ``outputs`` are skipped."""
        module, blocks = self.network.module, self.structure.blocks
        given = {n: t.repeat(copies, *[1] * (t.dim() - 1)) for n, t in self.inputs.items()}
        ran = tuple(b for b in blocks if b not in (outputs or {}))
        with recorded_outputs(module, ran) as seen, resumed(module, outputs or {}):
            logits = self.network.forward(given).get(self.network.logits or "")
        return seen, logits

    def grams(self, outputs: Mapping[str, Any], copies: int = 1) -> dict[str, Tensor]:
        """Gram matrix of every block's output, times the root of the block's weight."""
        return {block: self.gram(block, output, copies) for block, output in outputs.items()}

    def gram(self, block: str, output: Any, copies: int = 1) -> Tensor:
        """Gram matrices ``(copies, K, K)`` of one block's output, times the root of its weight."""
        features = first_tensor(output)
        assert features is not None
        count = features.shape[:-1].numel() // copies
        tokens = sample_tokens(count, self.valid, self.seed).to(features.device)
        weight = LAST_BLOCK_WEIGHT if block == self.structure.blocks[-1] else 1.0
        return weight**0.5 * gram(features, tokens, copies)


def sketch_scores(
    network: Network,
    structure: Structure,
    batches: Sequence[Batch],
    *,
    probes: int,
    weights: tuple[float, float],
    seed: int,
    advance: Advance = lambda _: None,
) -> dict[str, Tensor]:
    """Scores of all units at once, to second order: group name -> float64 ``(units,)``.

    With E a random sign matrix shaped like a Gram matrix, the squared derivative of ⟨E, G⟩ for a unit's mask is an
    unbiased estimate of the second-order change of G when the unit is masked; one backward pass gives it for every
    unit of every block. The task part has the same form and joins the pass: KL is to second order a quadratic form in
    the logits with the Fisher information of the softmax, diag(p) − ppᵀ, whose root makes a probe of random signs.

    The square of a sum over samples is nearly all noise between samples. So the masks are per sample: the sum of the
    samples' squares, far less noisy, ranks the units of a group, and one factor per group, the ratio of both estimates
    summed over its units, brings in what the samples' changes have in common.

    Args:
        probes: random draws per batch; the error of a score falls with the root of probes times samples.
        weights: of the manifold and of the task part.
        advance: called with 1 after every probe.
    """
    device = next(network.module.parameters()).device
    joint = {g.name: torch.zeros(g.units, dtype=torch.float64, device=device) for g in structure.groups}
    single = {name: zeros.clone() for name, zeros in joint.items()}
    for index, inputs in enumerate(batches):
        batch = _Batch(network, structure, inputs, seed + index)
        generator = torch.Generator(device).manual_seed(seed + index)
        masks = [torch.ones(batch.size, g.units, device=device, requires_grad=True) for g in structure.groups]
        named = dict(zip(joint, masks, strict=True))
        with frozen(network.module), torch.enable_grad(), masked(network.module, structure, named):
            outputs, logits = batch.run()
            grams = batch.grams(outputs)
            last = grams[structure.blocks[-1]]
            for _ in range(probes):
                manifold = sum(torch.sum(_signs(g, generator) * g) for g in grams.values())
                probe = _signs(last, generator) if logits is None else _softmax_probe(logits, generator)
                task = torch.sum(probe * (last if logits is None else logits))
                loss = weights[0] ** 0.5 * manifold + weights[1] ** 0.5 * task
                gradients = torch.autograd.grad(loss, masks, retain_graph=True, materialize_grads=True)
                for name, gradient in zip(joint, gradients, strict=True):
                    joint[name] += gradient.double().sum(0).square() / probes
                    single[name] += gradient.double().square().sum(0) / probes
                advance(1)
    return {n: (s * (joint[n].sum() / s.sum().clamp_min(1e-300))).cpu() for n, s in single.items()}


def _signs(like: Tensor, generator: torch.Generator) -> Tensor:
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device, dtype=torch.int8)
    return bits.to(like.dtype).mul_(2).sub_(1)


def _softmax_probe(logits: Tensor, generator: torch.Generator) -> Tensor:
    """v with E[v vᵀ] = ½ (diag(p) − p pᵀ): T² KL to second order is then E[(v·δ)²], δ the change of the logits."""
    p = torch.softmax(logits.detach() / TEMPERATURE, dim=-1)
    noise = p.sqrt() * _signs(p, generator)
    return (noise - p * noise.sum(-1, keepdim=True)) / 2**0.5


def task_factor(network: Network, structure: Structure, batch: Batch, weight: float, seed: int) -> float:
    """What the task part is multiplied by, so that over all units it is ``weight`` times the manifold part."""
    manifold, task = (
        sum(
            float(t.sum())
            for t in sketch_scores(
                network, structure, [batch], probes=_FACTOR_PROBES, weights=weights, seed=seed
            ).values()
        )
        for weights in ((1.0, 0.0), (0.0, 1.0))
    )
    return weight * manifold / task if task else 0.0


@torch.no_grad()
def exact_scores(
    network: Network,
    structure: Structure,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    *,
    factor: float,
    seed: int,
    advance: Advance = lambda _: None,
    only: Mapping[str, Sequence[int]] | None = None,
) -> dict[str, Tensor]:
    """Scores of the units of ``groups`` by masking each one and running the network on from its block.

    Args:
        factor: of the task part, see `task_factor`.
        advance: called with the number of units done, ``units × batches`` in all.
        only: group name -> the units to score, where not all of the group are wanted; the others get 0.
    """
    scores = {g.name: torch.zeros(g.units, dtype=torch.float64) for g in groups}
    for index, inputs in enumerate(batches):
        batch = _Batch(network, structure, inputs, seed + index)
        outputs, logits = batch.run()
        dense = batch.grams(outputs)
        for group in groups:
            wanted = torch.tensor((only or {}).get(group.name, range(group.units)), dtype=torch.long)
            for units, manifold, task in _masked_runs(batch, group, wanted, outputs, dense, logits, advance):
                scores[group.name][units] += manifold + factor * task
    return scores


def _masked_runs(
    batch: _Batch,
    group: Group,
    wanted: Tensor,
    outputs: Mapping[str, Any],
    dense: Mapping[str, Tensor],
    logits: Tensor | None,
    advance: Advance,
) -> Any:
    """Yield ``(units, manifold change, task change)``, a stack of the units ``wanted`` at a time."""
    earlier = batch.structure.blocks[: group.layer]
    some = first_tensor(outputs[batch.structure.blocks[group.layer]])
    assert some is not None
    for units in wanted.split(max(1, _STACKED_TOKENS // max(1, some.shape[:-1].numel()))):
        copies = len(units)
        masks = 1 - F.one_hot(units.to(some.device), group.units).to(some.dtype)
        given = {b: _repeated(outputs[b], copies, batch.size) for b in earlier}
        with masked(batch.network.module, batch.structure, {group.name: masks}):
            later, changed = batch.run(copies, given)
        moved = {
            block: (batch.gram(block, output, copies) - dense[block]).square().sum((-1, -2)).double().cpu()
            for block, output in later.items()
        }
        last = moved[batch.structure.blocks[-1]]
        yield units, sum(moved.values()), last if logits is None else _divergence(logits, changed, copies)
        advance(copies)


def _repeated(output: Any, copies: int, batch: int) -> Any:
    if isinstance(output, Tensor) and output.dim() and output.shape[0] == batch:
        return output.repeat(copies, *[1] * (output.dim() - 1))
    if isinstance(output, tuple):
        return tuple(_repeated(o, copies, batch) for o in output)
    return output


def _divergence(logits: Tensor, changed: Any, copies: int) -> Tensor:
    """T² KL(p ‖ p̃) of each copy, summed over its samples."""
    # In float64: the terms cancel, and what is left of a small change in float32 is noise of either sign.
    log_p = torch.log_softmax(logits.double() / TEMPERATURE, dim=-1)
    log_q = torch.log_softmax(changed.double().reshape(copies, *logits.shape) / TEMPERATURE, dim=-1)
    return TEMPERATURE**2 * (log_p.exp() * (log_p - log_q)).flatten(1).sum(1).cpu()
