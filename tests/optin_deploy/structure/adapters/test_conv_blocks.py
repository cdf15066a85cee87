import pytest
import timm.layers
import tiny
import torch
import torchvision
from timm.models import resnet
from torch import Tensor, nn

from optin_deploy.structure.adapters.conv_channels import COUPLED
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import CostModules, Group, LayerAxis, LeftDense, Stream, Structure, channels_last

pytestmark = pytest.mark.slow


class Block(nn.Module):
    """A block that can be pruned; the classes below each spoil it in one way."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2, self.bn2 = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.extra = nn.Conv2d(6, 6, 1)

    def inner(self, x: Tensor) -> Tensor:
        return self.bn1(self.conv1(x)).relu()

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.bn2(self.conv2(self.inner(x)))).relu()


class PreActivation(Block):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.bn2(self.conv1(self.bn1(x).relu())).relu())


class Dense(Block):
    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(x)
        return inner + self.bn2(self.conv2(inner))


class Concatenating(Block):
    def forward(self, x: Tensor) -> Tensor:
        inner = self.inner(x)
        return self.bn2(self.conv2(inner)) + torch.cat([inner[:, :3], x[:, 3:]], 1)


class Mixing(Block):
    def inner(self, x: Tensor) -> Tensor:
        return super().inner(x).softmax(1)


class Gated(Block):
    def inner(self, x: Tensor) -> Tensor:
        inner = super().inner(x)
        return inner * inner.mean(1, keepdim=True).sigmoid()


class Extra(Block):
    def inner(self, x: Tensor) -> Tensor:
        return self.extra(super().inner(x))


class Pooled(Block):
    def forward(self, x: Tensor) -> Tensor:
        return self.conv2(nn.functional.avg_pool2d(self.inner(x), 2))


class Twice(Block):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(super().forward(x))


class Unnormalised(Block):
    def inner(self, x: Tensor) -> Tensor:
        self.bn1(x)
        return self.conv1(x).relu()


SPOILT: dict[type[nn.Module], str | None] = {
    Dense: COUPLED,
    Concatenating: COUPLED,
    Mixing: COUPLED,
    Gated: COUPLED,
    Pooled: None,
    Twice: None,
}


def described(*blocks: nn.Module, size: int = 8) -> Structure:
    return describe(tiny.randomised(nn.Sequential(*blocks)), {"input": torch.randn(2, 6, size, size)})


@pytest.mark.parametrize("spoilt", SPOILT)
def test_only_blocks_that_run_as_they_look_are_pruned(spoilt: type[nn.Module]) -> None:
    structure = described(Block(), spoilt(), Block())
    names = [g.name for g in structure.groups]
    assert names == ["0.conv1", "2.conv1"]
    assert structure.blocks == ("0", "2")
    reason = SPOILT[spoilt]
    assert structure.left_dense == (() if reason is None else (LeftDense("1.conv1", reason),))


def test_modules_between_are_found_under_any_name() -> None:
    structure = described(PreActivation(), Extra(), Unnormalised())
    found = [(g.name, g.output, g.parent, [s.module[2:] for s in g.sides]) for g in structure.groups]
    assert found == [
        ("0.conv1", "0.conv2", None, ["conv1", "bn2", "conv2"]),
        ("1.conv1", "1.extra", "1.extra", ["conv1", "bn1", "extra"]),
        ("1.extra", "1.conv2", None, ["extra", "conv2"]),
        ("2.conv1", "2.conv2", None, ["conv1", "conv2"]),
    ]


def test_the_group_of_a_block() -> None:
    structure = described(Block())
    assert structure.groups == (
        Group(
            name="0.conv1",
            kind="channel",
            units=6,
            width=1,
            output="0.conv2",
            sides=(LayerAxis("0.conv1", "out"), LayerAxis("0.bn1", "out"), LayerAxis("0.conv2", "in")),
            cost=CostModules(("0.conv1", "0.bn1", "0.conv2")),
            placeholders=(("0.conv1", "no_channels"), ("0.bn1", "pass"), ("0.conv2", "constant")),
            axis=1,
            layer=0,
            stream=Stream("0", norm="0.bn2"),
        ),
    )
    assert structure.tokens == 64
    assert structure.feature_axis("0") == 1


def test_blocks_of_torchvision() -> None:
    block = torchvision.models.resnet.BasicBlock
    structure = described(block(6, 6), block(6, 4, 2, nn.Sequential(nn.Conv2d(6, 4, 1, 2), nn.BatchNorm2d(4))))
    found = [
        (g.name, g.units, g.stream.residual, g.stream.shortcut, g.stream.norm, g.stream.in_place)
        for g in structure.groups
    ]
    assert found == [
        ("0.conv1", 6, "0", None, "0.bn2", True),
        ("1.conv1", 4, None, "1.downsample", "1.bn2", True),
    ]


def test_streams_of_the_tiny_networks() -> None:
    assert [g.stream for g in tiny.structure("plain_resnet").groups] == [
        Stream("blocks.0", norm="blocks.0.bn2"),
        Stream(shortcut="blocks.1.shortcut", norm="blocks.1.bn2"),
        Stream("blocks.2", norm="blocks.2.bn2"),
    ]
    second = tiny.structure("resnet").groups[2].stream
    assert second == Stream("layer2.1", norm="layer2.1.bn2", in_place=True)
    gated = tiny.structure("resnet_silu_se").groups
    assert {(g.stream.residual, g.stream.shortcut) for g in gated} == {(None, None)}


@pytest.mark.parametrize("name", tiny.CNN_NAMES)
def test_groups_of_the_tiny_networks(name: str) -> None:
    structure = tiny.structure(name)
    assert structure.left_dense == ()
    assert [g.layer for g in structure.groups] == list(range(len(structure.blocks)))
    assert [g.name for g in structure.groups] == [f"{block}.conv1" for block in structure.blocks]
    assert structure.tokens == (256 if name == "plain_resnet" else 16)


def test_a_block_outside_a_container() -> None:
    class Bare(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = Block()

        def forward(self, x: Tensor) -> Tensor:
            return self.first(x)

    structure = describe(tiny.randomised(Bare()), {"x": torch.randn(2, 6, 4, 4)})
    assert (structure.blocks, [g.stream.residual for g in structure.groups]) == (("first",), ["first"])


def test_the_network_itself_is_no_block() -> None:
    structure = describe(tiny.randomised(Block()), {"x": torch.randn(2, 6, 4, 4)})
    assert (structure.blocks, structure.groups[0].stream.residual) == (("conv2",), None)


@pytest.mark.parametrize("pool", [timm.layers.BlurPool2d, nn.AvgPool2d])
def test_a_change_of_size_ends_the_path_of_channels(pool: type[nn.Module]) -> None:
    module = tiny.randomised(resnet.ResNet(resnet.BasicBlock, (1, 2, 1, 1), 3, channels=(8,) * 4, aa_layer=pool))
    structure = describe(module, {"x": torch.randn(1, 3, 64, 64)})
    assert {g.name for g in structure.groups} == {"layer1.0.conv1", "layer2.1.conv1"}


def test_describing_leaves_no_hooks() -> None:
    for network in (tiny.network("resnet"), tiny.network("plain_resnet")):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.module.modules())


def test_channels_last() -> None:
    x = torch.arange(24).reshape(1, 2, 3, 4)
    assert torch.equal(channels_last(x, 1)[0, 2, 1], x[0, :, 2, 1])
    assert torch.equal(channels_last(x, -1), x)
