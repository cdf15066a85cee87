"""Correlations that are reported as metrics."""

import torch
import torch.nn.functional as F
from torch import Tensor


def spearman(a: Tensor, b: Tensor) -> float:
    """Return Spearman's rank correlation of two vectors; equal values share their mean rank."""
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Return Pearson's correlation over the pixels of two maps: ``(batch, 1, height, width)`` each -> ``(batch,)``.

    It is 0 where a map is constant.
    """
    a, b = (tensor.flatten(1).double() for tensor in (a, b))
    return F.cosine_similarity(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True), dim=1)
