"""Statistics of batch norms, taken anew."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from optin_deploy.distributed import ranks_of

Batches = Sequence[Mapping[str, Tensor]]


@torch.no_grad()
def reestimate(module: nn.Module, batches: Batches) -> None:
    """Give every batch norm of ``module`` the mean and variance of what reaches it on ``batches``, in place.

    Units that are gone without repair leave the maps behind them with other means and variances than the batch norms
    there have seen. All batches count alike; nothing is done without batches.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms or not batches:
        return
    if ranks_of(batches).main:
        _run(module, norms, batches)
    for norm in norms:
        for buffer in norm.buffers(recurse=False):
            buffer.copy_(ranks_of(batches).given(buffer.clone, buffer))


def _run(module: nn.Module, norms: Sequence[nn.modules.batchnorm._BatchNorm], batches: Batches) -> None:
    momenta = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.reset_running_stats()
            # The mean over all batches, in place of one that forgets.
            norm.momentum = None
            norm.train()
        for batch in batches:
            module(**batch)
    finally:
        for norm, momentum in zip(norms, momenta, strict=True):
            norm.momentum = momentum
            norm.eval()
