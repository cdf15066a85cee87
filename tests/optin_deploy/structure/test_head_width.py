import copy
from collections.abc import Callable

import pytest
import timm.layers
import tiny
import torch
import transformers
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertSelfAttention

from optin_deploy.network import Network
from optin_deploy.structure.adapters import timm_attention as timm_adapter
from optin_deploy.structure.adapters import transformers_attention as transformers_adapter
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Group, OutputSlice, Structure
from optin_deploy.structure.head_width import change_basis, find_narrowable, width_group

pytestmark = pytest.mark.slow


NARROWABLE = [name for name in tiny.NAMES if name not in ("vit_qk_norm", "vit_gated")]


def widths(structure: Structure) -> list[Group]:
    return [g for g in structure.groups if g.kind == "width"]


def bases(group: Group, heads: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A random invertible A, its inverse's transpose B, and a random orthogonal P, for each head; in float64."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(2, heads, group.units, group.units, generator=generator, dtype=torch.float64)
    queries = drawn[0] + 3 * torch.eye(group.units, dtype=torch.float64)
    return queries, torch.linalg.inv(queries).transpose(1, 2), torch.linalg.qr(drawn[1]).Q


class Own(nn.Module):
    """One attention behind a shortcut, in a block."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x)


def around(attention: nn.Module, width: int = 16) -> Network:
    inputs = {"input": torch.randn(2, 5, width, generator=torch.Generator().manual_seed(0))}
    return tiny.network_around(tiny.randomised(nn.Sequential(Own(attention))), inputs)


# Which attentions have widths


@pytest.mark.parametrize("name", NARROWABLE)
def test_the_width_follows_its_heads(name: str) -> None:
    structure = tiny.structure(name)
    heads = [g for g in structure.groups if g.kind == "head"]
    assert len(heads) == tiny.LAYERS
    for group in heads:
        width = structure.child(group.name)
        assert width is not None
        assert structure.groups.index(width) == structure.groups.index(group) + 1
        assert (width.name, width.parent, width.kind) == (f"{group.name}.width", group.name, "width")
        assert (width.units, width.width) == (group.width, 1)
        for field in ("output", "sides", "cost", "qkv", "layer", "stream", "axis"):
            assert getattr(width, field) == getattr(group, field)
        assert width.placeholders == ()


def test_without_widths_everything_else_stays() -> None:
    structure = tiny.structure("vit")
    without = structure.without_widths()
    assert [g.name for g in without.groups] == [g.name for g in structure.groups if g.kind != "width"]
    assert (without.blocks, without.tokens) == (structure.blocks, structure.tokens)
    assert without.child("blocks.0.attn") is None
    assert structure.child("blocks.0.mlp") is None


def test_projections_and_attributes_of_timm() -> None:
    module = timm.layers.Attention(16, 2, attn_head_dim=6, qkv_bias=True)
    structure = describe(around(module).module, around(module).inputs)
    (width,) = widths(structure)
    name = "0.attention"
    assert width.units == 6
    assert width.attributes == ((name, "head_dim"), (name, "attn_dim"))
    assert width.qkv is not None
    assert [width.qkv.queries, width.qkv.keys, width.qkv.values] == [OutputSlice(f"{name}.qkv", i, 3) for i in range(3)]
    assert [rows.of(36) for rows in (width.qkv.queries, width.qkv.values)] == [slice(0, 12), slice(24, 36)]
    assert width.qkv.scale == (name, "scale")


_OLD_WIDTHS = "attention_head_size all_head_size"
HF_VIT = (
    ("hf_vit", "vit.layers.0.attention", "q_proj k_proj v_proj", "head_dim")
    if tiny.renamed()
    else ("hf_vit", "vit.encoder.layer.0.attention.attention", "query key value", _OLD_WIDTHS)
)


@pytest.mark.parametrize(
    ("name", "attention", "projections", "attributes"),
    [
        ("bert", "encoder.layer.0.attention.self", "query key value", "attention_head_size all_head_size"),
        ("distilbert", "transformer.layer.0.attention", "q_lin k_lin v_lin", "attention_head_size dim"),
        ("hf_vit", "vit.layers.0.attention", "q_proj k_proj v_proj", "head_dim")
        if tiny.renamed()
        else (
            "hf_vit",
            "vit.encoder.layer.0.attention.attention",
            "query key value",
            "attention_head_size all_head_size",
        ),
    ],
)
def test_projections_and_attributes_of_transformers(
    name: str, attention: str, projections: str, attributes: str
) -> None:
    width = tiny.structure(name).child(attention)
    assert width is not None and width.qkv is not None
    found = [width.qkv.queries, width.qkv.keys, width.qkv.values]
    assert found == [OutputSlice(f"{attention}.{n}") for n in projections.split()]
    assert width.qkv.scale is None
    assert width.attributes == tuple((attention, n) for n in attributes.split())


@pytest.mark.parametrize("name", ["vit_qk_norm", "vit_gated"])
def test_no_width_with_a_norm_of_queries_or_a_gate(name: str) -> None:
    structure = tiny.structure(name)
    assert not widths(structure)
    assert all(g.qkv is None for g in structure.groups)
    assert [g.kind for g in structure.groups] == ["head", "neuron"] * tiny.LAYERS


def test_no_width_with_a_norm_of_keys_only() -> None:
    module = timm.layers.Attention(16, 4)
    module.k_norm = nn.LayerNorm(4)
    group = timm_adapter.attention("a", module, "", nn.Module())
    assert isinstance(group, Group) and group.qkv is None
    assert width_group(nn.ModuleDict({"a": module}), group) is None


def test_no_width_with_rotary_positions() -> None:
    attention = timm.layers.AttentionRope(16, 4)
    found = timm_adapter.attention("a", attention, "", nn.Module())
    assert isinstance(found, Group)
    assert found.qkv is None


def bert_attention(change: Callable[[nn.Module], object]) -> Group:
    module = BertSelfAttention(tiny.network("bert").module.config)
    change(module)
    parent = tiny.network("bert").module.encoder.layer[0].attention
    found = transformers_adapter.attention("block.self", module, "block", parent)
    assert isinstance(found, Group)
    return found


@pytest.mark.parametrize(
    ("change", "able"),
    [
        (lambda _: None, True),
        (lambda m: delattr(m, "scaling"), False),
        (lambda m: setattr(m, "scaling", None), False),
        (lambda m: m.add_module("dropout", nn.Dropout(0.1)), True),
    ],
)
def test_attentions_of_transformers_need_a_scale_of_their_own(
    change: Callable[[nn.Module], object], able: bool
) -> None:
    assert (bert_attention(change).qkv is not None) == able


class Rotary(transformers.models.bert.modeling_bert.BertSelfAttention):
    """Turns queries and keys by their positions, as rotary embeddings do; it has no parameters for that."""

    def forward(self, hidden_states: Tensor, *_: object, **__: object) -> tuple[Tensor, None]:
        q, k, v = (
            f(hidden_states).unflatten(-1, (-1, self.attention_head_size)).transpose(1, 2)
            for f in (self.query, self.key, self.value)
        )
        angle = torch.arange(q.shape[2])[:, None] * torch.tensor([1.0, 0.1])
        q, k = (torch.cat([_turned(x, angle, 1), _turned(x, angle, -1)], -1) for x in (q, k))
        given = torch.softmax(self.scaling * q @ k.transpose(-1, -2), -1) @ v
        return given.transpose(1, 2).flatten(2), None


def _turned(x: Tensor, angle: Tensor, sign: int) -> Tensor:
    first, second = x.chunk(2, -1)
    return first * angle.cos() - sign * second * angle.sin()


def test_only_the_attentions_that_take_another_basis_can_get_narrower() -> None:
    module = copy.deepcopy(tiny.network("bert").module)
    rotary = Rotary(module.config)
    rotary.load_state_dict(module.encoder.layer[1].attention.self.state_dict())
    # Matching looks at the library that a class is from.
    rotary.__class__.__module__ = BertSelfAttention.__module__
    module.encoder.layer[1].attention.self = rotary
    structure = describe(module.eval(), tiny.texts())
    assert [g.kind for g in structure.groups] == ["head", "width", "neuron", "head", "neuron"]
    assert structure.child("encoder.layer.0.attention.self") is not None


def test_trying_leaves_the_module_as_it_was() -> None:
    network = tiny.network("vit")
    before = {n: t.clone() for n, t in network.module.state_dict().items()}
    able = widths(tiny.structure("vit"))
    assert find_narrowable(network.module, network.inputs, able) == able
    assert find_narrowable(network.module, network.inputs, []) == []
    assert all(torch.equal(t, before[n]) for n, t in network.module.state_dict().items())


def test_a_network_of_one_attention_that_cannot_has_no_width() -> None:
    class Bent(timm.layers.Attention):
        def forward(self, x: Tensor, *_: object) -> Tensor:
            q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).permute(2, 0, 3, 1, 4)
            return self.proj((torch.softmax(q.relu() @ k.transpose(-1, -2), -1) @ v).transpose(1, 2).flatten(2))

    network = around(timm.layers.Attention(16, 4))
    bent = Bent(16, 4)
    bent.load_state_dict(network.module[0].attention.state_dict())
    other = nn.Sequential(Own(bent)).eval()
    able = widths(describe(network.module, network.inputs))
    assert find_narrowable(network.module, network.inputs, able) == able
    assert find_narrowable(other, network.inputs, able) == []


# Bases


@torch.no_grad()
@pytest.mark.parametrize("name", NARROWABLE)
def test_a_change_of_basis_changes_no_output(name: str) -> None:
    network = tiny.network(name)
    module = copy.deepcopy(network.module).double()
    batch = {n: t.double() if t.is_floating_point() else t for n, t in network.inputs.items()}
    expected = network.forward(batch, module)
    before = copy.deepcopy(module.state_dict())
    for seed, group in enumerate(widths(tiny.structure(name))):
        change_basis(module, group, *bases(group, tiny.HEADS, seed))
    for output, given in network.forward(batch, module).items():
        torch.testing.assert_close(given, expected[output], rtol=0, atol=1e-10)
    touched = {n for n, t in module.state_dict().items() if not torch.equal(t, before[n])}
    turned = {f"{s.module}.{n}" for g in widths(tiny.structure(name)) for s in g.sides for n in ("weight", "bias")}
    # What an output projection adds has no basis.
    assert touched == turned & before.keys() - {f"{g.output}.bias" for g in widths(tiny.structure(name))}


@torch.no_grad()
@pytest.mark.parametrize("which", ["queries", "keys", "values"])
def test_bases_that_do_not_belong_together_change_outputs(which: str) -> None:
    network = tiny.network("vit")
    (group, _) = widths(tiny.structure("vit"))
    one = torch.eye(group.units, dtype=torch.float64).expand(tiny.HEADS, -1, -1)
    given = dict.fromkeys(("queries", "keys", "values"), one)
    given[which] = bases(group, tiny.HEADS)[0]
    module = copy.deepcopy(network.module)
    change_basis(module, group, **given)
    moved = network.forward(network.inputs, module)["output"] - network.forward(network.inputs)["output"]
    assert float(moved.norm()) > 1e-2


@torch.no_grad()
def test_queries_keys_and_values_in_their_new_bases() -> None:
    attention = tiny.randomised(timm.layers.Attention(16, 2, attn_head_dim=6, qkv_bias=True))
    network = around(attention)
    (group,) = widths(describe(network.module, network.inputs))
    x = torch.randn(3, 16)
    before = attention.qkv(x).unflatten(-1, (3, 2, 6))
    found = bases(group, 2)
    change_basis(network.module, group, *found)
    after = attention.qkv(x).unflatten(-1, (3, 2, 6))
    for part, basis in enumerate(found):
        for head in range(2):
            expected = before[:, part, head].double() @ basis[head]
            torch.testing.assert_close(after[:, part, head].double(), expected, rtol=1e-4, atol=1e-5)


def test_heads_wider_than_the_stream() -> None:
    sizes = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 1, "num_heads": 2, "num_classes": 3}
    module = tiny.randomised(VisionTransformer(**sizes))
    module.blocks[0].attn = tiny.randomised(timm.layers.Attention(16, 2, attn_head_dim=24))
    structure = describe(module.eval(), tiny.images("x"))
    assert [g.units for g in widths(structure)] == [24]
