import copy
from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor, nn

from benchmarks.baselines import kprune
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.nn.flops import count_flops
from optin_deploy.nn.partial_forward import record_inputs, record_outputs
from optin_deploy.pruning.space import analyze
from optin_deploy.structure.groups import Group
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

pytestmark = pytest.mark.slow


BATCHES = 5


def valid(batch: tiny.Batch, x: Tensor) -> Tensor:
    return batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(x.shape[:2]).bool()


@pytest.mark.parametrize("name", ["vit", "vit_layer_scale", "bert"])
@torch.no_grad()
def test_representational_knowledge_is_the_mean_square_of_what_a_unit_adds(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name).without_widths()
    batches = tiny.batches(network, BATCHES)
    given = kprune.representational(network, network.module, structure, batches)
    for group in structure.groups:
        weight = network.module.get_parameter(f"{group.output}.weight")
        gamma = network.module.get_parameter(group.stream.scale) if group.stream.scale else torch.ones(tiny.WIDTH)
        for unit in range(group.units):
            own = slice(unit * group.width, (unit + 1) * group.width)
            added = []
            for batch in batches:
                with record_inputs(network.module, (group.output,)) as seen:
                    network.forward(batch)
                x = seen[group.output]
                added.append(((x[..., own] @ weight[:, own].T) * gamma)[valid(batch, x)])
            assert float(given[group.name][unit]) == pytest.approx(float(torch.cat(added).square().mean()), rel=1e-4)


def masked_loss(network: Network, module: nn.Module, sample: tiny.Batch, group: Group, mask: Tensor) -> Tensor:
    """T² KL of ``module`` with the units of one group masked from the dense ``network``, for one sample."""

    def hook(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0] * mask.repeat_interleave(group.width),)

    handle = module.get_submodule(group.output).register_forward_pre_hook(hook)
    now = network.forward(sample, module)[network.logits]
    handle.remove()
    p, q = (torch.softmax(z[0] / kprune.TEMPERATURE, 0) for z in (network.forward(sample)[network.logits], now))
    return kprune.TEMPERATURE**2 * sum(a * torch.log(a / b) for a, b in zip(p, q, strict=True))


def test_predictive_knowledge_is_half_the_mean_squared_gradient_of_each_sample() -> None:
    dense = tiny.network("bert_classifier")
    network = replace(dense, module=copy.deepcopy(dense.module).double())
    structure = tiny.structure("bert_classifier").without_widths()
    plan = Plan({structure.groups[0].name: (1, 2)})
    module = slice_network(network.module, structure, plan)
    rest = replace(structure, groups=structure.groups[1:])
    batches = tiny.batches(network, 2, size=2)
    logits = kprune.dense_logits(network, batches)
    given = kprune.importance(network, module, rest, batches, logits, 0.0)
    for group in rest.groups:
        expected = torch.zeros(group.units, dtype=torch.float64)
        for batch in batches:
            for i in range(2):
                sample = {n: t[i : i + 1] for n, t in batch.items()}
                mask = torch.ones(group.units, dtype=torch.float64, requires_grad=True)
                loss = masked_loss(network, module, sample, group, mask)
                expected += 0.5 * torch.autograd.grad(loss, mask)[0].square() / 4
        torch.testing.assert_close(given[group.name], expected, rtol=1e-6, atol=1e-12)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_without_a_difference_in_the_logits_only_representations_count(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name).without_widths()
    batches = tiny.batches(network, 2)
    given = kprune.importance(network, network.module, structure, batches, kprune.dense_logits(network, batches), 2.0)
    for group_name, knowledge in kprune.representational(network, network.module, structure, batches).items():
        torch.testing.assert_close(given[group_name], 2.0 * knowledge, rtol=1e-6, atol=1e-9)


def test_a_single_logit_is_compared_by_its_squared_difference() -> None:
    dense, now = torch.tensor([[1.0], [2.0]]), torch.tensor([[0.0], [5.0]])
    assert float(kprune.divergence(dense, now)) == 10.0


@pytest.mark.parametrize("name", ["vit", "vit_layer_scale", "bert", "vit_without_biases"])
@torch.no_grad()
def test_weights_are_the_least_squares_solution_on_all_activations(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name).without_widths()
    batches = tiny.batches(network, 12)
    kept = {g.name: tuple(range(0, g.units, 2)) for g in structure.groups}
    small = slice_network(network.module, structure, Plan(kept))
    for group in structure.groups:
        before = copy.deepcopy(small)
        kprune.tune(network, small, structure, group, batches)
        xs, targets = [], []
        gamma = network.module.get_parameter(group.stream.scale) if group.stream.scale else torch.ones(tiny.WIDTH)
        bias = before.get_submodule(group.output).bias
        for batch in batches:
            with (
                record_inputs(network.module, (group.stream.residual,)) as dense,
                record_outputs(network.module, (group.output,)) as update,
                record_inputs(before, (group.stream.residual, group.output)) as seen,
            ):
                network.forward(batch)
                network.forward(batch, before)
            stream = dense[group.stream.residual] - seen[group.stream.residual]
            target = (stream + gamma * update[group.output]) / gamma - (bias if bias is not None else 0.0)
            x = seen[group.output]
            xs.append(x[valid(batch, x)])
            targets.append(target[valid(batch, x)])
        x, target = torch.cat(xs).double(), torch.cat(targets).double()
        expected = torch.linalg.lstsq(x, target, driver="gelsd").solution.T
        given = small.get_parameter(f"{group.output}.weight").double()
        torch.testing.assert_close(given, expected, rtol=1e-3, atol=1e-4)
        others = {k: v for k, v in small.state_dict().items() if k != f"{group.output}.weight"}
        assert all(torch.equal(before.state_dict()[k], v) for k, v in others.items())


@pytest.mark.parametrize("name", ["vit", "vit_layer_scale", "bert_classifier", "distilbert", "dinov2", "segmenter"])
@pytest.mark.parametrize("flops", [0.8, 0.6])
def test_budgets_hold(name: str, flops: float) -> None:
    network = tiny.network(name)
    space = analyze(network, narrow=False)
    before = copy.deepcopy(network.module.state_dict())
    plan, module = kprune.prune(network, space, tiny.batches(network, BATCHES), flops)
    assert flops - 0.01 <= space.costs.of(plan) / space.costs.total <= flops
    assert count_flops(module, network.inputs) == pytest.approx(space.costs.of(plan), rel=1e-6)
    assert all(torch.equal(before[k], v) for k, v in network.module.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


def test_a_seed_changes_nothing() -> None:
    network = tiny.network("vit")
    space, batches = analyze(network, narrow=False), tiny.batches(network, BATCHES)
    plan, module = kprune.prune(network, space, batches, 0.7, seed=0)
    again, same = kprune.prune(network, space, batches, 0.7, seed=1)
    assert plan == again
    assert all(torch.equal(same.state_dict()[k], v) for k, v in module.state_dict().items())


def test_tuning_brings_the_network_nearer_to_the_dense_one() -> None:
    network = tiny.network("bert")
    space = analyze(network, narrow=False)
    plan, module = kprune.prune(network, space, tiny.batches(network, 20), 0.7)
    batch = tiny.texts(20, seed=99)
    with torch.no_grad():
        dense, given = network.forward(batch), network.forward(batch, module)
        without = network.forward(batch, slice_network(network.module, space.structure, plan))
    real = batch["attention_mask"].bool()
    name = next(iter(dense))
    errors = [float((found[name] - dense[name])[real].norm()) for found in (given, without)]
    assert errors[0] < 0.9 * errors[1]


def test_a_budget_below_the_floor_is_told() -> None:
    network = tiny.network("vit")
    with pytest.raises(UserError, match="cannot be reached"):
        kprune.prune(network, analyze(network, narrow=False), tiny.batches(network, 1), 0.2)
