"""Alternative outputs of a token-merging network whose similarities tie within rounding.

Two similarities may differ by less than rounding. Another runtime rounds differently and merges another token: neither
is wrong. Noise as small as rounding, added to the features that are compared, makes torch take such choices the other
way. An ONNX file must agree with torch for one outcome of all choices, within the usual tolerance.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from exporters import Alternatives
from optin_deploy.network import Network
from optin_deploy.tokens.merging import MergingBlocks, merging_names, with_blocks_of

# Sizes of the noise, powers of ten, relative to the features. Errors deep in a float32 network are about 1e-6: many
# draws of several sizes around that cover the choices of a runtime.
_LEAST_EXPONENT, _MOST_EXPONENT, _CANDIDATES = -6.5, -4.5, 32


class NudgedBlocks(MergingBlocks):
    """Merging blocks that compare features with noise, larger for each further sample of a batch.

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
    """Return alternatives for `exporters.check_parity`: outputs of one sample with near ties broken in many ways.

    None if no tokens merge.
    """
    if not merging_names(network.module):
        return None
    nudged = network.tensor_outputs(with_blocks_of(network.module, NudgedBlocks))

    def outputs_of(sample: Mapping[str, Tensor], _: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        return nudged(**{name: t.expand(_CANDIDATES, *t.shape[1:]) for name, t in sample.items()})

    return outputs_of
