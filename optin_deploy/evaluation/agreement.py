"""Agreement of the dense and the pruned network on unlabelled inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy.evaluation.example_images import is_map
from optin_deploy.evaluation.texts import spearman
from optin_deploy.network import Network
from optin_deploy.nn.sentence_embeddings import EMBEDDING
from optin_deploy.nn.task_head import answers


@dataclass(frozen=True)
class Agreement:
    """How near one output of the pruned network is to the dense one's, on inputs it was not repaired with.

    ``cosine`` is the mean over samples of the cosine between the flattened outputs; of one number for each sample it is
    that of all samples together. ``relative_error`` is the norm of the difference over that of the dense output. The
    others are told of what they mean something for: ``top1_agreement``, the part of equal arg-max, of logits that tell
    classes (of pixels, for class maps); ``sign_agreement``, the part of equal signs, of logits that are a yes or no
    each; ``rank_correlation``, Spearman's over samples, the mean over the numbers of a sample, of plain numbers and of
    a single logit for each sample; ``correlation``, the mean over samples of Pearson's over pixels, of maps of one
    value.
    """

    output: str
    cosine: float
    relative_error: float
    top1_agreement: float | None
    samples: int
    correlation: float | None = None
    sign_agreement: float | None = None
    rank_correlation: float | None = None


@dataclass
class _Sums:
    """Over samples, but for ``values``: one row of numbers for each sample, dense and pruned, where ranks count."""

    cosine: float = 0.0
    error: float = 0.0
    norm: float = 0.0
    equal: float = 0.0
    correlation: float | None = None
    values: list[tuple[Tensor, Tensor]] = field(default_factory=list)


@torch.no_grad()
def agreement(network: Network, pruned: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> tuple[Agreement, ...]:
    """`Agreement` of every output; padding tokens are left out."""
    sums = {name: _Sums() for name in network.outputs}
    samples = 0
    for batch in batches:
        dense, small = network.forward(batch), network.forward(batch, pruned)
        samples += len(next(iter(dense.values())))
        for name, y in dense.items():
            _add(sums[name], network, name, y, small[name], batch)
    return tuple(_agreement(network, name, found, samples) for name, found in sums.items())


def _add(found: _Sums, network: Network, name: str, y: Tensor, small: Tensor, batch: Mapping[str, Tensor]) -> None:
    weight = _weights(network, name, y, batch)
    places = weight.reshape(*weight.shape, *[1] * (y.dim() - weight.dim()))
    a, b = ((t * places).reshape(len(t), -1).double() for t in (y, small))
    found.cosine += float(F.cosine_similarity(a, b, dim=1).sum())
    found.error += float((a - b).square().sum())
    found.norm += float(a.square().sum())
    head = network.head if name == network.logits else None
    if head in ("classes", "binary"):
        equal = (answers(head, y) == answers(head, small)).reshape(len(y), -1)
        counted = places.expand_as(y) if head == "binary" else places
        counted = counted.reshape(len(y), -1).expand_as(equal)
        found.equal += float(((equal * counted).sum(1) / counted.sum(1)).sum())
    if is_map(network, name, y) and y.shape[1] == 1:
        found.correlation = (found.correlation or 0.0) + float(correlation(y, small).sum())
    if a.shape[1] == 1 or (head == "regression" and y.dim() == 2):
        found.values.append((a.cpu(), b.cpu()))


def _agreement(network: Network, name: str, found: _Sums, samples: int) -> Agreement:
    head = network.head if name == network.logits else None
    cosine, ranks = found.cosine / samples, None
    if found.values:
        dense, small = (torch.cat(each) for each in zip(*found.values, strict=True))
        ranks = _rank_correlation(dense, small)
        if dense.shape[1] == 1:
            cosine = float(F.cosine_similarity(dense[:, 0], small[:, 0], dim=0))
    return Agreement(
        output=name,
        cosine=cosine,
        relative_error=(found.error / max(found.norm, 1e-300)) ** 0.5,
        top1_agreement=found.equal / samples if head == "classes" else None,
        samples=samples,
        correlation=None if found.correlation is None else found.correlation / samples,
        sign_agreement=found.equal / samples if head == "binary" else None,
        rank_correlation=ranks,
    )


def _rank_correlation(dense: Tensor, pruned: Tensor) -> float | None:
    """The mean over columns of Spearman's correlation; None where one of them is constant."""
    each = torch.tensor([spearman(a, b) for a, b in zip(dense.T, pruned.T, strict=True)])
    return float(each.mean()) if len(dense) > 1 and bool(each.isfinite().all()) else None


def correlation(dense: Tensor, pruned: Tensor) -> Tensor:
    """Pearson's correlation of two maps over their pixels: ``(batch, 1, height, width)`` each -> ``(batch,)``.

    0 where one of the two is constant.
    """
    a, b = (t.flatten(1).double() for t in (dense, pruned))
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)


def _weights(network: Network, name: str, output: Tensor, batch: Mapping[str, Tensor]) -> Tensor:
    """1 where an output counts, 0 at padding: ``(batch, tokens)`` for an output per token, else ``(batch,)``."""
    valid = network.valid_tokens(batch)
    one_per_sample = name == EMBEDDING or (name == network.logits and output.dim() == 2)
    if valid is None or one_per_sample or output.shape[:2] != valid.shape:
        return output.new_ones(len(output))
    return valid.to(output.dtype)
