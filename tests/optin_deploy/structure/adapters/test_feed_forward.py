"""Feed-forward networks of many kinds: described by what they hold, and cut as they are masked."""

import re
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import timm.layers
import tiny
import torch
import torch.nn.functional as F
import transformers
from timm.models.efficientformer import ConvMlpWithNorm
from timm.models.levit import LevitMlp
from timm.models.mlp_mixer import MixerBlock
from timm.models.pvt_v2 import MlpWithDepthwiseConv
from torch import Tensor, nn
from transformers.models.convnext.modeling_convnext import ConvNextLayer
from transformers.models.convnextv2.modeling_convnextv2 import ConvNextV2Layer
from transformers.models.llama.modeling_llama import LlamaMLP
from transformers.models.modernbert.modeling_modernbert import ModernBertMLP
from transformers.models.t5.modeling_t5 import T5DenseActDense, T5DenseGatedActDense

from optin_deploy.structure.adapters.feed_forward import feed_forward
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Group, LeftDense, Stream, Structure
from optin_deploy.structure.masking import mask_units
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

pytestmark = pytest.mark.slow


TOKENS, MAP = (2, 6, 8), (2, 8, 3, 4)


class LocalFeedForward(nn.Module):
    """CeiT's kind: a linear layer, a depthwise convolution over the patches, a linear layer; norms and a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.expand = nn.Sequential(nn.Conv2d(8, 24, 1), nn.BatchNorm2d(24), nn.GELU())
        self.local = nn.Sequential(nn.Conv2d(24, 24, 3, padding=1, groups=24), nn.BatchNorm2d(24), nn.GELU())
        self.shrink = nn.Sequential(nn.Conv2d(24, 8, 1), nn.BatchNorm2d(8))

    def forward(self, x: Tensor) -> Tensor:
        patches = self.norm(x).transpose(1, 2).unflatten(2, (2, 3))
        return x + self.shrink(self.local(self.expand(patches))).flatten(2).transpose(1, 2)


class Depthwise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(24, 24, 3, padding=1, groups=24)

    def forward(self, x: Tensor, height: int, width: int) -> Tensor:
        return self.conv(x.transpose(1, 2).unflatten(2, (height, width))).flatten(2).transpose(1, 2)


class MixFeedForward(nn.Module):
    """SegFormer's kind: the depthwise convolution sits in a module that must be told how the tokens lie."""

    def __init__(self) -> None:
        super().__init__()
        self.dense1, self.local, self.dense2 = nn.Linear(8, 24), Depthwise(), nn.Linear(24, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense2(F.gelu(self.local(self.dense1(x), 2, 3)))


class WithSize(nn.Module):
    """A feed-forward network that must be told how its tokens lie."""

    def __init__(self, inner: nn.Module, *size: Any) -> None:
        super().__init__()
        self.inner, self.size = inner, size

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x, *self.size)


class ChannelsLast(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.movedim(1, -1)).movedim(-1, 1)


def _config(cls: Any, **arguments: Any) -> Any:
    return cls(hidden_size=8, intermediate_size=24, num_attention_heads=2, num_key_value_heads=2, **arguments)


def _t5(module: type[nn.Module], activation: str) -> nn.Module:
    return module(transformers.T5Config(d_model=8, d_ff=24, feed_forward_proj=activation, num_heads=2))


# How to build it, its input's shape, and how many units and maps into them there are.
FEED_FORWARDS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "mlp": (partial(timm.layers.Mlp, 8, 24), TOKENS, 24),
    "mlp of convolutions": (partial(timm.layers.Mlp, 8, 24, use_conv=True), MAP, 24),
    "conv mlp with a norm": (partial(timm.layers.ConvMlp, 8, 24, norm_layer=nn.BatchNorm2d), MAP, 24),
    "glu": (partial(timm.layers.GluMlp, 8, 48), TOKENS, 24),
    "glu of convolutions": (partial(timm.layers.GluMlp, 8, 48, use_conv=True, gate_last=False), MAP, 24),
    "swiglu": (partial(timm.layers.SwiGLU, 8, 24), TOKENS, 24),
    "packed swiglu": (partial(timm.layers.SwiGLUPacked, 8, 48), TOKENS, 24),
    "levit": (partial(LevitMlp, 8, 24), TOKENS, 24),
    "efficientformer": (partial(ConvMlpWithNorm, 8, 24), MAP, 24),
    "pvt": (lambda: WithSize(MlpWithDepthwiseConv(8, 24, extra_relu=True), (2, 3)), TOKENS, 24),
    "ceit": (LocalFeedForward, TOKENS, 24),
    "segformer": (MixFeedForward, TOKENS, 24),
    "sequential": (lambda: nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 8)), TOKENS, 24),
    "t5": (partial(_t5, T5DenseActDense, "relu"), TOKENS, 24),
    "t5 gated": (partial(_t5, T5DenseGatedActDense, "gated-gelu"), TOKENS, 24),
    "llama": (lambda: LlamaMLP(_config(transformers.LlamaConfig)), TOKENS, 24),
    "modernbert": (lambda: ModernBertMLP(_config(transformers.ModernBertConfig)), TOKENS, 24),
    "convnext": (lambda: ConvNextLayer(transformers.ConvNextConfig(), 8), MAP, 32),
    "layer norm": (partial(timm.layers.Mlp, 8, 24, norm_layer=nn.LayerNorm), TOKENS, 24),
    "layer norm of channels": (partial(timm.layers.ConvMlp, 8, 24, norm_layer=timm.layers.LayerNorm2d), MAP, 24),
    "swiglu with a norm": (partial(timm.layers.SwiGLU, 8, 24, norm_layer=nn.LayerNorm), TOKENS, 24),
    "grn": (lambda: ChannelsLast(timm.layers.GlobalResponseNormMlp(8, 24)), MAP, 24),
    "grn of channels": (partial(timm.layers.GlobalResponseNormMlp, 8, 24, use_conv=True), MAP, 24),
    "convnext v2": (lambda: ConvNextV2Layer(transformers.ConvNextV2Config(), 8), MAP, 32),
    "torch": (lambda: nn.TransformerEncoderLayer(8, 2, 24, activation=F.silu, batch_first=True), TOKENS, 24),
}


def described(name: str) -> tuple[nn.Module, dict[str, Tensor], Structure, Group]:
    build, shape, units = FEED_FORWARDS[name]
    module = nn.Sequential(tiny.randomised(build())).double()
    inputs = {"input": torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)}
    structure = describe(module, inputs)
    (group,) = [g for g in structure.groups if g.kind in ("neuron", "channel")]
    assert group.units == units
    assert not [left for left in structure.left_dense if left.module.startswith(group.name)]
    return module, inputs, structure, group


@pytest.mark.parametrize("kept", [(0, 3, 4, 11, 20, 23), (7,), ()])
@pytest.mark.parametrize("name", FEED_FORWARDS)
def test_it_is_cut_as_it_is_masked(name: str, kept: tuple[int, ...]) -> None:
    module, inputs, structure, group = described(name)
    plan = Plan({group.name: kept})
    if not kept:
        structure = replace(
            structure, groups=tuple(replace(g, stream=Stream("0", in_place=True)) for g in structure.groups)
        )
    with torch.no_grad():
        with mask_units(module, structure, tiny.masks_of(structure, plan)):
            expected = module(**inputs)
        small = slice_network(module, structure, plan)
        # transformers' global response norm has an eps of its own that does not shrink.
        torch.testing.assert_close(small(**inputs), expected, rtol=1e-4, atol=1e-5)
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in module.parameters())


def test_a_module_that_holds_nothing_else_is_one_owner() -> None:
    group = described("swiglu")[-1]
    assert (group.name, group.cost.modules, group.output) == ("0", ("0",), "0.fc2")
    assert [(s.module, s.axis) for s in group.sides] == [("0.fc1_g", "out"), ("0.fc1_x", "out"), ("0.fc2", "in")]


def test_maps_next_to_other_layers_are_the_cost_modules() -> None:
    group = described("torch")[-1]
    assert (group.name, group.cost.modules) == ("0.linear1", ("0.linear1", "0.linear2"))
    assert group.placeholders == (("0.linear1", "pass"), ("0.linear2", "constant"))


def test_a_mixer_has_two() -> None:
    module = nn.Sequential(tiny.randomised(MixerBlock(8, 6)), tiny.randomised(MixerBlock(8, 6)))
    structure = describe(module, {"input": torch.randn(TOKENS)})
    assert [g.name for g in structure.groups] == ["0.mlp_tokens", "0.mlp_channels", "1.mlp_tokens", "1.mlp_channels"]
    # Tokens come back transposed before they are added.
    assert [g.stream.residual for g in structure.groups][1::2] == ["0.norm2", "1.norm2"]


def test_a_norm_over_all_neurons_of_another_kind_leaves_it_dense() -> None:
    module = timm.layers.Mlp(8, 24, norm_layer=nn.RMSNorm)
    given = feed_forward("mlp", module, "", nn.Module())
    assert isinstance(given, LeftDense)
    assert re.search(r"all neurons.*fc2", given.reason)


@pytest.mark.parametrize("name", ["layer norm", "grn"])
def test_a_norm_over_all_neurons_is_cut_twice_as_it_is_cut_once(name: str) -> None:
    module, inputs, structure, group = described(name)
    once = slice_network(module, structure, Plan({group.name: (3, 11, 20)}))
    half = slice_network(module, structure, Plan({group.name: (0, 3, 11, 19, 20, 23)}))
    twice = slice_network(half, describe(half, inputs), Plan({group.name: (1, 2, 4)}))
    with torch.no_grad():
        torch.testing.assert_close(twice(**inputs), once(**inputs), rtol=0, atol=1e-5)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.kv, self.proj, self.num_heads = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(8, 8), 2


OTHERS = {
    "squeeze and excitation": partial(timm.layers.SqueezeExcite, 64, rd_ratio=0.25),
    "attention": Attention,
    "one map": partial(nn.Sequential, nn.Linear(8, 24), nn.GELU()),
    "sizes that do not fit": partial(nn.Sequential, nn.Linear(8, 24), nn.GELU(), nn.Linear(23, 8)),
    "something between": partial(nn.Sequential, nn.Conv2d(8, 24, 1), nn.Conv2d(24, 24, 3), nn.Conv2d(24, 8, 1)),
    "gates of another size": partial(nn.Sequential, nn.Linear(8, 24), nn.Linear(8, 12), nn.Linear(24, 8)),
    "classifier": partial(nn.Sequential, nn.Linear(8, 24), nn.GELU(), nn.Linear(24, 3)),
    "two of them": partial(nn.Sequential, timm.layers.Mlp(8, 24), timm.layers.Mlp(8, 24)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_modules_are_not_matched(name: str) -> None:
    assert feed_forward("module", OTHERS[name](), "", nn.Module()) is None
