"""The trajectory loss on one calibration batch, and random probes of it.

The manifold part is Σ_l w_l ‖G(F_l) − G(F̃_l)‖²_F (Khaki & Plataniotis, ICLR 2024). F_l are the token features after
block l, G(F) is the Gram matrix of the L2-normalised features of a fixed sample of tokens, and w is 1, or 0.5 for the
last block. Single convolutions in a row count as blocks only if the network has no others.

The task part is a sum over the network's outputs. For a task head (see ``nn.task_head``) it sums over samples, tokens
or pixels:

- class logits: T² KL(p ‖ p̃), with p the softmax at temperature T;
- logits that are each a yes or no: the same with p the sigmoid of every number, a Bernoulli distribution;
- plain numbers: (y − ỹ)². They may be near 0, so factors set their unit (`criteria.trajectory.task_factors`).

For any other output (a map, an embedding, boxes) it is Σ ‖y − ỹ‖² / ‖y‖² over samples.

To second order each part is a quadratic form of the change. Let E be a random sign matrix of the shape of a Gram
matrix. The squared derivative of ⟨E, G⟩ is an unbiased estimate of the manifold part. The Hessian of KL is the Fisher
information of the softmax, diag(p) − ppᵀ, or of the sigmoids, p(1 − p). Its root times random signs is a probe.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import overload

import torch
import torch.nn.functional as F
from torch import Tensor

from optin_deploy.distributed.ranks import shared_like
from optin_deploy.network import Network
from optin_deploy.nn.batches import PyTree
from optin_deploy.nn.calls import first_tensor
from optin_deploy.nn.freezing import freeze_parameters
from optin_deploy.nn.partial_forward import record_outputs, replay_blocks
from optin_deploy.nn.task_head import HeadKind, class_axis
from optin_deploy.structure.groups import Structure, channels_last

TEMPERATURE = 4.0
GRAM_TOKENS = 768
LAST_BLOCK_WEIGHT = 0.5
# The square of a smaller probability vanishes in float32.
_SATURATED = 1e-30

Batch = Mapping[str, Tensor]


def gram(features: Tensor, tokens: Tensor, copies: int = 1) -> Tensor:
    """Return the Gram matrices ``(copies, K, K)`` of the normalised features of K tokens.

    Args:
        features: ``(copies * batch, …, width)``.
        tokens: ``(K,)`` indices into one copy's tokens, flattened over batch and positions.
    """
    normalised = directions(features, tokens, copies)
    return normalised @ normalised.transpose(-1, -2)


def directions(features: Tensor, tokens: Tensor, copies: int = 1) -> Tensor:
    """Return the normalised features ``(copies, K, width)`` of K tokens; arguments as for `gram`."""
    return F.normalize(features.reshape(copies, -1, features.shape[-1])[:, tokens], dim=-1)


def sample_tokens(count: int, valid: Tensor | None, seed: int) -> Tensor:
    """Return the indices of at most 768 of ``count`` tokens, without padding; equal arguments give equal indices."""
    usable = torch.arange(count)
    if valid is not None and valid.numel() == count:
        usable = usable[valid.flatten().cpu()]
    generator = torch.Generator().manual_seed(seed)
    return usable[torch.randperm(len(usable), generator=generator)[:GRAM_TOKENS]].sort().values


def signs(like: Tensor, generator: torch.Generator) -> Tensor:
    """Return random signs of the shape of ``like``."""
    bits = torch.randint(0, 2, like.shape, generator=generator, device=like.device, dtype=torch.int8)
    return bits.to(like.dtype).mul_(2).sub_(1)


class Trajectory:
    """A calibration batch, its sample of tokens, and the weights of blocks and outputs in comparisons."""

    def __init__(self, network: Network, structure: Structure, inputs: Batch, seed: int) -> None:
        self.network, self.structure, self.inputs, self.seed = network, structure, inputs, seed
        self.valid = network.valid_tokens(inputs)
        self.size = next(iter(inputs.values())).shape[0]

    def run(
        self, copies: int = 1, outputs: Mapping[str, PyTree] | None = None
    ) -> tuple[dict[str, PyTree], dict[str, Tensor]]:
        """Return the outputs of the blocks and of the network for stacked copies of the batch.

        Blocks in ``outputs`` are skipped.
        """
        module, blocks = self.network.module, self.structure.blocks
        given = {n: t.repeat(copies, *[1] * (t.dim() - 1)) for n, t in self.inputs.items()}
        ran = tuple(b for b in blocks if b not in (outputs or {}))
        with record_outputs(module, ran) as seen, replay_blocks(module, outputs or {}):
            task = self.network.forward(given)
        return seen, {name: y for name, y in task.items() if y.is_floating_point()}

    def grams(self, outputs: Mapping[str, PyTree], copies: int = 1) -> dict[str, Tensor]:
        """Return the Gram matrix of every compared block's output, times the root of the block's weight."""
        return {block: self.gram(block, output, copies) for block, output in self.compared(outputs).items()}

    def compared(self, outputs: Mapping[str, PyTree]) -> dict[str, PyTree]:
        """Return the ``outputs`` of the blocks that are compared."""
        compared = self.structure.compared
        return {block: output for block, output in outputs.items() if block in compared}

    def gram(self, block: str, output: PyTree, copies: int = 1) -> Tensor:
        """Return the Gram matrices ``(copies, K, K)`` of one block's output, times the root of its weight."""
        features, tokens = self.tokens(block, output, copies)
        return self.weight(block) ** 0.5 * gram(features, tokens, copies)

    def weight(self, block: str) -> float:
        """Return the weight of a block's Gram matrix."""
        return LAST_BLOCK_WEIGHT if block == self.structure.compared[-1] else 1.0

    def tokens(self, block: str, output: PyTree, copies: int = 1) -> tuple[Tensor, Tensor]:
        """Return a block's output with features last, and the indices ``(K,)`` of one copy's sampled tokens."""
        found = first_tensor(output)
        assert found is not None
        features = channels_last(found, self.structure.feature_axis(block))
        count = features.shape[:-1].numel() // copies
        return features, sample_tokens(count, self.valid, self.seed).to(features.device)

    def padded(self, output: Tensor) -> bool:
        """Return whether ``output`` is ``(batch, tokens, features)``, so that it has rows of padding."""
        return self.valid is not None and output.dim() == 3 and output.shape[:2] == self.valid.shape

    def counted(self, output: Tensor) -> Tensor:
        """Return a factor of the output that is 0 at padding and 1 elsewhere."""
        if self.valid is None or not self.padded(output):
            return output.new_ones((1,) * output.dim())
        return self.valid.to(output.dtype)[:, :, None]

    def task_probe(self, name: str, output: Tensor, generator: torch.Generator) -> Tensor:
        """Return a random v, shaped like the output; E[⟨v, δ⟩²] is the output's task term for a small change δ."""
        with torch.no_grad():
            rows = output[self.valid] if self.valid is not None and self.padded(output) else output
            probe = self._head_probe(name, rows, generator)
            if self.valid is not None and self.padded(output):
                # Padding gets no draws, so that its length does not change the others.
                probe = torch.zeros_like(output).masked_scatter(self.valid[:, :, None], probe)
            return probe / self.norm(output) if self.head(name) is None else probe

    def head(self, name: str) -> HeadKind | None:
        """Return the kind of an output if it is that of the task head."""
        return self.network.head if name == self.network.logits else None

    def _head_probe(self, name: str, rows: Tensor, generator: torch.Generator) -> Tensor:
        if self.head(name) == "classes":
            return softmax_probe(rows, generator)
        if self.head(name) == "binary":
            return sigmoid_root(rows) * signs(rows, generator)
        return signs(rows, generator)

    def task_root(self, name: str, dense: Tensor, change: Tensor) -> Tensor:
        """Return a tensor ``(copies, *output's shape)`` whose squares sum to the task term of a small change.

        Args:
            change: of stacked copies of the batch, ``(copies * batch, …)``.
        """
        given = change.reshape(-1, *dense.shape)
        if self.head(name) == "binary":
            return self.counted(dense) * sigmoid_root(dense) * given
        if self.head(name) == "regression":
            return self.counted(dense) * given
        if self.head(name) == "classes":
            axis = class_axis(dense)
            p = torch.softmax(dense / TEMPERATURE, dim=axis)
            mean = (p * given).sum(axis + 1 if axis >= 0 else axis, keepdim=True)
            return self.counted(dense) * (p / 2).sqrt() * (given - mean)
        return given * self.counted(dense) / self.norm(dense)

    def norm(self, output: Tensor) -> Tensor:
        """Return the norm of each sample's output without padding: ``(batch, 1, …)``, above 0."""
        norm = (output * self.counted(output)).reshape(len(output), -1).norm(dim=1).clamp_min(1e-12)
        return norm.reshape(-1, *[1] * (output.dim() - 1))

    def task_change(self, name: str, dense: Tensor, changed: Tensor, copies: int) -> Tensor:
        """Return the output's task term for each of the stacked ``copies``: float64 ``(copies,)`` on the CPU."""
        # In float64, since the terms cancel: in float32 only noise would be left of a small change.
        y, moved = dense.double(), changed.double().reshape(copies, *dense.shape)
        counted = self.counted(dense).double()
        if self.head(name) == "binary":
            return TEMPERATURE**2 * (counted * bernoulli_divergence(y, moved)).reshape(copies, -1).sum(1).cpu()
        if self.head(name) == "regression":
            return ((moved - y) * counted).square().reshape(copies, -1).sum(1).cpu()
        if self.head(name) == "classes":
            axis = class_axis(y)
            log_p = torch.log_softmax(y / TEMPERATURE, dim=axis)
            log_q = torch.log_softmax(moved / TEMPERATURE, dim=axis + 1 if axis >= 0 else axis)
            return TEMPERATURE**2 * (counted * log_p.exp() * (log_p - log_q)).flatten(1).sum(1).cpu()
        relative = (moved - y) * counted / self.norm(y)
        return relative.square().reshape(copies, -1).sum(1).cpu()


def softmax_probe(logits: Tensor, generator: torch.Generator) -> Tensor:
    """Return v with E[v vᵀ] = ½ (diag(p) − p pᵀ). T² KL of a change δ of the logits is E[(v·δ)²], to second order."""
    axis = class_axis(logits)
    p = torch.softmax(logits.detach() / TEMPERATURE, dim=axis)
    noise = p.sqrt() * signs(p, generator)
    return (noise - p * noise.sum(axis, keepdim=True)) / 2**0.5


def sigmoid_root(logits: Tensor) -> Tensor:
    """Return r such that T² KL of Bernoulli distributions is (r · δ)² for a change δ, to second order."""
    scaled = logits.detach() / TEMPERATURE
    # 1 − p is computed by itself: a p near 1 has no digits left for it.
    return (torch.sigmoid(scaled) * torch.sigmoid(-scaled) / 2).sqrt()


@torch.no_grad()
def is_saturated(network: Network, batches: Sequence[Batch]) -> bool:
    """Return whether small changes of the logits change no probability of any sample in ``batches``.

    Then all probabilities are close to 0 or 1. It stops at the first sample for which this is not so.
    """
    if network.logits is None or network.head == "regression":
        return False
    for batch in batches:
        for size in (2, None):
            logits = network.forward({name: t[:size] for name, t in batch.items()})[network.logits].float()
            if bool((_spread(network.head, logits) > _SATURATED).any()):
                return False
    return True


def _spread(head: HeadKind, logits: Tensor) -> Tensor:
    """What the divergence of a small change is in proportion to, at temperature T."""
    if head == "binary":
        return sigmoid_root(logits).square()
    axis = class_axis(logits)
    top = (logits / TEMPERATURE).topk(2, dim=axis).values
    return (top.select(axis, 1) - top.select(axis, 0)).exp()


def bernoulli_divergence(dense: Tensor, changed: Tensor) -> Tensor:
    """Return the KL of every logit's Bernoulli distribution at temperature T, elementwise."""
    y, moved = dense / TEMPERATURE, changed / TEMPERATURE
    yes = y.sigmoid() * (F.logsigmoid(y) - F.logsigmoid(moved))
    return yes + (-y).sigmoid() * (F.logsigmoid(-y) - F.logsigmoid(-moved))


@dataclass(frozen=True)
class LossSettings:
    """Weights of the parts of the trajectory loss, and the seed of what is drawn for it.

    Attributes:
        factors: weights of the task terms by output name; an output without a name here does not count.
        manifold: weight of the manifold part.
        seed: of the sampled tokens and of the probes.
    """

    factors: Mapping[str, float] = field(default_factory=dict)
    manifold: float = 1.0
    seed: int = 0


def probe_losses(
    trajectory: Trajectory,
    grams: Mapping[str, Tensor],
    outputs: Mapping[str, Tensor],
    settings: LossSettings,
    generator: torch.Generator,
) -> Tensor:
    """Return a random scalar whose squared derivative for a change has the change's loss as its mean, to second order.

    Args:
        grams, outputs: of the run whose graph is kept, see `Trajectory`.
    """
    parts = []
    if settings.manifold:
        parts.append(
            settings.manifold**0.5 * torch.stack([torch.sum(signs(g, generator) * g) for g in grams.values()]).sum()
        )
    for name, factor in settings.factors.items():
        if factor:
            probe = trajectory.task_probe(name, outputs[name], generator)
            parts.append(factor**0.5 * torch.sum(probe * outputs[name]))
    return torch.stack(parts).sum() if parts else torch.zeros(())


def gradients(loss: Tensor, leaves: Sequence[Tensor], *, keep: bool) -> tuple[Tensor, ...]:
    """Return the derivatives of a probe, 0 for independent leaves; ``keep`` retains the graph for the next probe."""
    if not loss.requires_grad:
        return tuple(torch.zeros_like(leaf) for leaf in leaves)
    return torch.autograd.grad(loss, leaves, retain_graph=keep, materialize_grads=True)


@contextmanager
def differentiable(network: Network) -> Iterator[None]:
    """Compute gradients of activations, but of no parameter, while the context lasts."""
    with freeze_parameters(network.module), torch.enable_grad():
        yield


def chunks(batches: Sequence[Batch], samples: int) -> Sequence[Batch]:
    """Return the batches cut into pieces of at most ``samples``.

    A backward pass keeps the activations of all layers, so it takes less than a batch. Processes that share the batches
    share the pieces.
    """
    sizes = (next(iter(batch.values())).shape[0] for batch in batches)
    places = [(index, start) for index, size in enumerate(sizes) for start in range(0, size, samples)]
    return shared_like(batches, _Pieces(batches, places, samples))


@dataclass(frozen=True)
class _Pieces(Sequence[Batch]):
    """Pieces of batches, cut out on access; ``places`` are pairs of batch and first sample."""

    batches: Sequence[Batch]
    places: Sequence[tuple[int, int]]
    samples: int

    def __len__(self) -> int:
        return len(self.places)

    @overload
    def __getitem__(self, index: int) -> Batch: ...

    @overload
    def __getitem__(self, index: slice) -> "_Pieces": ...

    def __getitem__(self, index: int | slice) -> "Batch | _Pieces":
        if isinstance(index, slice):
            return replace(self, places=self.places[index])
        batch, start = self.places[index]
        return {name: t[start : start + self.samples] for name, t in self.batches[batch].items()}
