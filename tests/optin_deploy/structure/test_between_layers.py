"""If nothing is prunable, the operation between the convolutions is named."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.models.custom import custom_network
from optin_deploy.pruning.space import analyze
from optin_deploy.structure.describe import describe
from optin_deploy.structure.unpruned import find_unpruned

pytestmark = pytest.mark.slow


class Row(nn.Module):
    def __init__(self, between: nn.Module, two: nn.Module) -> None:
        super().__init__()
        self.one, self.between, self.two = nn.Conv2d(3, 8, 3, padding=1), between, two

    def forward(self, x: Tensor) -> Tensor:
        return self.two(F.relu(self.between(self.one(x))))


class Function(nn.Sequential):
    """Runs a function; a container, so that it is not named itself."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class OverChannels(nn.LayerNorm):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


class Turned(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return x.flip(1)


class Functional(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 8, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, padding=1)


class Activated(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


def shuffled(x: Tensor) -> Tensor:
    batch, channels, *size = x.shape
    return x.view(batch, 2, channels // 2, *size).transpose(1, 2).reshape(batch, channels, *size)


def last(outputs: int = 6, inputs: int = 8) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


MIXES, MOVES = r"{}.* mixes .*one and two", r"{}.* moves .*one and two"
OBSTACLES: dict[str, tuple[nn.Module, nn.Module, str]] = {
    "local response norm": (nn.LocalResponseNorm(3), last(), MIXES.format("LocalResponseNorm between")),
    "layer norm": (OverChannels(8), last(), MIXES.format("OverChannels between")),
    "norm of all channels": (nn.GroupNorm(1, 8), last(), MIXES.format("GroupNorm between")),
    "pixel shuffle": (nn.PixelShuffle(2), last(6, 2), MOVES.format("PixelShuffle between")),
    "channel shuffle": (Function(shuffled), last(), MIXES.format(r"view\(\) to reshape\(\)")),
    "concatenation": (Function(lambda x: torch.cat([x, x[:, :2]], 1)), last(6, 10), MOVES.format(r"cat\(\)")),
    "softmax": (Function(lambda x: x.softmax(1)), last(), MIXES.format(r"softmax\(\)")),
    "layer norm as a function": (
        Function(lambda x: F.layer_norm(x.movedim(1, -1), (8,)).movedim(-1, 1)),
        last(),
        MIXES.format(r"layer_norm\(\)"),
    ),
    "function of anybody's": (Function(Turned.apply), last(), MIXES.format(r"flip\(\)")),
    "gated linear unit": (Function(lambda x: F.glu(x, 1)), last(6, 4), MOVES.format(r"glu\(\)")),
    "flatten": (Function(lambda x: x.flatten(1)), nn.Linear(8 * 49, 4), MOVES.format(r"flatten\(\)")),
    "pooled": (
        Function(lambda x: x.mean((2, 3))),
        nn.Linear(8, 4),
        "Linear two .*channels of one",
    ),
    "groups": (nn.Identity(), nn.Conv2d(8, 6, 1, groups=2), "two, .*one, .*2 groups"),
    "subclass": (
        nn.Identity(),
        Activated(8, 6, 3),
        "two, .*one, .*Activated, a Conv2d with a forward",
    ),
    "functional": (nn.Identity(), Functional(), r"Functional, .*parameters .*\(weight\)"),
}


def message(module: nn.Module, inputs: dict[str, Tensor]) -> str:
    with pytest.raises(UserError) as raised:
        analyze(custom_network(module, inputs))
    assert "\n" not in str(raised.value)
    return str(raised.value).partition("; looked for")[0]


@pytest.mark.parametrize("name", OBSTACLES)
def test_the_operation_between_is_named(name: str) -> None:
    torch.manual_seed(0)
    between, two, expected = OBSTACLES[name]
    assert re.search(expected, message(tiny.randomised(Row(between, two)), {"x": torch.randn(2, 3, 7, 7)}))


def test_in_containers_and_with_hooks_taken_off() -> None:
    def layer(inputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, 8, 3, padding=1), OverChannels(8), nn.ReLU())

    module = tiny.randomised(nn.Sequential(nn.ModuleDict({"layers": nn.Sequential(layer(3), layer(8))})["layers"]))
    told = message(module, {"input": torch.randn(2, 3, 7, 7)})
    assert re.search(r"OverChannels 0\.0\.1 .*0\.0\.0 and 0\.1\.0", told)
    assert "ModuleList" not in told and "Sequential," not in told
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


class Recurrent(nn.Module):
    def __init__(self, cell: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn = cell(3, 8, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0]


@pytest.mark.parametrize("cell", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers_are_named_whether_counted_or_not(cell: type[nn.RNNBase]) -> None:
    told = message(Recurrent(cell), {"x": torch.randn(2, 5, 3)})
    assert re.search(rf"{cell.__name__}: recurrent", told) and "rnn (" in told


def test_bilinear_layers() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.both = nn.Bilinear(3, 3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.both(x, x)

    told = message(Both(), {"x": torch.randn(2, 3)})
    assert re.search(r"both .*Bilinear", told)


def test_attention_of_parameters() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.queries, self.keys = (nn.Parameter(torch.randn(6, 8)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            q, k = (torch.einsum("bte,ed->btd", x, w) for w in (self.queries, self.keys))
            return (q @ k.transpose(1, 2)).softmax(-1) @ x

    told = message(nn.Sequential(Attention()), {"input": torch.randn(2, 5, 6)})
    assert re.search(r"Attention.*queries, keys", told)


def test_dense_modules_next_to_groups_are_explained() -> None:
    class Block(Row):
        def forward(self, x: Tensor) -> Tensor:
            return x + super().forward(x)

    module = tiny.randomised(nn.Sequential(*(Block(m, last(3)) for m in (nn.BatchNorm2d(8), OverChannels(8)))))
    inputs = {"input": torch.randn(2, 3, 7, 7)}
    structure = describe(module, inputs)
    assert [g.name for g in structure.groups] == ["0.one"]
    reasons = {each.module: each.reason for each in find_unpruned(module, structure, inputs)}
    assert all(name in reasons["1.one"] for name in ("OverChannels 1.between", "1.one", "1.two"))
