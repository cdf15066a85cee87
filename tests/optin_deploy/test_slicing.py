import copy

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.layers import Mlp
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.masking import masked
from optin_deploy.network import Network
from optin_deploy.plan import Plan
from optin_deploy.slicing import features_of, output_bias, sliced
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Group, Structure

FIXED_PLANS = {
    "no attention": lambda s: tiny.empty_plan(s, "head"),
    "no feed-forward": lambda s: tiny.empty_plan(s, "neuron"),
    "nothing left": tiny.empty_plan,
    "uneven": tiny.uneven_plan,
    "all kept": lambda s: Plan({g.name: tuple(range(g.units)) for g in s.groups}),
}


def assert_sliced_equals_masked(network: Network, structure: Structure, plan: Plan) -> nn.Module:
    small = sliced(network.module, structure, plan)
    for batch in (network.inputs, *tiny.batches(network, 1, size=2)):
        with torch.no_grad(), masked(network.module, structure, tiny.masks_of(structure, plan)):
            expected = network.forward(batch)
        with torch.no_grad():
            given = network.forward(batch, small)
        for name in expected:
            assert given[name].shape == expected[name].shape
            assert float((given[name] - expected[name]).abs().max()) <= 1e-5
    return small


@pytest.mark.parametrize("name", tiny.NAMES)
@given(data=st.data())
def test_sliced_equals_masked(name: str, data: st.DataObject) -> None:
    structure = tiny.structure(name)
    assert_sliced_equals_masked(tiny.network(name), structure, data.draw(tiny.plans(structure)))


@pytest.mark.parametrize("which", FIXED_PLANS)
@pytest.mark.parametrize("name", tiny.NAMES)
def test_sliced_equals_masked_at_the_edges(name: str, which: str) -> None:
    structure = tiny.structure(name)
    assert_sliced_equals_masked(tiny.network(name), structure, FIXED_PLANS[which](structure))


@pytest.mark.parametrize("name", tiny.NAMES)
def test_the_masks_make_a_difference(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    small = sliced(network.module, structure, tiny.uneven_plan(structure))
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
    with torch.no_grad(), masked(network.module, structure, tiny.masks_of(structure, plan)):
        expected = network.forward(batch)["last_hidden_state"]
    with torch.no_grad():
        given = network.forward(batch, sliced(network.module, structure, plan))["last_hidden_state"]
    torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", tiny.NAMES)
def test_a_sliced_module_is_a_smaller_copy_without_hooks(name: str) -> None:
    module, structure = tiny.network(name).module, tiny.structure(name)
    before = {k: v.clone() for k, v in module.state_dict().items()}
    small = sliced(module, structure, tiny.uneven_plan(structure))

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
    small = sliced(tiny.network("vit_gated").module, tiny.structure("vit_gated"), plan)
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
    assert shapes(small, "blocks.1.") == {"attn.bias": (16,), "mlp.bias": (16,), **norms}


def test_shapes_of_a_sliced_bert() -> None:
    attention, ffn = "encoder.layer.0.attention.self", "encoder.layer.0.intermediate"
    plan = Plan({attention: (2,), ffn: (), "encoder.layer.1.attention.self": ()})
    small = sliced(tiny.network("bert").module, tiny.structure("bert"), plan)
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


def test_attributes_follow_the_parameters() -> None:
    plan = Plan({"blocks.0.attn": (1,), "blocks.0.mlp": (4, 5)})
    block = sliced(tiny.network("vit").module, tiny.structure("vit"), plan).blocks[0]
    assert (block.attn.num_heads, block.attn.attn_dim, block.attn.head_dim) == (1, 4, 4)
    assert (block.attn.qkv.out_features, block.attn.proj.in_features) == (12, 4)
    assert (block.mlp.fc1.out_features, block.mlp.fc2.in_features) == (2, 2)


def test_features_of_units_with_parts() -> None:
    group = Group("a", "head", units=3, width=2, output="a.proj", sides=(), owners=(), stand_ins=())
    assert features_of(torch.tensor([0, 2]), group, parts=2).tolist() == [0, 1, 4, 5, 6, 7, 10, 11]


@pytest.mark.parametrize("name", ["vit", "bert", "hf_vit", "vit_without_biases"])
def test_output_bias_with_and_without_units(name: str) -> None:
    module, structure = tiny.network(name).module, tiny.structure(name)
    empty = sliced(module, structure, tiny.empty_plan(structure))
    for group in structure.groups:
        own = module.get_submodule(group.output).bias
        assert output_bias(module, group) is own
        left = output_bias(empty, group)
        assert left is not None
        assert torch.equal(left, torch.zeros(tiny.WIDTH) if own is None else own)


@pytest.mark.parametrize(
    "kept", [{"blocks.9.attn": (0,)}, {"blocks.0.attn": (0, 4)}, {"blocks.0.attn": (1, 0)}, {"blocks.0.attn": (-1, 2)}]
)
def test_a_plan_that_does_not_fit_is_refused(kept: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(UserError, match=next(iter(kept))):
        sliced(tiny.network("vit").module, tiny.structure("vit"), Plan(kept))


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
    assert (structure.groups[0].residual is not None) == residual
    small = sliced(network.module, structure, Plan({"0.mlp": ()}))
    with torch.no_grad(), masked(network.module, structure, {"0.mlp": torch.zeros(8)}):
        expected = network.forward(network.inputs)["output"]
    torch.testing.assert_close(small(**network.inputs), expected, rtol=0, atol=1e-6)
