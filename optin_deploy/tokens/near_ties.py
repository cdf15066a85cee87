"""What a network whose tokens merge may as rightly give as what it gives.

Which tokens merge is decided by comparing similarities. Two of them may differ by less than rounding, and another
runtime, which rounds otherwise, then merges another token: neither is wrong. Torch is made to take such decisions the
other way by noise on what tokens are compared by, as small as rounding. An ONNX file has to agree with what torch gives
for one and the same outcome of all decisions, as exactly as anywhere else.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from exporters import Alternatives
from optin_deploy.network import Network
from optin_deploy.tokens.merging import MergingBlocks, merging_names, with_blocks_of

# Powers of ten, relative to the length of what is compared. In float32, errors deep in a network are some 1e-6: with
# noise of several sizes around that and many draws, the decisions of a runtime are among those taken.
_LEAST_EXPONENT, _MOST_EXPONENT, _CANDIDATES = -6.5, -4.5, 32


class NudgedBlocks(MergingBlocks):
    """Compares tokens by what is off by noise, another one for each sample of a batch, and larger from one to the next.

    The noise is the same in every call.
    """

    def _metric(self, index: int, block: nn.Module, x: Tensor) -> Tensor:
        metric = super()._metric(index, block, x)
        noise = torch.randn(metric.shape, generator=torch.Generator().manual_seed(index)).to(metric)
        length = metric.norm(dim=-1, keepdim=True) / metric.shape[-1] ** 0.5
        return (
            metric + torch.logspace(_LEAST_EXPONENT, _MOST_EXPONENT, len(x)).to(metric)[:, None, None] * length * noise
        )


def alternatives(network: Network) -> Alternatives | None:
    """For `exporters.check_parity`: the network's outputs for one sample with near ties decided this way or that.

    None for a network of which no tokens merge.
    """
    if not merging_names(network.module):
        return None
    nudged = network.tensor_outputs(with_blocks_of(network.module, NudgedBlocks))

    def found(sample: Mapping[str, Tensor], _: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return nudged(**{name: t.expand(_CANDIDATES, *t.shape[1:]) for name, t in sample.items()})

    return found
