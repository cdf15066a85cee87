"""The families of timm, tiny and with random weights: what of each can be cut, and that cut is masked."""

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import timm
import tiny
import torch
from timm.layers import GroupNorm1
from timm.models.metaformer import MetaFormer
from timm.models.mlp_mixer import MlpMixer
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import nn

import optin_deploy
from optin_deploy.criteria.scoring import Scoring
from optin_deploy.network import Network
from optin_deploy.nn.flops import count_flops
from optin_deploy.pruning.space import PruningSpace, analyze
from optin_deploy.search.costs import flop_costs
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.masking import mask_units
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

pytestmark = pytest.mark.slow


_VIT = {"patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 4}
_WINDOWS = {"img_size": 32, "depths": (2, 2), "window_size": 4}
_STAGES = {"depths": (1, 1, 1, 1)}
_PYRAMID = {**_STAGES, "embed_dims": (16, 16, 24, 32)}
# timm's name of a model, its picture's size in pixels, what is made smaller; heads, neurons and channels prunable in
# so many groups, and how many groups' streams are known.
FAMILIES: dict[str, tuple[str, int, Mapping[str, Any], tuple[int, int, int], int]] = {
    "vit": ("vit_tiny_patch16_224", 32, {**_VIT, "img_size": 32}, (2, 2, 0), 4),
    "deit3": ("deit3_small_patch16_224", 32, {**_VIT, "img_size": 32}, (2, 2, 0), 4),
    "beit": ("beit_base_patch16_224", 32, {**_VIT, "img_size": 32, "init_values": 0.1}, (2, 2, 0), 4),
    "beit_shared": ("beit_base_patch16_224", 32, {**_VIT, "img_size": 32, "use_rel_pos_bias": False}, (2, 2, 0), 4),
    "eva02": ("eva02_tiny_patch14_224", 32, {**_VIT, "img_size": 32}, (2, 2, 0), 4),
    "eva02_norms": ("eva02_base_patch14_224", 32, {**_VIT, "img_size": 32}, (2, 2, 0), 4),
    "dinov2": ("vit_small_patch14_reg4_dinov2", 32, {**_VIT, "img_size": 32}, (2, 2, 0), 4),
    "dinov2_swiglu": (
        "vit_giant_patch14_reg4_dinov2",
        32,
        {**_VIT, "embed_dim": 24, "img_size": 32, "init_values": 0.1},
        (2, 2, 0),
        4,
    ),
    "dinov3": ("vit_small_patch16_dinov3", 32, {**_VIT, "img_size": 32}, (2, 2, 0), 4),
    "cait": (
        "cait_xxs24_224",
        32,
        {**_VIT, "img_size": 32, "depth_token_only": 1, "init_values": 0.1},
        (1, 3, 0),
        3,
    ),
    "xcit": (
        "xcit_tiny_12_p8_224",
        32,
        {"embed_dim": 16, "depth": 2, "num_heads": 4, "img_size": 32, "eta": 0.1},
        (4, 4, 1),
        4,
    ),
    "swin": ("swin_tiny_patch4_window7_224", 32, {**_WINDOWS, "embed_dim": 16, "num_heads": (2, 4)}, (4, 4, 0), 0),
    "swin_v2": ("swinv2_tiny_window8_256", 32, {**_WINDOWS, "embed_dim": 24, "num_heads": (3, 6)}, (4, 4, 0), 0),
    "pvt_v2": ("pvt_v2_b0", 64, {**_PYRAMID, "num_heads": (1, 2, 3, 4)}, (4, 4, 0), 8),
    "pvt_v2_linear": ("pvt_v2_b2_li", 64, {**_PYRAMID, "num_heads": (1, 2, 3, 4)}, (4, 4, 0), 8),
    "twins_global": (
        "twins_pcpvt_small",
        64,
        {**_PYRAMID, "num_heads": (2, 2, 3, 4), "img_size": 64},
        (4, 4, 0),
        8,
    ),
    "twins_local": (
        "twins_svt_small",
        64,
        {**_PYRAMID, "num_heads": (2, 2, 3, 4), "img_size": 64, "depths": (1, 1, 2, 1), "wss": (3, 4, 4, 2)},
        (5, 5, 0),
        10,
    ),
    "levit": (
        "levit_128s",
        64,
        {"img_size": 64, "embed_dim": (16, 24, 32), "key_dim": 8, "num_heads": (2, 3, 4), "depth": (1, 1, 1)},
        (5, 5, 2),
        8,
    ),
    "coat": (
        "coat_lite_tiny",
        64,
        {"img_size": 64, "embed_dims": (16, 16, 24, 32), "serial_depths": (1, 1, 1, 1)},
        (0, 4, 0),
        4,
    ),
    "efficientformer": (
        "efficientformer_l1",
        224,
        {"embed_dims": (8, 8, 8, 16), "depths": (1, 1, 1, 2)},
        (1, 1, 5),
        6,
    ),
    "efficientformer_v2": (
        "efficientformerv2_s0",
        64,
        {"img_size": 64, "embed_dims": (16, 16, 24, 32), "depths": (1, 1, 1, 1)},
        (0, 0, 5),
        4,
    ),
    "hiera": (
        "hiera_tiny_224",
        64,
        {"img_size": (64, 64), "embed_dim": 16, "num_heads": 2, "stages": (1, 1, 2, 1), "mask_unit_size": (4, 4)},
        (5, 5, 0),
        7,
    ),
    "naflexvit": ("naflexvit_base_patch16_gap", 32, _VIT, (2, 2, 0), 4),
    "vit_norms": (
        "vit_tiny_patch16_224",
        32,
        {**_VIT, "img_size": 32, "scale_attn_norm": True, "scale_mlp_norm": True},
        (2, 2, 0),
        4,
    ),
    "convnext_v2": ("convnextv2_atto", 64, {**_STAGES, "dims": (16, 16, 24, 32)}, (0, 4, 0), 4),
    "convnext": ("convnext_atto", 64, {**_STAGES, "dims": (16, 16, 24, 32)}, (0, 0, 4), 4),
}


def _mvit() -> nn.Module:
    sizes = {"depths": (1, 2), "embed_dim": (16, 32), "num_heads": (2, 4), "stride_q": ((1, 1), (2, 2))}
    return MultiScaleVit(MultiScaleVitCfg(**sizes), img_size=(64, 64), num_classes=3)


def _mixer() -> nn.Module:
    return MlpMixer(num_classes=3, img_size=32, patch_size=8, num_blocks=2, embed_dim=16)


def _poolformer() -> nn.Module:
    sizes = {"depths": (1, 1, 1, 1), "dims": (16, 16, 24, 32), "layer_scale_init_values": 0.1}
    return MetaFormer(num_classes=3, norm_layers=GroupNorm1, use_mlp_head=False, **sizes)


# Those that no name of timm's builds small: the same.
OWN: dict[str, tuple[Callable[[], nn.Module], int, tuple[int, int, int], int]] = {
    "mvit_v2": (_mvit, 64, (3, 3, 0), 5),
    "mixer": (_mixer, 32, (0, 4, 0), 2),
    "poolformer": (_poolformer, 64, (0, 4, 0), 4),
}


def build(name: str) -> tuple[nn.Module, int]:
    """The module, and the size of its pictures in pixels."""
    torch.manual_seed(0)
    if name in OWN:
        return tiny.randomised(OWN[name][0]()), OWN[name][1]
    model, size, arguments, *_ = FAMILIES[name]
    return tiny.randomised(timm.create_model(model, num_classes=3, **arguments)), size


@cache
def network(name: str) -> Network:
    """One object for all tests, so leave it as it is; it is named by the module's class."""
    module, size = build(name)
    inputs = {"x": torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(0))}
    return tiny.network_around(module, inputs, logits=True)


@cache
def structure(name: str) -> Structure:
    return describe(network(name).module, network(name).inputs)


NAMES = (*FAMILIES, *OWN)


@pytest.mark.parametrize("name", NAMES)
def test_groups_of_families(name: str) -> None:
    expected = (FAMILIES[name] if name in FAMILIES else OWN[name])[-2:]
    groups = structure(name).without_widths().groups
    kinds = tuple(sum(g.kind == kind for g in groups) for kind in ("head", "neuron", "channel"))
    assert (kinds, sum(g.stream.known for g in groups)) == expected


@pytest.mark.parametrize("name", NAMES)
def test_cut_is_masked(name: str) -> None:
    dense = network(name)
    plan = Plan({g.name: kept_some(g, i) for i, g in enumerate(structure(name).groups)})
    with torch.no_grad():
        with mask_units(dense.module, structure(name), tiny.masks_of(structure(name), plan)):
            expected = dense.forward(dense.inputs)["output"]
        small = slice_network(dense.module, structure(name), plan)
        given = dense.forward(dense.inputs, small)["output"]
    torch.testing.assert_close(given, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max().clamp_min(1)))
    costs = flop_costs(dense.module, structure(name), dense.inputs)
    assert costs.of(plan) == pytest.approx(count_flops(small, dense.inputs), rel=1e-3)


def kept_some(group: Group, seed: int) -> tuple[int, ...]:
    """About half of the units, or now and then as few as can be."""
    number = group.min_units if seed % 5 == 4 and group.kind != "width" else max(1, (group.units + seed % 2) // 2)
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randperm(group.units, generator=generator)[:number].sort().values.tolist())


@pytest.mark.parametrize("name", NAMES)
def test_half_of_the_flops(name: str) -> None:
    dense = network(name)
    space = analyze(dense)
    asked = max(0.5, round(lowest(space) + 0.06, 2))
    if space.costs.floor <= 0.4 * space.costs.total:
        assert asked == 0.5
    shape = (3, *dense.inputs["x"].shape[1:])
    batches = [{"x": torch.randn(shape, generator=torch.Generator().manual_seed(i))} for i in (1, 2)]
    small = optin_deploy.prune(dense, batches, asked, scoring=Scoring(criterion="magnitude"), align=8).network
    reached = count_flops(small.module, dense.inputs) / count_flops(dense.module, dense.inputs)
    # Few heads are coarse steps.
    assert asked - 0.05 <= reached <= asked
    given = small.forward(dense.inputs)["output"]
    assert given.isfinite().all()


def lowest(space: PruningSpace) -> float:
    """What can be reached, as a part of the FLOPs."""
    kept = {g.name: range(g.min_units if g.kind != "width" else 1) for g in space.structure.groups}
    return space.costs.of(Plan({name: tuple(units) for name, units in kept.items()})) / space.costs.total
