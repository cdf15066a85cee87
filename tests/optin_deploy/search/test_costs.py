import pytest
import tiny
from hypothesis import given, settings
from hypothesis import strategies as st

from optin_deploy.nn.flops import count_flops
from optin_deploy.search.costs import flop_costs
from optin_deploy.structure.describe import describe
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

pytestmark = pytest.mark.slow


WIDTH, TOKENS, NEURONS, HEAD = tiny.WIDTH, 5, tiny.NEURONS, tiny.WIDTH // tiny.HEADS
PER_HEAD = 2 * 4 * TOKENS * WIDTH * HEAD + 2 * 2 * TOKENS * TOKENS * HEAD
PER_NEURON = 2 * 2 * TOKENS * WIDTH
PATCHES, CLASSIFIER = 2 * 4 * 3 * 8 * 8 * WIDTH, 2 * WIDTH * 3


def test_flops_of_a_vit_by_hand() -> None:
    network = tiny.network("vit")
    costs = flop_costs(network.module, tiny.structure("vit"), network.inputs)
    assert costs.floor == PATCHES + CLASSIFIER
    assert costs.total == costs.floor + tiny.LAYERS * (tiny.HEADS * PER_HEAD + NEURONS * PER_NEURON)
    assert costs.per_unit["blocks.0.attn"] == PER_HEAD
    assert costs.per_unit["blocks.1.mlp"] == PER_NEURON
    assert costs.of(Plan({"blocks.0.attn": (2,)})) == costs.total - 3 * PER_HEAD


def test_the_batch_does_not_count() -> None:
    network = tiny.network("vit")
    assert count_flops(network.module, tiny.images("x", batch=1)) == count_flops(network.module, tiny.images("x", 5))


@pytest.mark.parametrize("name", tiny.ALL_NAMES)
@settings(max_examples=10)
@given(data=st.data())
def test_costs_predict_the_count_of_the_sliced_module(name: str, data: st.DataObject) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    plan = data.draw(tiny.plans(structure))
    costs = flop_costs(network.module, structure, network.inputs)
    assert costs.of(plan) == count_flops(slice_network(network.module, structure, plan), network.inputs)


@pytest.mark.parametrize("name", tiny.ALL_NAMES)
def test_the_floor_is_the_count_with_everything_removed(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    costs = flop_costs(network.module, structure, network.inputs)
    empty = slice_network(network.module, structure, tiny.empty_plan(structure))
    assert costs.floor == costs.of(tiny.empty_plan(structure)) == count_flops(empty, network.inputs)
    assert costs.total == costs.of(Plan({})) == count_flops(network.module, network.inputs)


def test_flops_of_channels_by_hand() -> None:
    network = tiny.network("plain_resnet")
    costs = flop_costs(network.module, tiny.structure("plain_resnet"), network.inputs)
    assert costs.per_unit["blocks.0.conv1"] == 2 * 9 * 16 * 16 * (6 + 6)
    assert costs.per_unit["blocks.1.conv1"] == 2 * 9 * 8 * 8 * (6 + 12)
    assert costs.floor == 2 * 9 * 3 * 6 * 16 * 16 + 2 * 12 * 3


def test_counting_leaves_the_module_as_it_was() -> None:
    module = tiny.network("bert").module
    count_flops(module, tiny.network("bert").inputs)
    assert all(p.requires_grad for p in module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_heads_cost_in_proportion_to_their_number_and_width() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    costs = flop_costs(network.module, structure, network.inputs)
    assert costs.widths == {f"blocks.{i}.attn": f"blocks.{i}.attn.width" for i in range(2)}
    assert costs.per_unit["blocks.0.attn.width"] == tiny.HEADS * PER_HEAD / HEAD
    cut = Plan({"blocks.0.attn": (0, 3), "blocks.0.attn.width": (0, 1, 2), "blocks.1.attn.width": (3,)})
    whole = tiny.HEADS * PER_HEAD
    assert costs.of(cut) == pytest.approx(costs.total - whole * (1 - 2 / 4 * 3 / 4) - whole * 3 / 4)
    # Widths are no cost of their own: without them, the rest costs the same.
    plain = flop_costs(network.module, structure.without_widths(), network.inputs)
    assert (plain.total, plain.floor, plain.widths) == (costs.total, costs.floor, {})
    assert costs.of(Plan({"blocks.0.attn": (), "blocks.0.attn.width": (1,)})) == costs.total - whole


@pytest.mark.parametrize("name", ["vit", "bert", "distilbert", "hf_vit"])
@settings(max_examples=10)
@given(data=st.data())
def test_costs_of_heads_and_width_cut_together(name: str, data: st.DataObject) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    both = [g for g in structure.groups if g.kind in ("head", "width")]
    plan = Plan({g.name: data.draw(tiny.kept_units(g)) for g in both})
    costs = flop_costs(network.module, structure, network.inputs)
    small = slice_network(network.module, structure, plan)
    assert costs.of(plan) == count_flops(small, network.inputs)
    # What is left can be counted, and cut, again.
    left = describe(small, network.inputs)
    rest = flop_costs(small, left, network.inputs)
    assert (rest.total, rest.floor) == (costs.of(plan), costs.floor)
    second = data.draw(tiny.plans(left))
    assert rest.of(second) == pytest.approx(costs.of(second.after(plan)))
