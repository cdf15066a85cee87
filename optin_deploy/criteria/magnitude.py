"""The magnitude criterion: the norm of a unit's weights, without data."""

import torch
from torch import Tensor, nn

from optin_deploy.criteria.scoring import ScoringInputs
from optin_deploy.nn.unfold import feature_dim
from optin_deploy.structure.groups import Group, LayerAxis, Structure


def score_magnitude(inputs: ScoringInputs) -> dict[str, Tensor]:
    """Return `magnitude_scores` of the network."""
    return magnitude_scores(inputs.network.module, inputs.structure)


@torch.no_grad()
def magnitude_scores(module: nn.Module, structure: Structure) -> dict[str, Tensor]:
    """Return the squared L2 norm of each unit's weights: group name -> float64 ``(units,)`` on the CPU.

    The score of unit u is Σ_s ‖W_s[u]‖²_F over the layers s of its group. W_s[u] are the rows or columns of the matrix
    or convolution kernel W_s that belong to u: for a head its query, key, value and output weights. Biases and norms
    do not count, since their scale differs from that of matrices.
    """
    return {
        group.name: sum((_norms(module, group, s) for s in group.sides), _zeros(group)) for group in structure.groups
    }


def _zeros(group: Group) -> Tensor:
    return torch.zeros(group.units, dtype=torch.float64)


def _norms(module: nn.Module, group: Group, side: LayerAxis) -> Tensor:
    layer = module.get_submodule(side.module)
    weight = getattr(layer, "weight", None)
    # Norms may have none.
    if not isinstance(weight, Tensor) or weight.dim() < 2:
        return _zeros(group)
    features = weight.detach().double().transpose(0, feature_dim(layer, side.axis)).flatten(1).square().sum(1)
    widths = side.widths or (group.width,) * (len(features) // (group.units * group.width))
    parts = features.cpu().split([group.units * width for width in widths])
    return sum((part.reshape(group.units, -1).sum(1) for part in parts), _zeros(group))
