"""Norms over all units of a group after some are removed: the removed ones still count, as zeros."""

import torch
from torch import Tensor, nn


class PartLayerNorm(nn.Module):
    """A layer norm over ``features`` of which some are removed and count as zeros.

    With K of N features x left, μ = Σ x / N and σ² = (Σ (x − μ)² + (N − K) μ²) / N.
    """

    def __init__(self, weight: nn.Parameter, bias: nn.Parameter | None, features: int, eps: float, axis: int) -> None:
        super().__init__()
        self.weight, self.bias = weight, bias
        self.features, self.eps, self.axis = features, eps, axis

    def forward(self, x: Tensor) -> Tensor:
        x = x.movedim(self.axis, -1)
        mean = x.sum(-1, keepdim=True) / self.features
        centred = x - mean
        absent = self.features - x.shape[-1]
        variance = (centred.square().sum(-1, keepdim=True) + absent * mean.square()) / self.features
        x = centred * (variance + self.eps).rsqrt() * self.weight
        return (x if self.bias is None else x + self.bias).movedim(-1, self.axis)


def can_shrink(norm: nn.Module) -> bool:
    """Return whether `shrink_norm` supports ``norm``: a layer norm, or a norm with a weight and a bias only."""
    if isinstance(norm, nn.LayerNorm):
        return len(norm.normalized_shape) == 1 and norm.weight is not None
    return isinstance(norm, PartLayerNorm) or {name for name, _ in norm.named_parameters()} == {"weight", "bias"}


@torch.no_grad()
def shrink_norm(norm: nn.Module, kept: Tensor, axis: int) -> nn.Module:
    """Return ``norm`` for only the features ``kept`` along ``axis`` of its input. ``norm`` itself may be changed.

    Global response norm (Woo et al., ConvNeXt V2, 2023) divides a channel's norm by the mean over channels. The mean
    over K of N channels is N/K times the mean with zeros for the others, so weight and eps are multiplied by N/K.
    """
    if isinstance(norm, nn.LayerNorm | PartLayerNorm):
        features = norm.features if isinstance(norm, PartLayerNorm) else norm.normalized_shape[0]
        bias = _part(norm.bias, kept) if isinstance(norm.bias, Tensor) else None
        return PartLayerNorm(_part(norm.weight, kept), bias, features, norm.eps, axis)
    gain = norm.get_parameter("weight").numel() / len(kept)
    norm.weight, norm.bias = (_part(norm.get_parameter(name), kept) for name in ("weight", "bias"))
    norm.weight.mul_(gain)
    if isinstance(eps := getattr(norm, "eps", None), float):
        norm.eps = eps * gain  # type: ignore[assignment]
    return norm


def _part(parameter: Tensor, kept: Tensor) -> nn.Parameter:
    dim = max(range(parameter.dim()), key=lambda d: parameter.shape[d])
    data = parameter.detach().index_select(dim, kept.to(parameter.device)).contiguous()
    return nn.Parameter(data, requires_grad=parameter.requires_grad)
