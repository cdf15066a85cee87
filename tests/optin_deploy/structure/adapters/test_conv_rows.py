import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import CostModules, Group, LayerAxis, Structure

pytestmark = pytest.mark.slow


class Row(nn.Module):
    """Convolutions that run one after the other; the classes below each change what is between the first two."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.two = nn.Conv2d(6, 6, 3, padding=1)
        self.extra = nn.Conv2d(6, 6, 1)

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.between(self.one(x)))


class Mixed(Row):
    def between(self, x: Tensor) -> Tensor:
        return super().between(x).softmax(1)


class Shortcut(Row):
    def forward(self, x: Tensor) -> Tensor:
        inner = self.between(self.one(x))
        return inner + self.two(inner)


class Resized(Row):
    def between(self, x: Tensor) -> Tensor:
        return F.avg_pool2d(super().between(x), 2)


class Shuffled(Row):
    def between(self, x: Tensor) -> Tensor:
        return super().between(x).flip(1)


class Twice(Row):
    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.two(self.between(self.one(x))))


class Elsewhere(Row):
    """The norm takes something else than what the convolution gives."""

    def between(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(2 * x))


def described(module: nn.Module, size: int = 6) -> Structure:
    return describe(tiny.randomised(module), {"x": torch.randn(2, 3, size, size)})


def test_the_group_of_a_pair() -> None:
    assert described(Row()).groups == (
        Group(
            name="one",
            kind="channel",
            units=6,
            width=1,
            output="two",
            sides=(LayerAxis("one", "out"), LayerAxis("norm", "out"), LayerAxis("two", "in")),
            cost=CostModules(("one", "norm", "two")),
            placeholders=(("one", "no_channels"), ("norm", "pass"), ("two", "constant")),
            layer=0,
            axis=1,
        ),
    )


@pytest.mark.parametrize("spoilt", [Mixed, Shortcut, Shuffled, Twice])
def test_channels_that_do_not_stay_apart_are_no_pair(spoilt: type[nn.Module]) -> None:
    assert described(spoilt()).groups == ()


@pytest.mark.parametrize("loose", [Resized, Elsewhere])
def test_where_nothing_else_is_prunable_channels_are_followed_further(loose: type[nn.Module]) -> None:
    assert [(g.name, g.output) for g in described(loose()).groups] == [("one", "two")]
    beside = nn.Sequential(Row(), nn.Conv2d(6, 3, 1), loose())
    structure = describe(tiny.randomised(beside), {"input": torch.randn(2, 3, 6, 6)})
    assert [(g.name, g.output) for g in structure.groups] == [("0.one", "0.two")]


def test_a_convolution_belongs_to_one_pair() -> None:
    layers = [nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 5, 1), nn.Conv2d(5, 6, 1), nn.GELU(), nn.Conv2d(6, 7, 1)]
    structure = describe(tiny.randomised(nn.Sequential(*layers)), {"input": torch.randn(2, 3, 6, 6)})
    assert [(g.name, g.output) for g in structure.groups] == [("0", "2"), ("3", "5")]
    assert structure.blocks == structure.compared == ("2", "5")


@pytest.mark.parametrize(
    "second", [nn.Conv2d(6, 6, 1, groups=2), nn.Linear(6, 6), nn.Conv2d(6, 6, 3, padding=1, bias=False)]
)
def test_plain_convolutions_only(second: nn.Module) -> None:
    row = Row()
    row.two = second
    assert len(described(row).groups) == int(isinstance(second, nn.Conv2d) and second.groups == 1)


def test_convolutions_in_a_block_are_left_to_it() -> None:
    assert [g.output for g in tiny.structure("resnet").groups] == [
        f"{b}.conv2" for b in tiny.structure("resnet").blocks
    ]


def test_a_network_with_a_decoder() -> None:
    structure = tiny.structure("upsampler")
    pairs = [(g.name, g.output, g.units) for g in structure.groups if g.kind == "channel"]
    assert pairs == [("decoder.up1", "decoder.up2", 6), ("decoder.up3", "decoder.last", 4)]
    assert structure.feature_axis("decoder.up2") == 1


def test_no_hooks_are_left() -> None:
    network = tiny.network("upsampler")
    describe(network.module, network.inputs)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.module.modules())
