"""Batch-norm statistics of a network whose weights have changed, from calibration batches."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.errors import UserError

Batch = Mapping[str, Tensor]


@dataclass
class _Pool:
    """Mean and summed squared deviation per channel of all values seen, in float64."""

    count: int
    mean: Tensor
    deviation: Tensor

    def add(self, x: Tensor) -> None:
        """Add a map ``(batch, channels, height, width)``."""
        rows = x.transpose(0, 1).flatten(1).double()
        count, mean = rows.shape[1], rows.mean(1)
        total, difference = self.count + count, mean - self.mean
        self.deviation += (rows - mean[:, None]).square().sum(1) + difference.square() * (self.count * count / total)
        self.mean += difference * (count / total)
        self.count = total


@torch.no_grad()
def reestimate(
    module: nn.Module,
    batches: Iterable[Batch],
    forward: Callable[[nn.Module, Batch], Any] = lambda module, batch: module(**batch),
) -> None:
    """Set the running mean and variance of every BatchNorm2d of ``module`` to those over all batches, in place.

    One pass over the batches. While it lasts, each batch norm normalises by the statistics of the batch, as in
    training, so that the norms behind it see what they would see with all statistics exact; the larger the batches, the
    nearer. What each norm is given is pooled over all batches, every value alike, and the variance is unbiased, as
    torch has it. A norm that does not run, or keeps no statistics, stays as it is; so does everything else, also the
    training flags and the number of batches tracked. No more than one batch of activations is held.

    Args:
        forward: runs the module on one batch.

    Raises:
        UserError: a norm is given a single value per channel, which has no variance.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.BatchNorm2d) and m.running_mean is not None]
    pools: dict[nn.BatchNorm2d, _Pool] = {}

    def collect(norm: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(norm, nn.BatchNorm2d)
        x = args[0]
        if x.numel() == x.shape[1]:
            raise UserError("a batch norm has one value per channel in a batch: give more samples per batch")
        if norm not in pools:
            zeros = torch.zeros(norm.num_features, dtype=torch.float64, device=x.device)
            pools[norm] = _Pool(0, zeros, zeros.clone())
        pools[norm].add(x)

    before = {norm: (norm.training, {n: b.clone() for n, b in norm.named_buffers()}) for norm in norms}
    handles = [norm.register_forward_pre_hook(collect) for norm in norms]
    try:
        for norm in norms:
            norm.training = True
        for batch in batches:
            forward(module, batch)
    finally:
        for handle in handles:
            handle.remove()
        for norm, (training, buffers) in before.items():
            norm.training = training
            for name, value in buffers.items():
                norm.get_buffer(name).copy_(value)
    for norm, pool in pools.items():
        norm.get_buffer("running_mean").copy_(pool.mean)
        norm.get_buffer("running_var").copy_(pool.deviation / (pool.count - 1))
