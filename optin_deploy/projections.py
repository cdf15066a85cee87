"""Projections, linear or convolutional, as one matrix product: rows of a design matrix times a weight matrix."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Neighbouring positions of a map tell much the same: of more rows than this a batch gives a random part.
ROWS = 8_192


@dataclass(frozen=True)
class Geometry:
    """Of what size a convolution's output is. Pairs are (rows, columns); padding is left, right, top, bottom."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]

    @classmethod
    def of(cls, conv: nn.Conv2d) -> "Geometry":
        """The geometry of ``conv``."""
        padding: list[int] = []
        # F.pad begins with the last axis.
        for axis in (1, 0):
            if conv.padding == "same":
                total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
                padding += [total // 2, total - total // 2]
            else:
                padding += [0 if conv.padding == "valid" else int(conv.padding[axis])] * 2
        return cls(conv.kernel_size, conv.stride, conv.dilation, tuple(padding))

    def output_size(self, size: Sequence[int]) -> tuple[int, int]:
        """Height and width of the output for an input of height and width ``size``."""
        left, right, top, bottom = self.padding
        padded = (size[0] + top + bottom, size[1] + left + right)
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        return (padded[0] - reach[0]) // self.stride[0] + 1, (padded[1] - reach[1]) // self.stride[1] + 1


def design(projection: nn.Module, x: Tensor) -> Tensor:
    """What the weights of ``projection`` see of its input ``x``: ``(batch, positions, features)``.

    ``design(p, x) @ weight_matrix(p).T + p.bias`` is ``p(x)``, channels last. For a linear layer it is ``x`` itself,
    for a convolution (not a grouped one) its patches: ``(batch, H'·W', channels · kernel area)``, ordered channel,
    kernel row, kernel column.
    """
    if isinstance(projection, nn.Linear):
        return x
    conv = _conv(projection)
    mode = "constant" if conv.padding_mode == "zeros" else conv.padding_mode
    padded = F.pad(x, Geometry.of(conv).padding, mode=mode)
    return F.unfold(padded, conv.kernel_size, dilation=conv.dilation, stride=conv.stride).transpose(1, 2)


def some_rows(count: int, most: int = ROWS) -> Tensor | slice:
    """Which of a batch's rows are enough for second moments: all, or ``most`` of them at random, always the same."""
    if count <= most:
        return slice(None)
    return torch.randperm(count, generator=torch.Generator().manual_seed(count))[:most]


def weight_matrix(projection: nn.Module) -> Tensor:
    """The weights as ``(outputs, features)``; the features are the columns of `design`."""
    return projection.get_parameter("weight").flatten(1)


@torch.no_grad()
def set_weight_matrix(projection: nn.Module, matrix: Tensor) -> None:
    """Write ``(outputs, features)`` into the weights, in place."""
    weight = projection.get_parameter("weight")
    weight.copy_(matrix.reshape(weight.shape))


def columns_per_unit(projection: nn.Module, width: int) -> int:
    """How many columns of `design` belong to one unit of ``width`` input features or channels."""
    return width if isinstance(projection, nn.Linear) else width * _conv(projection).weight[0, 0].numel()


def valid_rows(x: Tensor, valid: Tensor | None) -> Tensor:
    """``(…, features)`` as ``(rows, features)``, padding left out where ``valid`` has an entry for each row."""
    rows = x.flatten(0, -2)
    return rows[valid.flatten()] if valid is not None and valid.numel() == len(rows) else rows


def columns_of(units: Tensor, each: int) -> Tensor:
    """Indices of the columns of `design` that belong to ``units``, in order, ``each`` consecutive ones per unit."""
    return (units[:, None] * each + torch.arange(each, device=units.device)).reshape(-1)


def _conv(projection: nn.Module) -> nn.Conv2d:
    assert isinstance(projection, nn.Conv2d) and projection.groups == 1
    return projection
