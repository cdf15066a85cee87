"""Linear layers and convolutions as one matrix product: rows of a design matrix times a weight matrix."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Neighbouring positions of a map are similar, so a random part of more rows than this is used of a batch.
ROWS = 8_192


Transposed = nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
Conv = nn.Conv1d | nn.Conv2d | nn.Conv3d | Transposed


@dataclass(frozen=True)
class Geometry:
    """The geometry of a convolution along its one to three axes.

    Padding has the order of `F.pad`: before and after, beginning with the last axis. A transposed convolution is one
    of stride 1 with a flipped kernel, on an input with zeros ``between`` its pixels.
    """

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[int, ...]
    between: tuple[int, ...] = ()

    @classmethod
    def of(cls, conv: Conv) -> "Geometry":
        """Return the geometry of ``conv``."""
        padding: list[int] = []
        # F.pad begins with the last axis.
        for axis in reversed(range(len(conv.kernel_size))):
            total = conv.dilation[axis] * (conv.kernel_size[axis] - 1)
            if isinstance(conv, Transposed):
                # Negative padding crops.
                edge = total - int(conv.padding[axis])
                padding += [edge, edge + conv.output_padding[axis]]
            elif conv.padding == "same":
                padding += [total // 2, total - total // 2]
            else:
                padding += [0 if conv.padding == "valid" else int(conv.padding[axis])] * 2
        if isinstance(conv, Transposed):
            between = tuple(stride - 1 for stride in conv.stride)
            return cls(conv.kernel_size, (1,) * len(between), conv.dilation, tuple(padding), between)
        return cls(conv.kernel_size, conv.stride, conv.dilation, tuple(padding))

    def output_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Return the sizes of the output for an input of ``size``."""
        edges = zip(self.padding[-2::-2], self.padding[::-2], strict=True)
        between = self.between or (0,) * len(size)
        padded = [(n - 1) * (zeros + 1) + 1 + sum(e) for n, zeros, e in zip(size, between, edges, strict=True)]
        reach = [d * (k - 1) + 1 for d, k in zip(self.dilation, self.kernel, strict=True)]
        return tuple((n - r) // step + 1 for n, r, step in zip(padded, reach, self.stride, strict=True))

    def patches(self, x: Tensor, mode: str = "constant") -> Tensor:
        """Return the patches of ``x`` ``(batch, channels, …)``: ``(batch, positions, channels · kernel size)``."""
        if any(self.between):
            wide = x.new_zeros(
                (*x.shape[:2], *((n - 1) * (z + 1) + 1 for n, z in zip(x.shape[2:], self.between, strict=True)))
            )
            steps = [slice(None, None, zeros + 1) for zeros in self.between]
            wide[(slice(None), slice(None), *steps)] = x
            x = wide
        return self._unfolded(F.pad(x, self.padding, mode=mode))

    def _unfolded(self, x: Tensor) -> Tensor:
        kernel, stride, dilation = self.kernel, self.stride, self.dilation
        if len(kernel) == 1:
            x, kernel, stride, dilation = x.unsqueeze(2), (1, *kernel), (1, *stride), (1, *dilation)
        if len(kernel) == 2:
            return F.unfold(x, kernel, dilation=dilation, stride=stride).transpose(1, 2)
        # torch only unfolds images, so the images at the depths of each row of the kernel are unfolded.
        depths = (x.shape[2] - dilation[0] * (kernel[0] - 1) - 1) // stride[0] + 1
        unfolded = []
        for k in range(kernel[0]):
            start = k * dilation[0]
            images = x[:, :, start : start + (depths - 1) * stride[0] + 1 : stride[0]].transpose(1, 2)
            columns = F.unfold(images.flatten(0, 1), kernel[1:], dilation=dilation[1:], stride=stride[1:])
            unfolded.append(columns.unflatten(0, (-1, depths)).unflatten(2, (x.shape[1], -1)))
        # (batch, depths, channels, kernel's depths, rest of the kernel, pixels)
        return torch.stack(unfolded, 3).permute(0, 1, 5, 2, 3, 4).flatten(3).flatten(1, 2)


def design(projection: nn.Module, x: Tensor) -> Tensor:
    """Return the unfolded input ``(batch, positions, features)`` of ``projection``.

    ``design(p, x) @ weight_matrix(p).T + p.bias`` is ``p(x)``, channels last. For a linear layer the unfolded input is
    ``x``, for an ungrouped convolution its patches ``(batch, positions, channels · kernel size)``, ordered by channel
    and then as the kernel.
    """
    if isinstance(projection, nn.Linear):
        return x
    conv = _conv(projection)
    return Geometry.of(conv).patches(x, "constant" if conv.padding_mode == "zeros" else conv.padding_mode)


def some_rows(count: int, most: int = ROWS) -> Tensor | slice:
    """Return indices of rows for second moments: all of ``count``, or ``most`` of them at random, always the same."""
    if count <= most:
        return slice(None)
    return torch.randperm(count, generator=torch.Generator().manual_seed(count))[:most].sort().values


def design_rows(projection: nn.Module, x: Tensor, rows: Tensor | slice, valid: Tensor | None = None) -> Tensor:
    """Return some rows of `design` of all samples, without padding: ``(rows, features)``.

    If ``rows`` are indices (in ascending order), only one sample's patches of a map are in memory at a time.
    """
    if isinstance(rows, slice) or isinstance(projection, nn.Linear):
        return valid_rows(design(projection, x), valid)[rows]
    selected, rows = [], rows.to(x.device)
    for number, sample in enumerate(x.split(1)):
        patches = design(projection, sample)[0]
        here = rows - number * len(patches)
        selected.append(patches[here[(here >= 0) & (here < len(patches))]])
    return torch.cat(selected)


def feature_dim(layer: nn.Module, axis: Literal["out", "in"]) -> int:
    """Return the dimension of the output or input features in the weights of ``layer``.

    In a grouped transposed convolution both are 0, because its outputs and inputs belong to the same units.
    """
    if isinstance(layer, Transposed):
        return int(axis == "out" and layer.groups == 1)
    return int(axis == "in")


def weight_matrix(projection: nn.Module) -> Tensor:
    """Return the weights as ``(outputs, features)``; the features are the columns of `design`."""
    weight = projection.get_parameter("weight")
    return (_flip_kernels(weight) if isinstance(projection, Transposed) else weight).flatten(1)


@torch.no_grad()
def set_weight_matrix(projection: nn.Module, matrix: Tensor) -> None:
    """Write ``(outputs, features)`` into the weights, in place."""
    weight = projection.get_parameter("weight")
    if isinstance(projection, Transposed):
        weight.copy_(_flip_kernels(matrix.reshape(len(matrix), len(weight), *weight.shape[2:])))
    else:
        weight.copy_(matrix.reshape(weight.shape))


def _flip_kernels(kernels: Tensor) -> Tensor:
    """Convert kernels ``(a, b, …)`` of a transposed convolution to those of a plain one, or back."""
    return kernels.transpose(0, 1).flip(tuple(range(2, kernels.dim())))


def columns_per_unit(projection: nn.Module, width: int) -> int:
    """Return how many columns of `design` belong to one unit of ``width`` input features or channels."""
    return width if isinstance(projection, nn.Linear) else width * _conv(projection).weight[0, 0].numel()


def valid_rows(x: Tensor, valid: Tensor | None) -> Tensor:
    """Return ``(…, features)`` as ``(rows, features)``, without padding if ``valid`` has an entry for each row."""
    rows = x.flatten(0, -2)
    return rows[valid.flatten()] if valid is not None and valid.numel() == len(rows) else rows


def columns_of(units: Tensor, per_unit: int) -> Tensor:
    """Return the indices of the columns of `design` that belong to ``units``, in order, ``per_unit`` for each."""
    return (units[:, None] * per_unit + torch.arange(per_unit, device=units.device)).reshape(-1)


def _conv(projection: nn.Module) -> Conv:
    assert isinstance(projection, Conv) and projection.groups == 1
    return projection
