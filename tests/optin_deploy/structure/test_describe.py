import pytest
import timm.layers
import tiny
import torch
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import Tensor, nn

from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Group, LayerAxis, LeftDense, Structure

pytestmark = pytest.mark.slow


def summary(structure: Structure, prefix: str) -> list[tuple[object, ...]]:
    """Name, kind, units, width, projection, stream and LayerScale of the groups under ``prefix``."""
    return [
        tuple(v.removeprefix(prefix) if isinstance(v, str) else v for v in values)
        for g in structure.groups
        if g.name.startswith(prefix)
        for values in [(g.name, g.kind, g.units, g.width, g.output, g.stream.residual, g.stream.scale)]
    ]


# Prefix of the second block, tokens of a sample, and the block's two groups; a stream "" is the block itself.
TIMM = [("attn", "head", 4, 4, "attn.proj", "", None), ("mlp", "neuron", 24, 1, "mlp.fc2", "norm2", None)]
LAYER_SCALE = [(*TIMM[0][:6], "ls1.gamma"), (*TIMM[1][:6], "ls2.gamma")]
HF_VIT = [
    ("attention", "head", 4, 4, "attention.o_proj", "", None),
    ("mlp", "neuron", 24, 1, "mlp.fc2", "layernorm_after", None),
]
DINOV2 = [
    ("attention", "head", 4, 4, "attention.o_proj", "", "layer_scale1.lambda1"),
    ("mlp", "neuron", 32, 1, "mlp.fc2", "norm2", "layer_scale2.lambda1"),
]
HF_BLOCK = "layers.1"
if not tiny.renamed():
    HF_VIT = [
        ("attention.attention", "head", 4, 4, "attention.output.dense", "", None),
        ("intermediate", "neuron", 24, 1, "output.dense", "layernorm_after", None),
    ]
    DINOV2 = [("attention.attention", *DINOV2[0][1:4], "attention.output.dense", *DINOV2[0][5:]), DINOV2[1]]
    HF_BLOCK = "encoder.layer.1"
BERT = [
    ("attention.self", "head", 4, 4, "attention.output.dense", "", None),
    ("intermediate", "neuron", 24, 1, "output.dense", "intermediate", None),
]
DISTILBERT = [
    ("attention", "head", 4, 4, "attention.out_lin", "", None),
    ("ffn", "neuron", 24, 1, "ffn.lin2", "ffn", None),
]
EXPECTED = {
    "vit": ("blocks.1", 5, TIMM),
    "vit_layer_scale": ("blocks.1", 5, LAYER_SCALE),
    "vit_pooled": ("blocks.1", 4, TIMM),
    "vit_qk_norm": ("blocks.1", 5, TIMM),
    "vit_gated": ("blocks.1", 5, TIMM),
    "vit_without_biases": ("blocks.1", 5, TIMM),
    "deit_distilled": ("blocks.1", 6, TIMM),
    "segmenter": ("backbone.blocks.1", 5, TIMM),
    "upsampler": ("backbone.blocks.1", 5, TIMM),
    "hf_vit": (f"vit.{HF_BLOCK}", 5, HF_VIT),
    "hf_deit": (HF_BLOCK, 6, HF_VIT),
    "dinov2": ("encoder.layer.1", 5, DINOV2),
    "bert": ("encoder.layer.1", 7, BERT),
    "bert_classifier": ("bert.encoder.layer.1", 7, BERT),
    "roberta": ("roberta.encoder.layer.1", 7, BERT),
    "electra": ("electra.encoder.layer.1", 7, BERT),
    "distilbert": ("transformer.layer.1", 7, DISTILBERT),
}
DECODERS = {"segmenter": ("decoder.2",), "upsampler": ("decoder.up2", "decoder.last")}
NARROWABLE = EXPECTED.keys() - {"vit_qk_norm", "vit_gated"}


def with_width(heads: tuple[object, ...], neurons: tuple[object, ...]) -> list[tuple[object, ...]]:
    """A block's two groups and, behind the heads, their width: as many units as a head has dimensions."""
    return [heads, (f"{heads[0]}.width", "width", heads[3], 1, *heads[4:]), neurons]


@pytest.mark.parametrize("name", tiny.NAMES)
def test_groups_and_streams_of_every_network(name: str) -> None:
    block, tokens, groups = EXPECTED[name]
    structure = tiny.structure(name)
    decoder = DECODERS.get(name, ())
    assert structure.blocks == (block.replace(".1", ".0"), block, *decoder)
    assert structure.compared == structure.blocks[:2]
    assert structure.tokens == tokens
    assert structure.left_dense == ()
    expected = with_width(*groups) if name in NARROWABLE else groups
    assert [g.layer for g in structure.groups if g.kind == "channel"] == [2 + i for i in range(len(decoder))]
    assert [g.layer for g in structure.groups if g.kind != "channel"] == [0] * len(expected) + [1] * len(expected)
    given = summary(structure, f"{block}.")
    assert [(*g[:5], "" if g[5] == block else g[5], g[6]) for g in given] == expected
    first = summary(structure, f"{block.replace('.1', '.0')}.")
    assert [g[:5] for g in first] == [g[:5] for g in given]
    assert [g[:5] for g in summary(structure.without_widths(), f"{block}.")] == [g[:5] for g in groups]


def test_sides_owners_and_attributes_of_timm() -> None:
    attention, mlp = tiny.structure("vit_gated").groups[:2]
    a, m = attention.name, mlp.name
    assert attention.sides == (
        LayerAxis(f"{a}.qkv", "out"),
        LayerAxis(f"{a}.proj", "in"),
        LayerAxis(f"{a}.gate", "out"),
    )
    assert attention.cost.modules == (a,)
    assert attention.attributes == ((a, "num_heads"), (a, "attn_dim"))
    assert attention.placeholders == ((a, "constant"),)
    assert mlp.sides == (LayerAxis(f"{m}.fc1", "out"), LayerAxis(f"{m}.fc2", "in"))
    assert mlp.cost.modules == (m,)
    assert mlp.placeholders == ((f"{m}.fc1", "pass"), (f"{m}.fc2", "constant"))


def test_sides_owners_and_attributes_of_bert() -> None:
    attention, ffn = tiny.structure("bert").without_widths().groups[:2]
    layer = "encoder.layer.0"
    a, out = f"{layer}.attention.self", f"{layer}.attention.output.dense"
    assert attention.sides == (*(LayerAxis(f"{a}.{n}", "out") for n in ("query", "key", "value")), LayerAxis(out, "in"))
    assert attention.cost.modules == (a, out)
    assert attention.attributes == ((a, "num_attention_heads"), (a, "all_head_size"))
    assert attention.placeholders == ((a, "pass_tuple"), (out, "constant"))
    assert ffn.sides == (LayerAxis(f"{layer}.intermediate.dense", "out"), LayerAxis(f"{layer}.output.dense", "in"))
    assert ffn.cost.modules == (f"{layer}.intermediate", f"{layer}.output.dense")
    assert ffn.placeholders == ((f"{layer}.intermediate", "pass"), (f"{layer}.output.dense", "constant"))


def test_norms_over_the_units_mix_them() -> None:
    network = tiny.vit(scale_attn_norm=True, scale_mlp_norm=True, depth=1)
    structure = describe(network.module, network.inputs)
    assert [(g.kind, g.norm_over_units) for g in structure.groups] == [
        ("head", "blocks.0.attn.norm"),
        ("neuron", "blocks.0.mlp.norm"),
    ]


def test_norms_over_the_units_of_another_kind_are_left_dense() -> None:
    network = tiny.vit(scale_attn_norm=True, scale_mlp_norm=True, depth=1, norm_layer=nn.RMSNorm)
    structure = describe(network.module, network.inputs)
    assert structure.groups == ()
    assert [(d.module, "norm" in d.reason) for d in structure.left_dense] == [
        ("blocks.0.attn", True),
        ("blocks.0.mlp", True),
    ]


def test_blocks_without_known_modules_give_no_groups() -> None:
    network = tiny.vit(block_fn=ParallelScalingBlock)
    structure = describe(network.module, network.inputs)
    assert (structure.blocks, structure.groups, structure.tokens) == ((), (), 0)


def test_modules_that_do_not_run_are_left_dense() -> None:
    class Skipping(VisionTransformer):
        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[1](self.patch_embed(x))

    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 4, "num_classes": 0}
    structure = describe(Skipping(**sizes).eval(), {"x": torch.randn(1, 3, 16, 16)})
    assert structure.blocks == ("blocks.1",)
    names = ["blocks.1.attn", "blocks.1.attn.width", "blocks.1.mlp"]
    assert [(g.name, g.layer) for g in structure.groups] == [(name, 0) for name in names]
    reason = "does not run in a forward pass"
    assert structure.left_dense == (LeftDense("blocks.0.attn", reason), LeftDense("blocks.0.mlp", reason))


def test_groups_come_in_the_order_they_run() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(timm.layers.Mlp(4, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            for layer in reversed(self.layers):
                x = x + layer(x)
            return x

    structure = describe(tiny.randomised(Backwards()), {"x": torch.randn(2, 3, 4)})
    assert structure.blocks == ("layers.2", "layers.1", "layers.0")
    assert [(g.name, g.layer) for g in structure.groups] == [("layers.2", 0), ("layers.1", 1), ("layers.0", 2)]


def test_describing_leaves_no_hooks_even_when_the_forward_fails() -> None:
    module = tiny.network("vit").module
    with pytest.raises(TypeError):
        describe(module, {})
    assert not any(m._forward_hooks for m in module.modules())


def test_a_structure_finds_its_groups() -> None:
    structure = tiny.structure("vit")
    found = structure.group("blocks.1.mlp")
    assert isinstance(found, Group)
    assert found is structure.groups[5]
    with pytest.raises(KeyError):
        structure.group("blocks.9.mlp")
