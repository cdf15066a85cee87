from itertools import combinations

import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from benchmarks.baselines import kwon
from optin_deploy.criteria.fisher import fisher_scores
from optin_deploy.network import Network
from optin_deploy.nn.partial_forward import record_inputs, record_outputs
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

pytestmark = pytest.mark.slow


def cost(gradients: Tensor, kept: tuple[int, ...]) -> float:
    """(1 − m)ᵀ I (1 − m), one sample at a time."""
    removed = [u for u in range(gradients.shape[1]) if u not in kept]
    return sum(float(g[removed].sum()) ** 2 for g in gradients) / len(gradients)


def least(gradients: Tensor, count: int) -> float:
    return min(cost(gradients, kept) for kept in combinations(range(gradients.shape[1]), count))


@given(data=st.data())
def test_rearranging_keeps_the_number_and_never_costs_more(data: st.DataObject) -> None:
    units, samples, seed = (data.draw(st.integers(*r)) for r in ((1, 8), (1, 6), (0, 999)))
    kept = tuple(sorted(data.draw(st.sets(st.integers(0, units - 1)))))
    gradients = torch.randn(samples, units, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plan = kwon.rearrange(Plan({"a": kept, "b": (0,)}), {"a": gradients})
    found = plan.kept["a"]
    assert len(found) == len(kept) and list(found) == sorted(set(found)) and set(found) <= set(range(units))
    assert cost(gradients, found) <= cost(gradients, kept) + 1e-9
    assert plan.kept["b"] == (0,)
    assert kwon.rearrange(Plan({"a": kept}), {"a": gradients}).kept["a"] == found


@given(st.integers(0, 999))
def test_with_one_unit_to_remove_the_best_is_found(seed: int) -> None:
    gradients = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = kwon.rearrange(Plan({"a": (0, 1, 2, 3, 4)}), {"a": gradients}).kept["a"]
    assert cost(gradients, found) == pytest.approx(least(gradients, 5))


def test_units_that_cancel_each_other_leave_together() -> None:
    # By the diagonal units 0 and 1 would go; 0 and 2 cancel in every sample.
    a, b, c = torch.randn(3, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.stack([a, 1.01 * b, -1.05 * a, 2 * c, 2 * b], dim=1)
    start = tuple(fisher_scores({"g": gradients})["g"].argsort()[2:].sort().values.tolist())
    assert start == (2, 3, 4)
    found = kwon.rearrange(Plan({"g": start}), {"g": gradients}).kept["g"]
    assert found == (1, 3, 4)
    assert cost(gradients, found) == pytest.approx(least(gradients, 3))


def rescale_sliced(network: Network, structure: Structure, plan: Plan, **options: float) -> tuple[nn.Module, dict]:
    small = slice_network(network.module, structure, plan)
    return small, kwon.rescale(network, small, structure, plan, tiny.batches(network, 4), **options)


@torch.no_grad()
def reference_factors(network: Network, small: nn.Module, structure: Structure, group: Group, damp: float) -> Tensor:
    """Explicit stacked system: a column per unit, a row per token and feature, then the damping's rows."""
    columns, targets = [], []
    weight = small.get_parameter(f"{group.output}.weight").double()
    bias = small.get_submodule(group.output).bias
    gamma = small.get_parameter(group.stream.scale).double() if group.stream.scale else torch.ones(tiny.WIDTH).double()
    for batch in tiny.batches(network, 4):
        with (
            record_inputs(network.module, (group.stream.residual,)) as dense,
            record_outputs(network.module, (group.output,)) as update,
            record_inputs(small, (group.stream.residual, group.output)) as seen,
        ):
            network.forward(batch)
            network.forward(batch, small)
        after = dense[group.stream.residual].double() + gamma * update[group.output].double()
        target = after - seen[group.stream.residual].double() - gamma * (bias.double() if bias is not None else 0.0)
        x = seen[group.output].double()
        valid = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(x.shape[:2]).bool()
        per_unit = []
        for start in range(0, x.shape[-1], group.width):
            own = slice(start, start + group.width)
            per_unit.append((gamma * (x[valid][:, own] @ weight[:, own].T)).flatten())
        columns.append(torch.stack(per_unit, dim=1))
        targets.append(target[valid].flatten())
    design, target = torch.cat(columns), torch.cat(targets)
    units = design.shape[1]
    stacked = torch.cat([design, damp * torch.eye(units, dtype=torch.float64)])
    missing = torch.cat([target - design.sum(1), torch.zeros(units, dtype=torch.float64)])
    return 1 + torch.linalg.lstsq(stacked, missing[:, None], driver="gelsd").solution[:, 0]


@pytest.mark.parametrize("name", ["vit", "vit_layer_scale", "vit_without_biases", "bert", "hf_vit"])
def test_factors_are_the_damped_least_squares_solution(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name).without_widths()
    plan = tiny.uneven_plan(structure)
    given, factors = rescale_sliced(network, structure, plan, damp=0.7, limit=1e9)
    small = slice_network(network.module, structure, plan)
    for group in structure.groups:
        if not plan.kept[group.name]:
            assert group.name not in factors
            continue
        expected = reference_factors(network, small, structure, group, 0.7)
        torch.testing.assert_close(factors[group.name], expected, rtol=1e-3, atol=1e-3)
        weight = small.get_parameter(f"{group.output}.weight")
        weight.data *= expected.repeat_interleave(group.width)
    for key, value in small.state_dict().items():
        torch.testing.assert_close(given.state_dict()[key], value, rtol=1e-3, atol=1e-3)


def test_a_unit_makes_up_for_its_twin() -> None:
    network = tiny.vit(init_values=0.5)
    structure = describe(network.module, network.inputs).without_widths()
    group = structure.group("blocks.0.mlp")
    mlp = network.module.blocks[0].mlp
    for parameter in mlp.fc1.parameters():
        parameter.data[2] = parameter.data[0]
    mlp.fc2.weight.data[:, 2] = mlp.fc2.weight.data[:, 0]
    plan = Plan({group.name: tuple(u for u in range(group.units) if u != 2)})
    small, factors = rescale_sliced(network, structure, plan, damp=1e-3)
    expected = torch.ones(group.units - 1, dtype=torch.float64)
    expected[0] = 2.0
    torch.testing.assert_close(factors[group.name], expected, rtol=0, atol=1e-3)
    with torch.no_grad():
        batch = tiny.images("x", 4, seed=99)
        torch.testing.assert_close(small(**batch), network.module(**batch), rtol=0, atol=1e-3)


def test_tuning_starts_at_the_first_pruned_group_and_stops_beyond_the_limit() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit").without_widths()
    names = [g.name for g in structure.groups]
    plan = Plan({names[1]: tuple(range(6)), names[2]: (1, 3), names[3]: tuple(range(0, 24, 2))})
    _, factors = rescale_sliced(network, structure, plan, limit=1e9)
    assert list(factors) == names[1:]
    largest = [float(factors[n].abs().max()) for n in names[1:]]
    for limit in (0.5 * min(largest), *(m + 1e-6 for m in largest)):
        passing = next((i for i, m in enumerate(largest) if m > limit), len(largest))
        small, found = rescale_sliced(network, structure, plan, limit=limit)
        assert list(found) == names[1 : 1 + passing]
        untouched = slice_network(network.module, structure, plan).state_dict()
        for name in names[1 + passing :]:
            key = f"{structure.group(name).output}.weight"
            assert torch.equal(small.state_dict()[key], untouched[key])


def test_with_nothing_pruned_nothing_is_tuned() -> None:
    network, structure = tiny.network("bert"), tiny.structure("bert").without_widths()
    small = slice_network(network.module, structure, Plan({}))
    assert kwon.rescale(network, small, structure, Plan({}), tiny.batches(network, 1)) == {}
    assert all(torch.equal(small.state_dict()[k], v) for k, v in network.module.state_dict().items())
    for module in (network.module, small):
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in module.modules())
