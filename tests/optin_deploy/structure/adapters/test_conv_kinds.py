"""Channels between convolutions of one to three axes, through whatever treats each by itself, from end to end."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import tiny
import torch
import torch.nn.functional as F
import torchvision
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from exporters import onnx_from_program, trace
from optin_deploy.compensation.pair import CompensationPair
from optin_deploy.compensation.refit import compensate
from optin_deploy.criteria.scoring import Scoring, score
from optin_deploy.latency.block_stacks import block_types, build_stack
from optin_deploy.models import checkpoint
from optin_deploy.models.custom import custom_network
from optin_deploy.network import Network, TensorOutputs
from optin_deploy.nn.flops import count_flops
from optin_deploy.pruning.pruner import prune
from optin_deploy.pruning.space import analyze
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.masking import mask_units
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

pytestmark = pytest.mark.slow


CONV = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
INSTANCE = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}
POOL = {1: nn.AvgPool1d, 2: nn.AvgPool2d, 3: nn.MaxPool3d}
DROPOUT = {1: nn.Dropout1d, 2: nn.Dropout2d, 3: nn.Dropout3d}
SIZE = {1: 20, 2: 7, 3: 5}
CHANNELS = 8


class Swish(nn.Module):
    """Learnable, with a number for each channel."""

    def __init__(self, channels: int, dims: int) -> None:
        super().__init__()
        self.dim = channels
        self.beta = nn.Parameter(torch.ones(1, channels, *[1] * dims))

    def forward(self, x: Tensor) -> Tensor:
        return x * (self.beta.reshape(1, self.dim, *[1] * (x.dim() - 2)) * x).sigmoid()


class Gate(nn.Module):
    """Squeeze-and-excitation."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.squeeze, self.excite = CONV[dims](CHANNELS, 4, 1), CONV[dims](4, CHANNELS, 1)
        self.sigmoid = nn.Sigmoid()

    def forward(self, x: Tensor) -> Tensor:
        pooled = x.mean(tuple(range(2, x.dim())), keepdim=True)
        return x * self.sigmoid(self.excite(self.squeeze(pooled).relu()))


Kind = Callable[[int], nn.Module]
# With how many units the channels then have.
KINDS: dict[str, tuple[Kind, int]] = {
    "batch norm": (lambda d: BATCH[d](CHANNELS), 8),
    "synchronised batch norm": (lambda _: nn.SyncBatchNorm(CHANNELS), 8),
    "instance norm": (lambda d: INSTANCE[d](CHANNELS), 8),
    "affine instance norm": (lambda d: INSTANCE[d](CHANNELS, affine=True), 8),
    "tracking instance norm": (lambda d: INSTANCE[d](CHANNELS, affine=True, track_running_stats=True), 8),
    "norm of groups": (lambda _: nn.GroupNorm(4, CHANNELS), 4),
    "norm of groups without numbers": (lambda _: nn.GroupNorm(4, CHANNELS, affine=False), 4),
    "norm of groups of one": (lambda _: nn.GroupNorm(CHANNELS, CHANNELS), 8),
    "slopes": (lambda _: nn.PReLU(CHANNELS), 8),
    "one slope": (lambda _: nn.PReLU(), 8),
    "swish": (partial(Swish, CHANNELS), 8),
    "depthwise": (lambda d: CONV[d](CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS), 8),
    "grouped": (lambda d: CONV[d](CHANNELS, CHANNELS, 3, padding="same", groups=4, dilation=2), 4),
    "depthwise transposed": (lambda d: TRANSPOSED[d](CHANNELS, CHANNELS, 3, padding=1, groups=CHANNELS), 8),
    "grouped transposed": (lambda d: TRANSPOSED[d](CHANNELS, CHANNELS, 3, padding=1, groups=2), 2),
    "dropout": (lambda d: DROPOUT[d](0.5), 8),
    "squeeze and excitation": (Gate, 8),
    "several": (
        lambda d: nn.Sequential(
            nn.GroupNorm(4, CHANNELS),
            nn.PReLU(CHANNELS),
            CONV[d](CHANNELS, CHANNELS, 1, groups=CHANNELS),
            INSTANCE[d](CHANNELS, affine=True),
            nn.GELU(),
        ),
        4,
    ),
    "activation, norm": (lambda d: nn.Sequential(nn.ReLU(), nn.GroupNorm(4, CHANNELS)), 4),
}


class Block(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, dims: int, kind: Kind, last: Kind | None = None) -> None:
        super().__init__()
        self.one, self.between = CONV[dims](6, CHANNELS, 3, padding=1), kind(dims)
        self.two = CONV[dims](CHANNELS, 6, 3, padding=1)
        self.last = nn.Identity() if last is None else last(dims)

    def forward(self, x: Tensor) -> Tensor:
        inner = self.between(self.one(x))
        # Behind a gate the masked channels must be zero as well.
        return x + self.last(self.two(inner if isinstance(self.between, Gate) else F.elu(inner)))


class Residual(nn.Module):
    def __init__(self, dims: int, kind: Kind, last: Kind | None = None) -> None:
        super().__init__()
        self.stem = CONV[dims](2, 6, 3, padding=1)
        self.blocks = nn.ModuleList([Block(dims, kind, last), Block(dims, kind, last)])
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x.relu().flatten(2).mean(2))


def inputs(dims: int, batch: int = 2, seed: int = 0) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 2, *[SIZE[dims]] * dims, generator=torch.Generator().manual_seed(seed))}


def network_of(module: nn.Module, dims: int) -> Network:
    torch.manual_seed(0)
    module = tiny.randomised(module, gain=1.2)
    for norm in module.modules():
        if isinstance(getattr(norm, "running_mean", None), Tensor):
            norm.running_mean += 0.1 * torch.randn_like(norm.running_mean)
            norm.running_var *= 0.5 + torch.rand_like(norm.running_var)
    return tiny.network_around(module, inputs(dims), logits=True)


@cache
def network(name: str, dims: int) -> Network:
    return network_of(Residual(dims, KINDS[name][0]), dims)


@cache
def structure(name: str, dims: int) -> Structure:
    return describe(network(name, dims).module, inputs(dims))


# Of pictures all, of the others some.
EVERY = [(n, 2) for n in KINDS] + list(
    itertools.product(("batch norm", "affine instance norm", "several", "depthwise transposed"), (1, 3))
)


@pytest.mark.parametrize(("name", "dims"), EVERY)
def test_channels_are_found_through_every_kind(name: str, dims: int) -> None:
    found = structure(name, dims)
    assert [(g.name, g.output, g.kind, g.units) for g in found.groups] == [
        (f"blocks.{i}.one", f"blocks.{i}.two", "channel", KINDS[name][1]) for i in range(2)
    ]
    assert found.blocks == ("blocks.0", "blocks.1") and found.left_dense == ()
    assert found.tokens == SIZE[dims] ** dims
    # Whatever is between, it may be that no channels at all are left.
    assert [g.stream.residual for g in found.groups] == [f"blocks.{i}" for i in range(2)]
    assert [g.min_units for g in found.groups] == [0, 0]


@pytest.mark.parametrize(("name", "dims"), EVERY)
@settings(max_examples=10, deadline=None)
@given(data=st.data())
@torch.no_grad()
def test_sliced_is_masked(name: str, dims: int, data: st.DataObject) -> None:
    dense, found = network(name, dims), structure(name, dims)
    plan = data.draw(tiny.plans(found))
    with mask_units(dense.module, found, tiny.masks_of(found, plan)):
        expected = dense.module(**inputs(dims, 3, 1))
    torch.testing.assert_close(
        slice_network(dense.module, found, plan)(**inputs(dims, 3, 1)), expected, rtol=1e-5, atol=1e-5
    )


def half(found: Structure) -> Plan:
    """The last half of the units of every group."""
    return Plan({g.name: tuple(range(g.units // 2, g.units)) for g in found.groups})


def error(dense: nn.Module, small: nn.Module, dims: int) -> float:
    with torch.no_grad():
        wanted, got = (m(**inputs(dims, 16, 99)) for m in (dense, small))
    return float((wanted - got).norm() / wanted.norm())


COMPENSATED = [*itertools.product(("batch norm", "several"), CONV), ("grouped", 2), ("grouped transposed", 2)]


@pytest.mark.parametrize(("name", "dims"), COMPENSATED)
def test_repair_reduces_the_error(name: str, dims: int) -> None:
    dense, found = network(name, dims), structure(name, dims)
    plan = half(found)
    small = slice_network(dense.module, found, plan)
    before = error(dense.module, small, dims)
    compensate(CompensationPair(dense, small, found, plan), [inputs(dims, 8, s) for s in range(1, 5)])
    assert error(dense.module, small, dims) < 0.9 * before


NORMS = ["batch norm", "tracking instance norm", "instance norm", "norm of groups"]


@pytest.mark.parametrize(("name", "dims"), [*itertools.product(NORMS, (1, 2)), (NORMS[0], 3)])
@torch.no_grad()
def test_norms_before_the_addition(name: str, dims: int) -> None:
    dense = network_of(Residual(dims, KINDS["instance norm"][0], _last(name)), dims)
    found = describe(dense.module, inputs(dims))
    affine = name in NORMS[:2]
    assert [(g.stream.residual, g.stream.norm) for g in found.groups] == [
        (f"blocks.{i}", f"blocks.{i}.last") if affine else (None, None) for i in range(2)
    ]
    plan = half(found)
    with mask_units(dense.module, found, tiny.masks_of(found, plan)):
        expected = dense.module(**inputs(dims))
    small = slice_network(dense.module, found, plan)
    torch.testing.assert_close(small(**inputs(dims)), expected, rtol=1e-5, atol=1e-5)
    before = error(dense.module, small, dims)
    compensate(CompensationPair(dense, small, found, plan), [inputs(dims, 8, s) for s in range(1, 5)])
    assert error(dense.module, small, dims) < 0.9 * before


def _last(name: str) -> Kind:
    return {
        "batch norm": lambda d: BATCH[d](6),
        "tracking instance norm": lambda d: INSTANCE[d](6, track_running_stats=True),
        "instance norm": lambda d: INSTANCE[d](6),
        "norm of groups": lambda d: nn.GroupNorm(3, 6),
    }[name]


class Chomp(nn.Module):
    """Leaves out what a causal convolution is padded with."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.size = size

    def forward(self, x: Tensor) -> Tensor:
        return x[..., : -self.size].contiguous()


class Temporal(nn.Module):
    """A temporal convolutional network (Bai et al., 2018)."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(*(TemporalBlock(n, 8, 2**i) for i, n in enumerate((2, 8, 8))))
        self.linear = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.network(x)[:, :, -1])


class TemporalBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int, dilation: int) -> None:
        super().__init__()
        padding = 2 * dilation
        sizes = {"kernel_size": 3, "padding": padding, "dilation": dilation}
        norm = nn.utils.parametrizations.weight_norm
        self.conv1, self.conv2 = norm(nn.Conv1d(inputs, 12, **sizes)), norm(nn.Conv1d(12, outputs, **sizes))
        self.net = nn.Sequential(
            *(self.conv1, Chomp(padding), nn.ReLU(), nn.Dropout(0.2)),
            *(self.conv2, Chomp(padding), nn.ReLU(), nn.Dropout(0.2)),
        )
        self.downsample = nn.Conv1d(inputs, outputs, 1) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        return (self.net(x) + (x if self.downsample is None else self.downsample(x))).relu()


class Features(nn.Module):
    """A row of strided convolutions, as speech models have, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_layers = nn.ModuleList(FeatureLayer(n, 8, norm) for n, norm in ((2, 4), (8, 0), (8, 0), (8, 0)))
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.conv_layers:
            x = layer(x)
        return self.head(x.transpose(1, 2)).mean(1)


class FeatureLayer(nn.Module):
    def __init__(self, inputs: int, outputs: int, norm: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(inputs, outputs, 3, stride=2, bias=False, padding=1)
        self.layer_norm = nn.GroupNorm(outputs, outputs) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(self.layer_norm(self.conv(x)))


class Video(nn.Module):
    """Blocks of torchvision's R3D, narrow."""

    def __init__(self) -> None:
        super().__init__()
        block, conv = torchvision.models.video.resnet.BasicBlock, torchvision.models.video.resnet.Conv3DSimple
        self.stem = nn.Sequential(nn.Conv3d(2, 6, 3, padding=1), nn.BatchNorm3d(6), nn.ReLU())
        shorter = nn.Sequential(nn.Conv3d(6, 8, 1, stride=2, bias=False), nn.BatchNorm3d(8))
        self.layer1 = nn.Sequential(block(6, 6, conv))
        self.layer2 = nn.Sequential(block(6, 8, conv, 2, shorter), block(8, 8, conv))
        self.fc = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.layer2(self.layer1(self.stem(x))).mean((2, 3, 4)))


def row(dims: int) -> nn.Module:
    """Convolutions one after the other, between which things change their size."""
    first = [CONV[dims](2, 8, 3, padding=1), nn.PReLU(8), POOL[dims](2), CONV[dims](8, 6, 1), nn.ReLU()]
    second = [CONV[dims](6, 8, 3, padding=1), nn.GroupNorm(4, 8), nn.Upsample(scale_factor=2)]
    return Pooled(nn.Sequential(*first, *second, TRANSPOSED[dims](8, 5, 2, stride=2)))


class Pooled(nn.Module):
    def __init__(self, layers: nn.Module) -> None:
        super().__init__()
        self.layers, self.head = layers, nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.layers(x).flatten(2).mean(2))


WHOLE: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "instance norms": (lambda: Residual(2, KINDS["affine instance norm"][0], _last("instance norm")), 2),
    "several kinds": (lambda: Residual(2, KINDS["several"][0]), 2),
    "one axis": (lambda: Residual(1, KINDS["batch norm"][0], _last("batch norm")), 1),
    "three axes": (lambda: Residual(3, KINDS["batch norm"][0], _last("batch norm")), 3),
    "temporal": (Temporal, 1),
    "features": (Features, 1),
    "video": (Video, 3),
    "row of one axis": (partial(row, 1), 1),
    "row": (partial(row, 2), 2),
    "row of three axes": (partial(row, 3), 3),
}


@pytest.mark.parametrize("name", WHOLE)
def test_from_end_to_end(name: str, tmp_path: Path) -> None:
    make, dims = WHOLE[name]
    torch.manual_seed(0)
    dense = tiny.randomised(make(), gain=1.2)
    network = custom_network(dense, inputs(dims), logits="output")
    costs = analyze(network).costs
    batches = [inputs(dims, 4, s) for s in range(4)]
    budget = 0.4 + 0.6 * costs.floor / costs.total
    pruned = prune(network, batches, budget, align=1)
    small = pruned.network.module
    assert count_flops(small, network.inputs) <= budget * costs.total
    expected = pruned.network.forward(network.inputs)["output"].detach()
    checkpoint.save(pruned.network, pruned.plan, tmp_path / "checkpoint")
    again = checkpoint.load(tmp_path / "checkpoint", dense)
    torch.testing.assert_close(network.forward(network.inputs, again)["output"], expected, rtol=0, atol=0)
    axes = {n: {0: "batch"} for n in network.inputs}
    program = trace(TensorOutputs(small, pruned.network.outputs), network.inputs, axes)
    onnx_from_program(program, tmp_path / "m.onnx", output_names=["output"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch in batches[:2]:
        (found,) = session.run(None, {n: t.numpy() for n, t in batch.items()})
        wanted = pruned.network.forward(batch)["output"].detach()
        torch.testing.assert_close(torch.from_numpy(found), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("criterion", ["trajectory", "trajectory-obs", "magnitude", "random", "fisher"])
@pytest.mark.parametrize("dims", CONV)
def test_criteria(criterion: Any, dims: int) -> None:
    dense, found = network("several", dims), structure("several", dims)
    costs = analyze(dense).costs
    labels = [torch.tensor([0, 1, 2, 0])] if criterion == "fisher" else None
    scores = score(dense, found, costs, [inputs(dims, 4, 1)], Scoring(criterion), labels=labels)
    assert {n: tuple(s.shape) for n, s in scores.items()} == {g.name: (g.units,) for g in found.groups}
    assert all(len(s.unique()) == len(s) for s in scores.values())


@pytest.mark.parametrize("name", ["instance norms", "temporal", "row of one axis", "row of three axes", "features"])
@torch.no_grad()
def test_stacks_for_latency_tables(name: str) -> None:
    make, dims = WHOLE[name]
    network = custom_network(tiny.randomised(make()), inputs(dims))
    found = describe(network.module, network.inputs)
    for kind in block_types(network.module, found, network.inputs):
        sizes = {g.name: max(1, g.units // 2) for g in kind.groups[0]}
        made, given_inputs = build_stack(network.module, found, kind, sizes, 2)
        assert made(**given_inputs).isfinite().all()
