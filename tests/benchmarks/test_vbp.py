import copy

import pytest
import tiny
import torch
from torch import Tensor, nn

from benchmarks.baselines import vbp
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.nn.flops import count_flops
from optin_deploy.nn.partial_forward import record_inputs
from optin_deploy.pruning.space import analyze
from optin_deploy.structure.groups import Group
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import output_bias

pytestmark = pytest.mark.slow


BATCHES = 4
# What is left of the FLOPs of these networks without any neuron is less.
BUDGETS = [("vit", 0.85), ("vit_layer_scale", 0.8), ("bert_classifier", 0.7), ("distilbert", 0.8), ("dinov2", 0.75)]


@torch.no_grad()
def activations(network: Network, group: Group) -> Tensor:
    rows = []
    for batch in tiny.batches(network, BATCHES):
        with record_inputs(network.module, (group.output,)) as seen:
            network.forward(batch)
        x = seen[group.output]
        valid = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(x.shape[:2]).bool()
        rows.append(x[valid])
    return torch.cat(rows).double()


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_running_statistics_are_those_of_all_activations(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name).without_widths()
    found = vbp.spreads(network, structure, tiny.batches(network, BATCHES))
    for group in structure.groups:
        x = activations(network, group)
        assert found[group.name].count == len(x)
        torch.testing.assert_close(found[group.name].mean, x.mean(0))
        torch.testing.assert_close(found[group.name].variance, x.var(0, correction=1))


@pytest.mark.parametrize(("name", "flops"), BUDGETS)
def test_the_module_is_the_dense_one_with_means_in_place_of_neurons(name: str, flops: float) -> None:
    network = tiny.network(name)
    space = analyze(network, narrow=False)
    plan, module = vbp.prune(network, space, tiny.batches(network, BATCHES), flops)
    dense = copy.deepcopy(network.module)
    for group_name, kept in plan.kept.items():
        group = space.structure.group(group_name)
        assert group.kind == "neuron"
        mean = activations(network, group).mean(0).float()
        removed = [u for u in range(group.units) if u not in kept]

        def put_mean(_: nn.Module, args: tuple[Tensor], mean: Tensor = mean, removed: list[int] = removed) -> object:
            x = args[0].clone()
            x[..., removed] = mean[removed]
            return (x,)

        linear = dense.get_submodule(group.output)
        bias = linear.bias.detach() + sum((mean[u] * linear.weight[:, u].detach() for u in removed), torch.zeros(()))
        torch.testing.assert_close(output_bias(module, group).detach(), bias, rtol=1e-5, atol=1e-6)
        linear.register_forward_pre_hook(put_mean)
    batch = tiny.batches(network, 1, size=4)[0]
    with torch.no_grad():
        expected, given = network.forward(batch, dense), network.forward(batch, module)
    for key, value in expected.items():
        torch.testing.assert_close(given[key], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "flops"), BUDGETS)
def test_budgets_hold(name: str, flops: float) -> None:
    network = tiny.network(name)
    space = analyze(network, narrow=False)
    plan, module = vbp.prune(network, space, tiny.batches(network, BATCHES), flops)
    assert isinstance(plan, Plan)
    assert flops - 0.01 <= space.costs.of(plan) / space.costs.total <= flops
    assert count_flops(module, network.inputs) == pytest.approx(space.costs.of(plan), rel=1e-6)


def test_a_budget_that_needs_heads_is_told() -> None:
    network = tiny.network("vit")
    with pytest.raises(UserError, match=r"FFN neurons.* 0\.759"):
        vbp.prune(network, analyze(network, narrow=False), tiny.batches(network, 1), 0.6)
