"""Agreement of the dense and the pruned network on unlabelled inputs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy.network import Network
from optin_deploy.pictures import is_map
from optin_deploy.sentences import EMBEDDING
from optin_deploy.task_head import class_axis


@dataclass(frozen=True)
class Agreement:
    """How near one output of the pruned network is to the dense one's, on inputs it was not repaired with.

    ``cosine`` is the mean over samples of the cosine between the flattened outputs, ``relative_error`` the norm of the
    difference over that of the dense output, ``top1_agreement`` the part of equal arg-max (logits only; of pixels, for
    class maps), ``correlation`` the mean over samples of Pearson's over pixels (maps of one value only).
    """

    output: str
    cosine: float
    relative_error: float
    top1_agreement: float | None
    samples: int
    correlation: float | None = None


@torch.no_grad()
def agreement(network: Network, pruned: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> tuple[Agreement, ...]:
    """`Agreement` of every output; padding tokens are left out."""
    sums: dict[str, list[float]] = {name: [0.0, 0.0, 0.0, 0.0] for name in network.outputs}
    correlations: dict[str, float] = {}
    samples = 0
    for batch in batches:
        dense, small = network.forward(batch), network.forward(batch, pruned)
        samples += len(next(iter(dense.values())))
        for name, y in dense.items():
            weight = _weights(network, name, y, batch)
            places = weight.reshape(*weight.shape, *[1] * (y.dim() - weight.dim()))
            a, b = ((t * places).reshape(len(t), -1).double() for t in (y, small[name]))
            sums[name][0] += float(F.cosine_similarity(a, b, dim=1).sum())
            sums[name][1] += float((a - b).square().sum())
            sums[name][2] += float(a.square().sum())
            if name == network.logits:
                axis = class_axis(y)
                equal = (y.argmax(axis) == small[name].argmax(axis)).reshape(len(y), -1)
                share = (equal * places.reshape(len(y), -1)).sum(1) / places.reshape(len(y), -1).expand_as(equal).sum(1)
                sums[name][3] += float(share.sum())
            elif is_map(network, name, y):
                correlations[name] = correlations.get(name, 0.0) + float(correlation(y, small[name]).sum())
    return tuple(
        Agreement(
            output=name,
            cosine=cosine / samples,
            relative_error=(error / max(norm, 1e-300)) ** 0.5,
            top1_agreement=equal / samples if name == network.logits else None,
            samples=samples,
            correlation=correlations[name] / samples if name in correlations else None,
        )
        for name, (cosine, error, norm, equal) in sums.items()
    )


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
