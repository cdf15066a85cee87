"""The CNNs that people deploy, small: sliced equals masked, budgets hold, compensation, checkpoint and export work."""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import timm
import tiny
import torch
import torchvision
from timm.models import efficientnet, mobilenetv3, regnet, resnet, vgg
from torch import Tensor, nn

from exporters import onnx_from_program, trace
from optin_deploy.latency.block_stacks import block_types, build_stack
from optin_deploy.latency.tables import table_points
from optin_deploy.latency.target import LatencySettings
from optin_deploy.models import checkpoint
from optin_deploy.network import Network, TensorOutputs
from optin_deploy.nn.flops import count_flops
from optin_deploy.pruning.pruner import prune
from optin_deploy.pruning.space import analyze
from optin_deploy.search.knapsack import BUDGET_WINDOW
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.masking import mask_units
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

pytestmark = pytest.mark.slow


def _resnet(block: Any, **arguments: Any) -> nn.Module:
    sizes = {"layers": (1, 2, 1, 1), "channels": (16, 16, 24, 24), "stem_width": 8, "num_classes": 3}
    return resnet.ResNet(block, **{**sizes, **arguments})


def _timm_regnet(**arguments: Any) -> nn.Module:
    config = regnet.RegNetCfg(depth=5, w0=16, wa=16.0, wm=1.6, group_size=8, **arguments)
    return regnet.RegNet(config, num_classes=3)


def _tv_regnet() -> nn.Module:
    parameters = torchvision.models.regnet.BlockParams.from_init_params(5, 16, 16.0, 1.6, 8, se_ratio=0.25)
    return torchvision.models.RegNet(parameters, num_classes=3)


def _mobilenet() -> nn.Module:
    rows = [
        ["ds_r1_k3_s1_e1_c8_se0.25_nre"],
        ["ir_r2_k3_s2_e4_c12"],
        ["ir_r1_k5_s1_e4_c12_se0.25"],
        ["cn_r1_k1_s1_c32"],
    ]
    blocks = timm.models._efficientnet_builder.decode_arch_def(rows)
    return mobilenetv3.MobileNetV3(blocks, num_classes=3, stem_size=8, num_features=16, act_layer=nn.Hardswish)


def _efficientnet() -> nn.Module:
    rows = [["er_r1_k3_s1_e4_c8"], ["ir_r2_k3_s2_e4_c12_se0.25"]]
    blocks = timm.models._efficientnet_builder.decode_arch_def(rows)
    return efficientnet.EfficientNet(blocks, num_classes=3, stem_size=8, num_features=16, act_layer=nn.SiLU)


def _tv_mobilenet() -> nn.Module:
    row = partial(torchvision.models.mobilenetv3.InvertedResidualConfig, dilation=1, width_mult=1.0)
    rows = [row(8, 3, 16, 8, False, "RE", 1), row(8, 5, 32, 16, True, "HS", 2), row(16, 3, 32, 16, True, "HS", 1)]
    return torchvision.models.MobileNetV3(rows, 16, num_classes=3)


def _tv_efficientnet() -> nn.Module:
    row = torchvision.models.efficientnet.MBConvConfig
    rows = [row(1, 3, 1, 8, 8, 1), row(4, 3, 2, 8, 12, 2)]
    return torchvision.models.EfficientNet(rows, dropout=0.0, num_classes=3, last_channel=16)


def _tv_resnet(block: Any, norm: Any = nn.BatchNorm2d) -> nn.Module:
    def shortcut(inputs: int, outputs: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(inputs, outputs, 1, 2), norm(outputs))

    block, wide = partial(block, norm_layer=norm), block.expansion
    stem = [nn.Conv2d(3, 8 * wide, 3, 2, 1), nn.BatchNorm2d(8 * wide), nn.ReLU()]
    blocks = [block(8 * wide, 8), block(8 * wide, 12, 2, shortcut(8 * wide, 12 * wide)), block(12 * wide, 12)]
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12 * wide, 3))


def _timm_vgg() -> nn.Module:
    return vgg.VGG([8, 16, "M", 16, 16, "M"], num_classes=3, mlp_ratio=0.001, norm_layer=nn.BatchNorm2d)


def _tv_vgg() -> nn.Module:
    layers = torchvision.models.vgg.make_layers([8, 16, "M", 16, 16, "M"], batch_norm=False)
    return nn.Sequential(layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 3))


# The number of groups, and of those the inner ones of bottlenecks and the ones with squeeze-and-excitation.
FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, int, int]]] = {
    "resnet": (partial(_resnet, resnet.BasicBlock), (5, 0, 0)),
    "resnet_bottleneck": (partial(_resnet, resnet.Bottleneck), (10, 5, 0)),
    "resnext": (partial(_resnet, resnet.Bottleneck, cardinality=4, base_width=16), (5, 0, 0)),
    "tv_resnet": (partial(_tv_resnet, torchvision.models.resnet.BasicBlock), (3, 0, 0)),
    "tv_resnet_bottleneck": (partial(_tv_resnet, torchvision.models.resnet.Bottleneck), (6, 3, 0)),
    "tv_resnet_frozen": (
        partial(_tv_resnet, torchvision.models.resnet.Bottleneck, torchvision.ops.FrozenBatchNorm2d),
        (6, 3, 0),
    ),
    "regnetx": (_timm_regnet, (5, 0, 0)),
    "regnety": (partial(_timm_regnet, se_ratio=0.25), (5, 0, 5)),
    "tv_regnet": (_tv_regnet, (5, 0, 5)),
    "mobilenet_v3": (_mobilenet, (3, 0, 1)),
    "tv_mobilenet_v3": (_tv_mobilenet, (3, 0, 2)),
    "efficientnet": (_efficientnet, (3, 0, 2)),
    "tv_efficientnet": (_tv_efficientnet, (2, 0, 2)),
    "vgg": (_timm_vgg, (3, 0, 0)),
    "tv_vgg": (_tv_vgg, (2, 0, 0)),
}


def _images(size: int = 2, seed: int = 0) -> dict[str, Tensor]:
    return {"x": torch.randn(size, 3, 32, 32, generator=torch.Generator().manual_seed(seed))}


@cache
def _network(name: str) -> Network:
    torch.manual_seed(0)
    module = FAMILIES[name][0]()
    inputs = _images()
    if isinstance(module, nn.Sequential):
        inputs = {"input": inputs["x"]}
    return tiny.network_around(tiny.randomised(module, gain=1.4), inputs, logits=True)


@cache
def _structure(name: str) -> Structure:
    return analyze(_network(name)).structure


@pytest.mark.parametrize("name", FAMILIES)
def test_all_inner_channels_are_found(name: str) -> None:
    groups = _structure(name).groups
    found = (len(groups), sum(g.parent is not None for g in groups), sum(g.mask_at is not None for g in groups))
    assert found == FAMILIES[name][1]
    assert _structure(name).left_dense == ()


@pytest.mark.parametrize("name", FAMILIES)
def test_sliced_is_masked_and_costs_what_is_predicted(name: str) -> None:
    network, structure = _network(name), _structure(name)
    for plan in (tiny.uneven_plan(structure), _halves(structure), tiny.empty_plan(structure)):
        small = slice_network(network.module, structure, plan)
        assert analyze(network).costs.of(plan) == pytest.approx(count_flops(small, network.inputs), rel=1e-9)
        with torch.no_grad(), mask_units(network.module, structure, tiny.masks_of(structure, plan)):
            expected = network.forward(network.inputs)["output"]
        given = network.forward(network.inputs, small)["output"]
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def _halves(structure: Structure) -> Plan:
    return Plan({g.name: tuple(range(0, g.units, 2)) for g in structure.groups})


@pytest.mark.parametrize("name", ["tv_resnet_bottleneck", "tv_resnet_frozen", "regnety", "tv_efficientnet"])
def test_stacks_of_blocks_run_at_all_sizes(name: str) -> None:
    network, structure = _network(name), _structure(name)
    for kind in block_types(network.module, structure, network.inputs):
        for group in (g for g in kind.groups[0] if g.parent is None):
            for units, width, sizes in table_points(structure, group, LatencySettings()):
                made, inputs = build_stack(network.module, structure, kind, sizes, 1)
                assert bool(made(**inputs).isfinite().all())
                assert (width is None) == (structure.child(group.name) is None)
                assert sizes[group.name] == units


@pytest.mark.parametrize("name", ["tv_resnet_bottleneck", "tv_regnet", "tv_efficientnet"])
def test_a_run_with_compensation_checkpoint_and_export(name: str, tmp_path: Path) -> None:
    network = _network(name)
    argument = next(iter(network.inputs))
    batches = [{argument: _images(4, seed)["x"]} for seed in range(4)]
    costs = analyze(network).costs
    flops = costs.floor / costs.total * 0.4 + 0.6
    pruned = prune(network, batches, flops, align=1)
    small = pruned.network.module
    share = count_flops(small, network.inputs) / costs.total
    assert flops - BUDGET_WINDOW <= share <= flops + 1e-9
    expected = pruned.network.forward(network.inputs)["output"]

    checkpoint.save(pruned.network, pruned.plan, tmp_path / "checkpoint")
    again = checkpoint.load(tmp_path / "checkpoint", network.module)
    assert torch.equal(network.forward(network.inputs, again)["output"], expected)

    wrapped = TensorOutputs(small, pruned.network.outputs)
    axes = {argument: {0: "batch"}}
    onnx_from_program(
        trace(wrapped, network.inputs, axes), tmp_path / "m.onnx", output_names=["output"], dynamic_axes=axes
    )
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch in ({argument: batches[0][argument][:1]}, batches[1]):
        (given,) = session.run(None, {argument: batch[argument].numpy()})
        wanted = pruned.network.forward(batch)["output"].detach()
        torch.testing.assert_close(torch.from_numpy(given), wanted, rtol=1e-3, atol=1e-4 * float(wanted.abs().max()))
