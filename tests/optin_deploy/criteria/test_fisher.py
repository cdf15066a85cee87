import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from optin_deploy.criteria.fisher import fisher_scores, mask_gradients, rearranged, rescale
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.nn.partial_forward import record_inputs, record_outputs
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

pytestmark = pytest.mark.slow


STEP = 1e-4


class Maps(nn.Module):
    """Class logits for every patch, as a map: ``(batch, classes, patches)``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).movedim(-1, 1)


def in_double(network: Network) -> Network:
    return replace(network, module=copy.deepcopy(network.module).double())


def doubles(batches: list[tiny.Batch]) -> list[tiny.Batch]:
    return [{n: t.double() if t.is_floating_point() else t for n, t in b.items()} for b in batches]


@contextmanager
def scaled(module: nn.Module, group: Group, unit: int, factor: float) -> Iterator[None]:
    """A unit times a factor; a dimension of heads in all queries, and in what all heads give."""
    width = group.kind == "width"
    own = slice(unit, None, group.units) if width else slice(unit * group.width, (unit + 1) * group.width)

    def before(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        x[..., own] *= factor
        return (x,)

    def after(_: nn.Module, __: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., group.qkv.queries.of(output.shape[-1])][..., own] *= factor
        return output

    handles = [module.get_submodule(group.output).register_forward_pre_hook(before)]
    if width:
        handles.append(module.get_submodule(group.qkv.queries.module).register_forward_hook(after))
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def differences(
    network: Network, structure: Structure, batches: list[tiny.Batch], loss: Callable[[int, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Central differences for each mask of each sample on its own. ``loss`` is told the number of the sample."""
    samples = [{n: t[i : i + 1] for n, t in b.items()} for b in batches for i in range(len(next(iter(b.values()))))]
    found = {g.name: torch.zeros(len(samples), g.units, dtype=torch.float64) for g in structure.groups}
    for group in structure.groups:
        for unit in range(group.units):
            for sign in (1, -1):
                with scaled(network.module, group, unit, 1 + sign * STEP):
                    for number, sample in enumerate(samples):
                        value = loss(number, network.forward(sample)[network.logits])
                        found[group.name][number, unit] += sign * float(value) / (2 * STEP)
    return found


def assert_gradients_close(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    for name, gradient in expected.items():
        assert given[name].dtype == torch.float64
        torch.testing.assert_close(given[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["vit", "bert_classifier"])
def test_gradients_are_those_of_each_sample(name: str) -> None:
    network, structure = in_double(tiny.network(name)), tiny.structure(name)
    batches = doubles(tiny.batches(network, 2, size=2))
    labels = [torch.tensor([0, 2]), torch.tensor([1, 1])]
    given = mask_gradients(network, structure, batches, labels)
    flat = torch.cat(labels)
    expected = differences(network, structure, batches, lambda i, z: F.cross_entropy(z, flat[i : i + 1]))
    assert_gradients_close(given, expected)


def in_maps(network: Network) -> Network:
    return tiny.network_around(Maps(network.module), dict(network.inputs), logits=True)


def dense_network() -> Network:
    """Logits for every token, ``(batch, tokens, classes)``."""
    module = tiny.vit(global_pool="").module.double()
    return tiny.network_around(module, doubles([tiny.images("x")])[0], logits=True)


def test_dense_labels_count_where_they_are_given() -> None:
    network = dense_network()
    structure = describe(network.module, network.inputs)
    batch = doubles([tiny.images("x", 3, seed=1)])
    labels = torch.tensor([[0, 1, 2, 1, 0], [-100, 1, -100, -100, 2], [-100] * 5])

    def loss(number: int, logits: Tensor) -> Tensor:
        pairs = [(z, c) for z, c in zip(logits[0], labels[number], strict=True) if c >= 0]
        return sum((-torch.log_softmax(z, 0)[c] for z, c in pairs), torch.zeros(())) / max(len(pairs), 1)

    given = mask_gradients(network, structure, batch, [labels])
    assert_gradients_close(given, differences(network, structure, batch, loss))
    assert all(float(g[2].abs().max()) == 0.0 for g in given.values())


def test_classes_of_maps_lie_on_the_second_axis() -> None:
    batch = doubles([tiny.images("x", 2, seed=1)])
    labels = [torch.tensor([[0, 1, 2, 1, 0], [-100, 1, -100, -100, 2]])]
    found = []
    plain = dense_network()
    for network in (plain, in_maps(plain)):
        gradients = mask_gradients(network, describe(network.module, network.inputs), batch, labels)
        found.append(list(gradients.values()))
    for tokens, maps in zip(*found, strict=True):
        torch.testing.assert_close(maps, tokens)


def test_networks_and_labels_that_do_not_suit_are_told() -> None:
    network, structure = tiny.network("bert"), tiny.structure("bert")
    with pytest.raises(UserError, match="class logits"):
        mask_gradients(network, structure, tiny.batches(network, 1), [torch.zeros(3).long()])
    network, structure = tiny.network("vit"), tiny.structure("vit")
    with pytest.raises(UserError, match=r"0 .* 1"):
        mask_gradients(network, structure, tiny.batches(network, 1), [])
    with pytest.raises(UserError, match="do not fit"):
        mask_gradients(network, structure, tiny.batches(network, 1), [torch.zeros(2).long()])


def test_scores_are_the_diagonal_of_the_fisher_information() -> None:
    gradients = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    information = sum(g.outer(g) for g in gradients) / 7
    torch.testing.assert_close(fisher_scores({"a": gradients})["a"], information.diagonal())


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
    plan = rearranged(Plan({"a": kept, "b": (0,)}), {"a": gradients})
    found = plan.kept["a"]
    assert len(found) == len(kept) and list(found) == sorted(set(found)) and set(found) <= set(range(units))
    assert cost(gradients, found) <= cost(gradients, kept) + 1e-9
    assert plan.kept["b"] == (0,)
    assert rearranged(Plan({"a": kept}), {"a": gradients}).kept["a"] == found


@given(st.integers(0, 999))
def test_with_one_unit_to_remove_the_best_is_found(seed: int) -> None:
    gradients = torch.randn(4, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = rearranged(Plan({"a": (0, 1, 2, 3, 4)}), {"a": gradients}).kept["a"]
    assert cost(gradients, found) == pytest.approx(least(gradients, 5))


def test_units_that_cancel_each_other_leave_together() -> None:
    # By the diagonal units 0 and 1 would go; 0 and 2 cancel in every sample.
    a, b, c = torch.randn(3, 40, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    gradients = torch.stack([a, 1.01 * b, -1.05 * a, 2 * c, 2 * b], dim=1)
    start = tuple(fisher_scores({"g": gradients})["g"].argsort()[2:].sort().values.tolist())
    assert start == (2, 3, 4)
    found = rearranged(Plan({"g": start}), {"g": gradients}).kept["g"]
    assert found == (1, 3, 4)
    assert cost(gradients, found) == pytest.approx(least(gradients, 3))


def rescaled(network: Network, structure: Structure, plan: Plan, **options: float) -> tuple[nn.Module, dict]:
    small = slice_network(network.module, structure, plan)
    return small, rescale(network, small, structure, plan, tiny.batches(network, 4), **options)


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
    given, factors = rescaled(network, structure, plan, damp=0.7, limit=1e9)
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
    small, factors = rescaled(network, structure, plan, damp=1e-3)
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
    _, factors = rescaled(network, structure, plan, limit=1e9)
    assert list(factors) == names[1:]
    largest = [float(factors[n].abs().max()) for n in names[1:]]
    for limit in (0.5 * min(largest), *(m + 1e-6 for m in largest)):
        passing = next((i for i, m in enumerate(largest) if m > limit), len(largest))
        small, found = rescaled(network, structure, plan, limit=limit)
        assert list(found) == names[1 : 1 + passing]
        untouched = slice_network(network.module, structure, plan).state_dict()
        for name in names[1 + passing :]:
            key = f"{structure.group(name).output}.weight"
            assert torch.equal(small.state_dict()[key], untouched[key])


def test_with_nothing_pruned_nothing_is_tuned() -> None:
    network, structure = tiny.network("bert"), tiny.structure("bert").without_widths()
    small = slice_network(network.module, structure, Plan({}))
    assert rescale(network, small, structure, Plan({}), tiny.batches(network, 1)) == {}
    assert all(torch.equal(small.state_dict()[k], v) for k, v in network.module.state_dict().items())
    for module in (network.module, small):
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in module.modules())
