"""Agreement of the dense and the pruned network on unlabelled inputs."""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy.evaluation.example_images import is_map
from optin_deploy.evaluation.metrics import pearson, spearman
from optin_deploy.evaluation.results import Agreement
from optin_deploy.network import Network
from optin_deploy.nn.batches import Batch, Batches, batch_size
from optin_deploy.nn.sentence_embeddings import EMBEDDING
from optin_deploy.nn.task_head import HeadKind, answers


@dataclass
class _Sums:
    """Sums over samples of one output; ``values`` are the numbers of each sample, dense and pruned, for ranks."""

    output: str
    head: HeadKind | None
    cosine: float = 0.0
    error: float = 0.0
    norm: float = 0.0
    equal: float = 0.0
    correlation: float | None = None
    values: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def add(self, network: Network, batch: Batch, dense: Tensor, pruned: Tensor) -> None:
        weight = _weights(network, self.output, dense, batch)
        mask = weight.reshape(*weight.shape, *[1] * (dense.dim() - weight.dim()))
        a, b = ((tensor * mask).reshape(len(tensor), -1).double() for tensor in (dense, pruned))
        self.cosine += float(F.cosine_similarity(a, b, dim=1).sum())
        self.error += float((a - b).square().sum())
        self.norm += float(a.square().sum())
        if self.head in ("classes", "binary"):
            equal = (answers(self.head, dense) == answers(self.head, pruned)).reshape(len(dense), -1)
            counted = mask.expand_as(dense) if self.head == "binary" else mask
            counted = counted.reshape(len(dense), -1).expand_as(equal)
            self.equal += float(((equal * counted).sum(1) / counted.sum(1)).sum())
        if is_map(network, self.output, dense) and dense.shape[1] == 1:
            self.correlation = (self.correlation or 0.0) + float(pearson(dense, pruned).sum())
        if a.shape[1] == 1 or (self.head == "regression" and dense.dim() == 2):
            self.values.append((a.cpu(), b.cpu()))

    def mean(self, samples: int) -> Agreement:
        cosine, ranks = self.cosine / samples, None
        if self.values:
            dense, pruned = (torch.cat(tensors) for tensors in zip(*self.values, strict=True))
            ranks = _rank_correlation(dense, pruned)
            if dense.shape[1] == 1:
                cosine = float(F.cosine_similarity(dense[:, 0], pruned[:, 0], dim=0))
        return Agreement(
            output=self.output,
            cosine=cosine,
            relative_error=(self.error / max(self.norm, 1e-300)) ** 0.5,
            top1_agreement=self.equal / samples if self.head == "classes" else None,
            samples=samples,
            correlation=None if self.correlation is None else self.correlation / samples,
            sign_agreement=self.equal / samples if self.head == "binary" else None,
            rank_correlation=ranks,
        )


@torch.no_grad()
def agreement(network: Network, pruned: nn.Module, batches: Batches) -> tuple[Agreement, ...]:
    """Return the `Agreement` of every output; padding tokens are ignored."""
    sums = [_Sums(name, network.head if name == network.logits else None) for name in network.outputs]
    for batch in batches:
        dense, small = network.forward(batch), network.forward(batch, pruned)
        for output in sums:
            output.add(network, batch, dense[output.output], small[output.output])
    samples = sum(map(batch_size, batches))
    return tuple(output.mean(samples) for output in sums)


def _rank_correlation(dense: Tensor, pruned: Tensor) -> float | None:
    """Return the mean over columns of Spearman's correlation; None if a column is constant."""
    correlations = torch.tensor([spearman(a, b) for a, b in zip(dense.T, pruned.T, strict=True)])
    return float(correlations.mean()) if len(dense) > 1 and bool(correlations.isfinite().all()) else None


def _weights(network: Network, name: str, output: Tensor, batch: Batch) -> Tensor:
    """Return 1 for values that count, 0 at padding: ``(batch, tokens)`` for an output per token, else ``(batch,)``."""
    valid = network.valid_tokens(batch)
    one_per_sample = name == EMBEDDING or (name == network.logits and output.dim() == 2)
    if valid is None or one_per_sample or output.shape[:2] != valid.shape:
        return output.new_ones(len(output))
    return valid.to(output.dtype)
