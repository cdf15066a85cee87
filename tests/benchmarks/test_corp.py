import copy

import pytest
import tiny
import torch
from torch import Tensor, nn

from benchmarks.baselines import corp
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.nn.flops import count_flops
from optin_deploy.nn.partial_forward import record_inputs
from optin_deploy.pruning.space import analyze
from optin_deploy.structure.groups import Group
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import output_bias, slice_network

pytestmark = pytest.mark.slow


RIDGE = 0.02
BATCHES = 5


@torch.no_grad()
def activations(network: Network, group: Group) -> Tensor:
    """All inputs of the dense output projection, ``(tokens, features)`` in float64; no padding."""
    rows = []
    for batch in tiny.batches(network, BATCHES):
        with record_inputs(network.module, (group.output,)) as seen:
            network.forward(batch)
        x = seen[group.output]
        valid = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(x.shape[:2]).bool()
        rows.append(x[valid])
    return torch.cat(rows).double()


def features(kept: tuple[int, ...], group: Group) -> list[int]:
    return [unit * group.width + f for unit in kept for f in range(group.width)]


def compensated(network: Network, plan: Plan, ridge: float) -> nn.Module:
    structure = analyze(network, narrow=False).structure
    found = corp.moments(network, structure, tiny.batches(network, BATCHES))
    module = copy.deepcopy(network.module)
    for name, kept in plan.kept.items():
        corp.compensate(module, structure.group(name), kept, found[name], ridge)
    return slice_network(module, structure, plan)


@pytest.mark.parametrize("name", ["vit", "vit_without_biases", "bert", "distilbert"])
def test_compensation_is_ridge_regression_on_all_activations(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name).without_widths()
    plan = tiny.uneven_plan(structure)
    small = compensated(network, plan, RIDGE)
    for group in structure.groups:
        x = activations(network, group)
        inside = features(plan.kept[group.name], group)
        lost = [f for f in range(x.shape[1]) if f not in inside]
        # Columns: features kept, and the constant, which is not penalised.
        design = torch.cat([x[:, inside], torch.ones(len(x), 1).double()], dim=1)
        penalty = (RIDGE * len(x)) ** 0.5 * torch.eye(len(inside), len(inside) + 1).double()
        stacked = torch.cat([design, penalty])
        answers = torch.cat([x[:, lost], torch.zeros(len(inside), len(lost)).double()])
        solution = torch.linalg.lstsq(stacked, answers, driver="gelsd").solution
        linear = network.module.get_submodule(group.output)
        weight = linear.weight.detach().double()
        bias = linear.bias.detach().double() if linear.bias is not None else torch.zeros(tiny.WIDTH).double()
        expected_bias = bias + weight[:, lost] @ solution[-1]
        torch.testing.assert_close(output_bias(small, group).double(), expected_bias, rtol=1e-4, atol=1e-5)
        if inside:
            expected = weight[:, inside] + weight[:, lost] @ solution[:-1].T
            given = small.get_parameter(f"{group.output}.weight").double()
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)


def test_units_that_depend_linearly_on_others_leave_without_a_trace() -> None:
    network = tiny.vit()
    structure = analyze(network, narrow=False).structure
    block = network.module.blocks[0]
    half = tiny.NEURONS // 2
    for parameter in block.mlp.fc1.parameters():
        parameter.data[half:] = parameter.data[:half]
    for parameter in block.attn.qkv.parameters():
        per_head = parameter.data.unflatten(0, (3, tiny.HEADS, -1))
        per_head[:, 3] = per_head[:, 0]
        per_head[2, 3] *= -0.5
    plan = Plan({"blocks.0.attn": (0, 1, 2), "blocks.0.mlp": tuple(range(half))})
    small = compensated(network, plan, 1e-9)
    batch = tiny.images("x", 4, seed=99)
    with torch.no_grad():
        expected = network.module(**batch)
        torch.testing.assert_close(small(**batch), expected, rtol=0, atol=1e-4)
        assert float((slice_network(network.module, structure, plan)(**batch) - expected).abs().max()) > 1e-2


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_units_are_ranked_by_active_energy(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name).without_widths()
    batches = tiny.batches(network, BATCHES)
    given = corp.active_energy(network, structure, batches, corp.moments(network, structure, batches))
    for group in structure.groups:
        x = activations(network, group)
        threshold = 0.01 * float(x.square().mean().sqrt())
        for unit in range(group.units):
            score = 0.0
            for feature in features((unit,), group):
                values = x[:, feature].tolist()
                energy = sum(v * v for v in values) / len(values)
                score += energy * sum(abs(v) > threshold for v in values) / len(values)
            assert float(given[group.name][unit]) == pytest.approx(score)


def test_shrinkage() -> None:
    # p = 2, tr Σ = 4, tr Σ² = 10, n = 9: ρ = 16 / (9 · 2).
    assert corp.shrinkage(torch.diag(torch.tensor([3.0, 1.0])).double(), 9) == pytest.approx(8 / 9 * 2)
    # Nothing tells the directions apart: shrink wholly.
    assert corp.shrinkage(0.5 * torch.eye(3).double(), 100) == pytest.approx(0.5)
    assert corp.shrinkage(1e-6 * torch.eye(3).double(), 100) == corp.RIDGE


@pytest.mark.parametrize("name", ["vit", "vit_without_biases", "vit_layer_scale", "bert_classifier", "segmenter"])
@pytest.mark.parametrize("flops", [0.8, 0.6])
def test_budgets_hold_and_layers_keep_the_same_share(name: str, flops: float) -> None:
    network = tiny.network(name)
    space = analyze(network, narrow=False)
    plan, module = corp.prune(network, space, tiny.batches(network, BATCHES), flops)
    share = space.costs.of(plan) / space.costs.total
    assert flops - 0.01 <= share <= flops
    assert count_flops(module, network.inputs) == pytest.approx(space.costs.of(plan), rel=1e-6)
    for kind, step in (("head", 0), ("neuron", 3)):
        sizes = [len(plan.kept[g.name]) for g in space.structure.groups if g.kind == kind]
        assert max(sizes) - min(sizes) <= step
    again, _ = corp.prune(network, space, tiny.batches(network, BATCHES), flops, seed=1)
    assert again == plan


def test_compensation_brings_the_network_nearer_to_the_dense_one() -> None:
    network = tiny.network("vit")
    space = analyze(network, narrow=False)
    plan, module = corp.prune(network, space, tiny.batches(network, 20), 0.7)
    batch = tiny.images("x", 20, seed=99)
    with torch.no_grad():
        dense = network.module(**batch)
        without = slice_network(network.module, space.structure, plan)(**batch)
        assert float((module(**batch) - dense).norm()) < 0.9 * float((without - dense).norm())


def test_a_budget_below_the_floor_is_told() -> None:
    network = tiny.network("vit")
    with pytest.raises(UserError, match="cannot be reached"):
        corp.prune(network, analyze(network, narrow=False), tiny.batches(network, 1), 0.2)
