import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st

from optin_deploy.errors import UserError
from optin_deploy.structure.describe import describe
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network


def test_after_in_the_dense_networks_indices() -> None:
    first = Plan({"a": (1, 3, 5), "b": (0,)})
    second = Plan({"a": (0, 2), "c": (7,)})
    assert second.after(first) == Plan({"a": (1, 5), "b": (0,), "c": (7,)})


def test_after_a_group_that_vanished() -> None:
    assert Plan({"a": ()}).after(Plan({"a": (2,)})) == Plan({"a": ()})
    assert Plan({}).after(Plan({"a": ()})) == Plan({"a": ()})


def test_a_group_that_is_not_named_keeps_all_units() -> None:
    first, second = tiny.structure("vit").groups[:2]
    plan = Plan({first.name: ()})
    assert (plan.units(first), plan.units(second)) == ((), tuple(range(second.units)))
    assert [plan.removes(name) for name in (first.name, second.name, None)] == [True, False, False]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_gated", "deit_distilled", "hf_vit", "bert", "distilbert"])
@given(data=st.data())
def test_slicing_twice_is_slicing_once(name: str, data: st.DataObject) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    first = data.draw(tiny.plans(structure))
    once = slice_network(network.module, structure, first)
    left = describe(once, network.inputs)
    assert {g.name: g.units for g in left.groups} == {
        g.name: n for g in structure.groups if (n := len(first.units(g))) and not first.removes(g.parent)
    }
    second = data.draw(tiny.plans(left))

    twice = slice_network(once, left, second).state_dict()
    directly = slice_network(network.module, structure, second.after(first)).state_dict()
    assert twice.keys() == directly.keys()
    for k in twice:
        # Where timm's scale follows the width, queries are rescaled, with a rounding in each step.
        torch.testing.assert_close(twice[k], directly[k], rtol=1e-6 if k.startswith("blocks") else 0, atol=0)


@pytest.mark.parametrize("kept", [(0, 0), (3, 2), (24,), (-1,)])
def test_check_refuses_bad_indices(kept: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match=r"blocks\.0\.mlp"):
        Plan({"blocks.0.mlp": kept}).check(tiny.structure("vit"))


def test_check_refuses_unknown_groups_and_takes_the_rest() -> None:
    with pytest.raises(UserError, match="nowhere"):
        Plan({"nowhere": ()}).check(tiny.structure("vit"))
    Plan({"blocks.0.mlp": (0, 23), "blocks.1.mlp": ()}).check(tiny.structure("vit"))


def test_check_refuses_heads_without_width() -> None:
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.width.*last unit") as caught:
        Plan({"blocks.0.attn.width": ()}).check(tiny.structure("vit"))
    assert "\n" not in str(caught.value)
    Plan({"blocks.0.attn.width": (3,), "blocks.1.attn": (), "blocks.1.attn.width": (0,)}).check(tiny.structure("vit"))


def test_a_plan_for_widths_needs_a_structure_with_widths() -> None:
    with pytest.raises(UserError, match=r"blocks\.0\.attn\.width"):
        Plan({"blocks.0.attn.width": (0,)}).check(tiny.structure("vit").without_widths())
