import copy

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Mlp
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import CostModules, Group, Structure
from optin_deploy.structure.masking import mask_units
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import features_of, output_bias, query_gain, slice_network

pytestmark = pytest.mark.slow


FIXED_PLANS = {
    "no attention": lambda s: tiny.empty_plan(s, "head"),
    "no feed-forward": lambda s: tiny.empty_plan(s, "neuron", "channel"),
    "nothing left": tiny.empty_plan,
    "uneven": tiny.uneven_plan,
    "all kept": lambda s: Plan({g.name: tuple(range(g.units)) for g in s.groups}),
}


class TwoConvolutions(nn.Module):
    """Convolutions with a batch norm between, added to the input where that is asked for."""

    def __init__(self, conv1: nn.Conv2d, conv2: nn.Conv2d, how: str = "no stream") -> None:
        super().__init__()
        self.conv1, self.bn1, self.conv2, self.how = conv1, nn.BatchNorm2d(conv1.out_channels), conv2, how

    def forward(self, x: Tensor) -> Tensor:
        update = self.conv2(self.bn1(self.conv1(x)).relu())
        if self.how == "in place":
            update += x
        return x + update if self.how == "broadcast" else update


@st.composite
def convolutions(draw: st.DrawFn, inputs: int, outputs: int) -> nn.Conv2d:
    pairs = st.tuples(st.integers(1, 3), st.integers(1, 3))
    same = draw(st.booleans())
    padding = draw(st.sampled_from(["same", "valid"]) if same else st.tuples(st.integers(0, 2), st.integers(0, 2)))
    stride = 1 if padding == "same" else draw(pairs)
    return nn.Conv2d(inputs, outputs, draw(pairs), stride, padding, draw(pairs), bias=draw(st.booleans()))


def assert_sliced_equals_masked(network: Network, structure: Structure, plan: Plan) -> nn.Module:
    return assert_sliced_equals_masked_here(network, structure, plan, *tiny.batches(network, 1, size=2))


def assert_sliced_equals_masked_here(
    network: Network, structure: Structure, plan: Plan, *others: tiny.Batch
) -> nn.Module:
    """On the network's own inputs, and on ``others``."""
    small = slice_network(network.module, structure, plan)
    for batch in (network.inputs, *others):
        with torch.no_grad(), mask_units(network.module, structure, tiny.masks_of(structure, plan)):
            expected = network.forward(batch)
        with torch.no_grad():
            given = network.forward(batch, small)
        for name in expected:
            assert given[name].shape == expected[name].shape
            assert float((given[name] - expected[name]).abs().max()) <= 1e-5
    return small


@pytest.mark.parametrize("name", tiny.ALL_NAMES)
@given(data=st.data())
def test_sliced_equals_masked(name: str, data: st.DataObject) -> None:
    structure = tiny.structure(name)
    assert_sliced_equals_masked(tiny.network(name), structure, data.draw(tiny.plans(structure)))


@pytest.mark.parametrize("which", FIXED_PLANS)
@pytest.mark.parametrize("name", tiny.ALL_NAMES)
def test_sliced_equals_masked_at_the_edges(name: str, which: str) -> None:
    structure = tiny.structure(name)
    assert_sliced_equals_masked(tiny.network(name), structure, FIXED_PLANS[which](structure))


@pytest.mark.parametrize("name", tiny.ALL_NAMES)
def test_the_masks_make_a_difference(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    small = slice_network(network.module, structure, tiny.uneven_plan(structure))
    with torch.no_grad():
        dense, pruned = network.forward(network.inputs), network.forward(network.inputs, small)
    assert all(float((dense[n] - pruned[n]).abs().max()) > 1e-2 for n in dense)


def test_unfused_attention_of_timm() -> None:
    network = tiny.vit(qk_norm=True)
    for block in network.module.blocks:
        block.attn.fused_attn = False
    assert_sliced_equals_masked(network, tiny.structure("vit_qk_norm"), tiny.uneven_plan(tiny.structure("vit_qk_norm")))


@pytest.mark.parametrize("name", ["bert", "distilbert", "hf_vit"])
def test_eager_attention_of_transformers(name: str) -> None:
    module = copy.deepcopy(tiny.network(name).module)
    module.set_attn_implementation("eager")
    network = tiny.network(name).with_module(module)
    assert_sliced_equals_masked(network, tiny.structure(name), tiny.uneven_plan(tiny.structure(name)))


def test_texts_of_another_length() -> None:
    network, structure = tiny.network("bert"), tiny.structure("bert")
    plan = tiny.uneven_plan(structure)
    batch = tiny.texts(batch=1, length=19)
    with torch.no_grad(), mask_units(network.module, structure, tiny.masks_of(structure, plan)):
        expected = network.forward(batch)["last_hidden_state"]
    with torch.no_grad():
        given = network.forward(batch, slice_network(network.module, structure, plan))["last_hidden_state"]
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", tiny.ALL_NAMES)
def test_a_sliced_module_is_a_smaller_copy_without_hooks(name: str) -> None:
    module, structure = tiny.network(name).module, tiny.structure(name)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    small = slice_network(module, structure, tiny.uneven_plan(structure))

    assert not any(m._forward_hooks or m._forward_pre_hooks for m in small.modules())
    assert sum(p.numel() for p in small.parameters()) < sum(p.numel() for p in module.parameters())
    assert not {p.data_ptr() for p in module.parameters()} & {p.data_ptr() for p in small.parameters()}
    assert all(p.is_contiguous() and p.requires_grad for p in small.parameters())
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.fill_(7.0)
    after = module.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


def shapes(module: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    return {k.removeprefix(prefix): tuple(v.shape) for k, v in module.state_dict().items() if k.startswith(prefix)}


def test_shapes_of_a_sliced_vit() -> None:
    plan = Plan({"blocks.0.attn": (0, 3), "blocks.0.mlp": (1, 2, 9, 20, 23), "blocks.1.attn": (), "blocks.1.mlp": ()})
    small = slice_network(tiny.network("vit_gated").module, tiny.structure("vit_gated"), plan)
    norms = {f"norm{i}.{p}": (16,) for i in (1, 2) for p in ("weight", "bias")}
    assert shapes(small, "blocks.0.") == {
        "attn.qkv.weight": (3 * 8, 16),
        "attn.qkv.bias": (3 * 8,),
        "attn.gate.weight": (8, 16),
        "attn.gate.bias": (8,),
        "attn.proj.weight": (16, 8),
        "attn.proj.bias": (16,),
        "mlp.fc1.weight": (5, 16),
        "mlp.fc1.bias": (5,),
        "mlp.fc2.weight": (16, 5),
        "mlp.fc2.bias": (16,),
        **norms,
    }
    assert shapes(small, "blocks.1.") == {"attn.bias": (16,), "mlp.fc2.bias": (16,), **norms}


def test_shapes_of_a_sliced_bert() -> None:
    attention, ffn = "encoder.layer.0.attention.self", "encoder.layer.0.intermediate"
    plan = Plan({attention: (2,), ffn: (), "encoder.layer.1.attention.self": ()})
    small = slice_network(tiny.network("bert").module, tiny.structure("bert"), plan)
    given = shapes(small, "encoder.layer.0.")
    norms = {k: s for k, s in given.items() if "LayerNorm" in k}
    assert given == {
        **{f"attention.self.{n}.weight": (4, 16) for n in ("query", "key", "value")},
        **{f"attention.self.{n}.bias": (4,) for n in ("query", "key", "value")},
        "attention.output.dense.weight": (16, 4),
        "attention.output.dense.bias": (16,),
        "output.dense.bias": (16,),
        **norms,
    }
    assert shapes(small, "encoder.layer.1.attention.self.") == {}
    assert shapes(small, "encoder.layer.1.attention.output.dense.") == {"bias": (16,)}


def test_shapes_of_a_sliced_resnet() -> None:
    plan = Plan({"blocks.0.conv1": (1, 4, 9), "blocks.1.conv1": ()})
    small = slice_network(tiny.network("plain_resnet").module, tiny.structure("plain_resnet"), plan)
    assert shapes(small, "blocks.0.") == {
        "conv1.weight": (3, 6, 3, 3),
        "conv1.bias": (3,),
        **{f"bn1.{n}": (3,) for n in ("weight", "bias", "running_mean", "running_var")},
        "bn1.num_batches_tracked": (),
        "conv2.weight": (6, 3, 3, 3),
        "conv2.bias": (6,),
        **{f"bn2.{n}": (6,) for n in ("weight", "bias", "running_mean", "running_var")},
        "bn2.num_batches_tracked": (),
    }
    assert {n for n in shapes(small, "blocks.1.") if not n.startswith("bn2")} == {"conv2.bias"}
    block = small.blocks[0]
    assert (block.conv1.out_channels, block.bn1.num_features, block.conv2.in_channels) == (3, 3, 3)
    assert (block.conv1.in_channels, block.conv2.out_channels) == (6, 6)


@given(data=st.data())
def test_an_empty_convolution_keeps_its_size(data: st.DataObject) -> None:
    conv1, conv2 = (data.draw(convolutions(3, 3)) for _ in range(2))
    module = tiny.randomised(nn.Sequential(TwoConvolutions(conv1, conv2)))
    network = tiny.network_around(module, {"input": torch.randn(2, 3, 17, 19)})
    structure = describe(module, network.inputs)
    assert_sliced_equals_masked_here(network, structure, Plan({"0.conv1": ()}))
    assert_sliced_equals_masked_here(network, structure, Plan({"0.conv1": (0, 2)}))


@pytest.mark.parametrize("how", ["in place", "broadcast", "no stream"])
def test_the_output_of_an_empty_convolution_can_be_added(how: str) -> None:
    module = tiny.randomised(nn.Sequential(TwoConvolutions(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1), how)))
    network = tiny.network_around(module, {"input": torch.randn(2, 3, 4, 5)})
    structure = describe(module, network.inputs)
    assert (structure.groups[0].stream.in_place, structure.groups[0].stream.known) == (
        how == "in place",
        how != "no stream",
    )
    small = assert_sliced_equals_masked_here(network, structure, Plan({"0.conv1": ()}))
    bias = small[0].conv2.bias.clone()
    small(**network.inputs)
    assert torch.equal(small[0].conv2.bias, bias)


def test_attributes_follow_the_parameters() -> None:
    plan = Plan({"blocks.0.attn": (1,), "blocks.0.mlp": (4, 5)})
    block = slice_network(tiny.network("vit").module, tiny.structure("vit"), plan).blocks[0]
    assert (block.attn.num_heads, block.attn.attn_dim, block.attn.head_dim) == (1, 4, 4)
    assert (block.attn.qkv.out_features, block.attn.proj.in_features) == (12, 4)
    assert (block.mlp.fc1.out_features, block.mlp.fc2.in_features) == (2, 2)


def test_features_of_units_with_parts() -> None:
    group = Group("a", "head", units=3, width=2, output="a.proj", sides=(), cost=CostModules(), placeholders=())
    assert features_of(torch.tensor([0, 2]), group, 12).tolist() == [0, 1, 4, 5, 6, 7, 10, 11]


@pytest.mark.parametrize("name", ["vit", "bert", "hf_vit", "vit_without_biases", *tiny.CNN_NAMES])
def test_output_bias_with_and_without_units(name: str) -> None:
    module, structure = tiny.network(name).module, tiny.structure(name).without_widths()
    empty = slice_network(module, structure, tiny.empty_plan(structure))
    for group in structure.groups:
        own = module.get_submodule(group.output).bias
        assert output_bias(module, group) is own
        left = output_bias(empty, group)
        assert left is not None
        width = len(module.get_parameter(f"{group.output}.weight"))
        assert torch.equal(left, torch.zeros(width) if own is None else own)


@pytest.mark.parametrize(
    "kept", [{"blocks.9.attn": (0,)}, {"blocks.0.attn": (0, 4)}, {"blocks.0.attn": (1, 0)}, {"blocks.0.attn": (-1, 2)}]
)
def test_a_plan_that_does_not_fit_is_refused(kept: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(UserError, match=next(iter(kept))):
        slice_network(tiny.network("vit").module, tiny.structure("vit"), Plan(kept))


def test_a_feed_forward_added_to_in_place() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Mlp(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            update = self.mlp(x)
            update += x
            return update

    network = tiny.network_around(tiny.randomised(nn.Sequential(Backwards())), {"input": torch.randn(1, 1, 4)})
    structure = describe(network.module, network.inputs)
    assert structure.groups[0].stream.in_place
    assert_sliced_equals_masked_here(network, structure, Plan({"0.mlp": ()}))


@pytest.mark.parametrize("residual", [False, True])
def test_an_empty_feed_forward_keeps_the_shape(residual: bool) -> None:
    class Head(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp = Mlp(4, 8)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.mlp(x) if residual else self.mlp(x)

    network = tiny.network_around(tiny.randomised(nn.Sequential(Head())), {"input": torch.randn(2, 3, 4)})
    structure = describe(network.module, network.inputs)
    assert (structure.groups[0].stream.residual is not None) == residual
    small = slice_network(network.module, structure, Plan({"0.mlp": ()}))
    with torch.no_grad(), mask_units(network.module, structure, {"0.mlp": torch.zeros(8)}):
        expected = network.forward(network.inputs)["output"]
    torch.testing.assert_close(small(**network.inputs), expected, rtol=0, atol=1e-6)


# The width of heads


@st.composite
def plans_of_heads(draw: st.DrawFn, structure: Structure) -> Plan:
    """Some heads and some dimensions of every attention, drawn together, and nothing else."""
    groups = [g for g in structure.groups if g.kind in ("head", "width")]
    return Plan({g.name: draw(tiny.kept_units(g).filter(bool)) for g in groups})


def with_wide_heads(name: str) -> Network:
    """Other numbers of heads and of their dimensions, so that nothing fits by accident."""
    makers = {
        "vit": lambda: tiny.vit(embed_dim=24, num_heads=2),
        "bert": lambda: tiny.transformers.BertModel(
            tiny.transformers.BertConfig(**SIZES, num_attention_heads=2), add_pooling_layer=False
        ),
        "distilbert": lambda: tiny.transformers.DistilBertModel(
            tiny.transformers.DistilBertConfig(vocab_size=50, dim=24, n_layers=2, n_heads=3, hidden_dim=8)
        ),
    }
    made = makers[name]()
    return made if isinstance(made, Network) else tiny.network_around(tiny.randomised(made), tiny.texts())


SIZES = {"vocab_size": 50, "hidden_size": 24, "num_hidden_layers": 2, "intermediate_size": 8}


@pytest.mark.parametrize("name", ["vit", "bert", "distilbert"])
@given(data=st.data())
def test_heads_and_their_width_are_cut_together(name: str, data: st.DataObject) -> None:
    network = with_wide_heads(name)
    structure = describe(network.module, network.inputs)
    plan = data.draw(plans_of_heads(structure))
    small = assert_sliced_equals_masked(network, structure, plan)
    for group in structure.groups:
        if group.kind != "width":
            continue
        heads, dimensions = len(plan.kept[group.parent]), len(plan.kept[group.name])
        projection = small.get_submodule(group.output)
        assert projection.in_features == projection.weight.shape[1] == heads * dimensions
        for rows in (group.qkv.queries, group.qkv.keys, group.qkv.values):
            layer = small.get_submodule(rows.module)
            assert layer.out_features == len(layer.weight) == len(layer.bias) == rows.parts * heads * dimensions


@pytest.mark.parametrize("fused", [True, False])
def test_the_scale_of_timm_follows_no_width(fused: bool) -> None:
    network = tiny.vit(embed_dim=24, num_heads=2)
    structure = describe(network.module, network.inputs)
    for block in network.module.blocks:
        block.attn.fused_attn = fused
    plan = Plan({"blocks.0.attn.width": (0, 3, 7), "blocks.1.attn": (1,), "blocks.1.attn.width": (11,)})
    small = assert_sliced_equals_masked(network, structure, plan)
    for block, width in zip(small.blocks, (3, 1), strict=True):
        # What timm makes of a module of this width, fused or not.
        assert block.attn.scale == pytest.approx(width**-0.5)
    assert [b.attn.scale for b in network.module.blocks] == [12**-0.5] * 2
    # The queries, times that scale, are what they were.
    dense, kept = network.module.blocks[0].attn.qkv, small.blocks[0].attn.qkv
    features = features_of(torch.tensor([0, 3, 7]), structure.group("blocks.0.attn.width"), 24)
    expected = dense.weight[:24][features] * 12**-0.5
    torch.testing.assert_close(kept.weight[:6] * 3**-0.5, expected)
    torch.testing.assert_close(kept.weight[6:12], dense.weight[24:48][features])
    torch.testing.assert_close(kept.bias[:6] * 3**-0.5, dense.bias[:24][features] * 12**-0.5)


def test_attributes_follow_heads_and_width() -> None:
    heads, width = (0, 2), (0, 1, 3)
    names = {
        "vit": ("blocks.0.attn", {"num_heads": 2, "head_dim": 3, "attn_dim": 6}),
        "bert": (
            "encoder.layer.0.attention.self",
            {"num_attention_heads": 2, "attention_head_size": 3, "all_head_size": 6},
        ),
        "distilbert": ("transformer.layer.0.attention", {"n_heads": 2, "attention_head_size": 3, "dim": 6}),
        "hf_vit": ("vit.layers.0.attention", {"head_dim": 3})
        if tiny.renamed()
        else ("vit.encoder.layer.0.attention.attention", {"num_attention_heads": 2, "attention_head_size": 3}),
    }
    for name, (attention, expected) in names.items():
        module, structure = tiny.network(name).module, tiny.structure(name)
        small = slice_network(module, structure, Plan({attention: heads, f"{attention}.width": width}))
        found = small.get_submodule(attention)
        assert {n: getattr(found, n) for n in expected} == expected
        # A factor of its own, which stays.
        if hasattr(found, "scaling"):
            assert found.scaling == module.get_submodule(attention).scaling == 0.5


def test_a_width_without_heads_is_left_alone() -> None:
    for name, attention in (("vit", "blocks.0.attn"), ("bert", "encoder.layer.0.attention.self")):
        network, structure = tiny.network(name), tiny.structure(name)
        plan = Plan({attention: (), f"{attention}.width": (1, 2)})
        small = assert_sliced_equals_masked(network, structure, plan)
        other = slice_network(network.module, structure, Plan({attention: ()})).state_dict()
        assert all(torch.equal(other[n], t) for n, t in small.state_dict().items())


def test_gains_of_queries() -> None:
    width = tiny.structure("vit").group("blocks.0.attn.width")
    assert [query_gain(width, kept) for kept in (4, 1)] == [1.0, 0.5]
    assert query_gain(tiny.structure("bert").groups[1], 1) == 1.0
    assert query_gain(tiny.structure("vit").group("blocks.0.mlp"), 1) == 1.0
