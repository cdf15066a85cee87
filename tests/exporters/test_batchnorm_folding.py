from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from exporters import onnx_from_program, trace

pytestmark = pytest.mark.slow


class Tokens(nn.Module):
    """Batch norm of the features of tokens, in place of a layer norm."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm1d(features)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.transpose(1, 2)).transpose(1, 2)


class Reparameterised(Tokens):
    """With a part of its input added."""

    def __init__(self, features: int) -> None:
        super().__init__(features)
        self.alpha = nn.Parameter(torch.tensor([0.7]))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return (self.bn(x) + self.alpha * x).transpose(1, 2)


class Flattened(Tokens):
    """With all tokens in the batch."""

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class Residual(nn.Module):
    """A norm before three linear maps, one of them without a bias, in a residual block."""

    def __init__(self, norm: Callable[[int], nn.Module]) -> None:
        super().__init__()
        self.norm, self.other = norm(6), norm(6)
        self.maps = nn.ModuleList([nn.Linear(6, 4), nn.Linear(6, 4, bias=False), nn.Linear(6, 4)])
        self.down, self.up, self.last = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 6)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        first, second, third = (each(y) for each in self.maps)
        x = x + self.down((first * second).relu() + third)
        return x + self.last(self.up(self.other(x)).relu())


class Behind(nn.Module):
    """A linear map and a batch norm of what it gives."""

    def __init__(self, norm: Callable[[int], nn.Module], bias: bool) -> None:
        super().__init__()
        self.map, self.norm = nn.Linear(6, 4, bias=bias), norm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.map(x)).relu()


class Seen(Residual):
    """The norm's output is also added to something else."""

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(x)
        return y + self.down(self.maps[0](y))


class Convolutions(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, groups=4), nn.BatchNorm2d(4)]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


NORMS = {"tokens": Tokens, "reparameterised": Reparameterised, "flattened": Flattened}


def exported(module: nn.Module, x: Tensor, path: Path) -> tuple[list[str], float]:
    """Operators of the file of ``module``, and how far its outputs are from torch's, for another batch size too."""
    generator = torch.Generator().manual_seed(0)
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (norm.weight.data, norm.bias.data, norm.running_mean):
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            norm.running_var.copy_(torch.rand(norm.num_features, generator=generator) + 0.5)
    module.eval()
    axes = {"x": {0: "batch"}}
    onnx_from_program(trace(module, {"x": x}, axes), path, output_names=["y"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    errors = []
    for batch in (x, x[:1], torch.cat([x, -2 * x])):
        (given,) = session.run(None, {"x": batch.numpy()})
        errors.append(float(np.abs(given - module(batch).detach().numpy()).max()))
    return [node.op_type for node in onnx.load(path).graph.node], max(errors)


@pytest.mark.parametrize("norm", NORMS)
def test_norms_before_linear_maps_are_folded_into_them(norm: str, tmp_path: Path) -> None:
    operators, error = exported(Residual(NORMS[norm]), torch.randn(2, 5, 6), tmp_path / "m.onnx")
    assert "BatchNormalization" not in operators
    assert error < 1e-5


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("norm", ["tokens", "flattened"])
def test_norms_behind_a_linear_map_are_folded_into_it(norm: str, bias: bool, tmp_path: Path) -> None:
    operators, error = exported(Behind(NORMS[norm], bias), torch.randn(2, 5, 6), tmp_path / "m.onnx")
    assert "BatchNormalization" not in operators
    assert error < 1e-5


@pytest.mark.parametrize("norm", NORMS)
def test_a_norm_that_something_else_sees_stays(norm: str, tmp_path: Path) -> None:
    operators, error = exported(Seen(NORMS[norm]), torch.randn(2, 5, 6), tmp_path / "m.onnx")
    assert operators.count("BatchNormalization") == 1
    assert error < 1e-5


def test_norms_behind_convolutions_are_folded(tmp_path: Path) -> None:
    operators, error = exported(Convolutions(), torch.randn(2, 3, 8, 8), tmp_path / "m.onnx")
    assert "BatchNormalization" not in operators
    assert error < 1e-5
