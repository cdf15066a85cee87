import re
from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor, nn

from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import CostModules, Group, LayerAxis, Stream, Structure, TensorAxis
from optin_deploy.structure.masking import mask_units
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network
from optin_deploy.structure.verify import find_unsliceable, keep_working_placeholders

pytestmark = pytest.mark.slow


class Mixing(nn.Module):
    """Two feed-forward networks: in the second, every neuron is divided by the mean of all."""

    def __init__(self) -> None:
        super().__init__()
        self.up1, self.down1 = nn.Linear(4, 6), nn.Linear(6, 4)
        self.up2, self.down2 = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.down1(self.up1(x).relu())
        y = self.up2(x).abs()
        return self.down2(y / y.mean(-1, keepdim=True))


def pair(up: str, down: str) -> Group:
    return Group(
        name=up,
        kind="neuron",
        units=6,
        width=1,
        output=down,
        sides=(LayerAxis(up, "out"), LayerAxis(down, "in")),
        cost=CostModules((up, down)),
        placeholders=(),
    )


def test_only_the_group_whose_cut_differs_from_its_mask_is_named() -> None:
    module = tiny.randomised(Mixing())
    found = find_unsliceable(module, {"x": torch.randn(2, 4)}, [pair("up1", "down1"), pair("up2", "down2")])
    assert found.keys() == {"up2"}
    assert re.search("not interchangeable.*3 of 6", found["up2"])


def test_a_forward_pass_that_fails_when_sliced_is_reported() -> None:
    group = replace(pair("up1", "down1"), sides=(LayerAxis("up1", "out"),))
    reason = find_unsliceable(tiny.randomised(Mixing()), {"x": torch.randn(2, 4)}, [group])["up1"]
    assert re.search("not interchangeable.*3 of 6.*cannot be run", reason)
    assert "mat1 and mat2 shapes" in reason


def test_every_known_group_passes() -> None:
    for name in tiny.ALL_NAMES:
        network = tiny.network(name)
        assert not find_unsliceable(network.module, network.inputs, tiny.structure(name).without_widths().groups)


class Separable(nn.Module):
    """An inverted bottleneck: a depthwise convolution and one that is grouped by units of two channels in its middle,
    and a factor for each unit."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.norm = nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8)
        self.deep, self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.down = nn.Conv2d(8, 3, 1)
        self.factor = nn.Parameter(torch.rand(4, 1, 1))
        self.register_buffer("shift", torch.rand(1, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.grouped(self.deep(self.norm(self.up(x)).relu()))
        x = x.unflatten(1, (-1, 2)) * self.factor[:, None]
        return self.down(x.flatten(1, 2) + self.shift[..., None, None])


@pytest.mark.parametrize("kept", [(0, 3), (1,), (0, 1, 2, 3)])
def test_grouped_convolutions_and_loose_tensors_are_sliced(kept: tuple[int, ...]) -> None:
    module = tiny.randomised(Separable())
    group = Group(
        name="up",
        kind="channel",
        units=4,
        width=2,
        output="down",
        sides=(*(LayerAxis(name, "out") for name in ("up", "norm", "deep", "grouped")), LayerAxis("down", "in")),
        cost=CostModules(("up", "norm", "deep", "grouped", "down")),
        placeholders=(),
        axis=1,
        entries=(TensorAxis("factor", 0), TensorAxis("shift", 1, (2,))),
    )
    inputs = {"x": torch.randn(2, 3, 5, 5)}
    structure = Structure((), (group,), 0)
    plan = Plan({"up": kept})
    with torch.no_grad(), mask_units(module, structure, tiny.masks_of(structure, plan)):
        expected = module(**inputs)
    small = slice_network(module, structure, plan)
    torch.testing.assert_close(small(**inputs), expected, rtol=0, atol=1e-5)
    assert small.deep.groups == small.deep.in_channels == 2 * len(kept)
    assert small.grouped.groups == len(kept)


def test_parts_of_a_layer_may_have_units_of_different_widths() -> None:
    module = nn.Linear(3, 2 * (4 + 1 + 1), bias=False)
    group = replace(pair("0", "0"), units=2, width=4, sides=(LayerAxis("0", "out", (4, 1, 1)),))
    small = slice_network(nn.Sequential(module), Structure((), (group,), 0), Plan({"0": (1,)}))
    assert torch.equal(small[0].weight, module.weight[[4, 5, 6, 7, 9, 11]])


class Narrow(Mixing):
    def forward(self, x: Tensor) -> Tensor:
        return self.down1(self.up1(x).relu())


def test_a_sliced_module_gets_its_slim_class_and_the_dense_one_keeps_its_own() -> None:
    module = nn.Sequential(tiny.randomised(Mixing()))
    group = replace(pair("0.up1", "0.down1"), name="0", resizable=Narrow)
    small = slice_network(module, Structure((), (group,), 0), Plan({"0": (0, 1)}))
    assert type(small[0]) is Narrow and type(module[0]) is Mixing
    assert list(small.state_dict()) == list(module.state_dict())
    assert small(torch.randn(2, 4)).shape == (2, 4)


def test_describe_leaves_unsliceable_groups_dense(monkeypatch: pytest.MonkeyPatch) -> None:
    def mixing(name: str, module: nn.Module, parent_name: str, parent: nn.Module) -> Group | None:
        return pair("0.up2", "0.down2") if isinstance(module, Mixing) else None

    monkeypatch.setattr("optin_deploy.structure.describe.ADAPTERS", [mixing])
    structure = describe(nn.Sequential(tiny.randomised(Mixing())), {"input": torch.randn(2, 4)})
    assert structure.groups == ()
    assert [left.module for left in structure.left_dense] == ["0.up2"]


class Pair(nn.Module):
    """Gives a tensor and something else, as an attention that also gives its weights does."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, int]:
        return self.down(self.up(x).relu()), 1


class Unpacking(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Pair(), Pair()

    def forward(self, x: Tensor) -> Tensor:
        y, _ = self.first(x)
        z, _ = self.second(x + y)
        return x + y + z


def test_stand_ins_that_do_not_work_are_dropped() -> None:
    module = tiny.randomised(Unpacking())
    working = (("first.up", "pass"), ("first.down", "constant"))
    groups = [
        replace(pair("first.up", "first.down"), placeholders=working),
        replace(pair("second.up", "second.down"), name="second", placeholders=(("second", "constant"),)),
    ]
    # The constant of two samples can be unpacked into two, that of three cannot.
    found = keep_working_placeholders(module, {"x": torch.randn(2, 4)}, groups)
    assert [g.placeholders for g in found] == [working, ()]
    assert [g.min_units for g in (replace(g, stream=Stream("x")) for g in found)] == [0, 1]
