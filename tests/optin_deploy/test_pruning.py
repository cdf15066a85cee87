import pytest
import tiny
import torch
from torch import nn

from optin_deploy.costs import count_flops
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.plan import Plan
from optin_deploy.pruning import examine, prune, remove
from optin_deploy.slicing import sliced


@pytest.fixture(scope="module")
def network() -> Network:
    return tiny.vit(embed_dim=32, depth=3, mlp_ratio=4)


@pytest.mark.parametrize("flops", [0.4, 0.7])
@pytest.mark.parametrize("scorer", ["sketch", "exact"])
def test_a_pruned_network_meets_its_budget(network: Network, flops: float, scorer: str) -> None:
    pruned = prune(network, tiny.batches(network, 2), flops, scorer=scorer, probes=2, align=8)
    share = count_flops(pruned.network.module, network.inputs) / count_flops(network.module, network.inputs)
    assert flops - 0.01 <= share <= flops
    assert pruned.anatomy.costs.of(pruned.plan) == count_flops(pruned.network.module, network.inputs)
    assert pruned.network.forward(network.inputs)["output"].shape == (3, 3)
    assert pruned.scores.keys() == pruned.plan.kept.keys()


def test_pruning_twice_gives_the_same_bytes(network: Network) -> None:
    first, second = (prune(network, tiny.batches(network, 2), 0.5, probes=2, seed=1) for _ in range(2))
    assert first.plan == second.plan
    other = second.network.module.state_dict()
    assert all(torch.equal(v, other[k]) for k, v in first.network.module.state_dict().items())


def test_without_repair_it_is_only_sliced(network: Network) -> None:
    pruned = prune(network, tiny.batches(network, 1), 0.5, probes=2, repair=False)
    expected = sliced(network.module, pruned.anatomy.structure, pruned.plan).state_dict()
    given = pruned.network.module.state_dict()
    assert all(torch.equal(given[k], v) for k, v in expected.items())


def test_repair_brings_the_outputs_closer(network: Network) -> None:
    batches = tiny.batches(network, 8)
    unseen = tiny.images("x", 16, seed=100)
    with torch.no_grad():
        dense = network.module(**unseen)
        errors = [
            float((prune(network, batches, 0.5, probes=2, repair=r).network.module(**unseen) - dense).norm())
            for r in (False, True)
        ]
    assert errors[1] < errors[0]


def test_pruning_what_was_pruned(network: Network) -> None:
    batches = tiny.batches(network, 1)
    first = prune(network, batches, 0.7, probes=2, repair=False)
    second = prune(first.network, batches, 0.6, probes=2, repair=False)
    assert second.network.inputs is network.inputs
    expected = sliced(network.module, examine(network).structure, second.plan.after(first.plan)).state_dict()
    given = second.network.module.state_dict()
    assert all(torch.equal(given[k], v) for k, v in expected.items())


@pytest.mark.parametrize("flops", [-0.5, 0, 1, 50, float("nan")])
def test_a_budget_out_of_range_is_refused(network: Network, flops: float) -> None:
    with pytest.raises(UserError, match="above 0 and below 1"):
        prune(network, [], flops)


def test_a_budget_below_the_floor_is_refused_before_any_work(network: Network) -> None:
    costs = examine(network).costs
    with pytest.raises(UserError, match=f"{costs.floor / costs.total:.3f}"):
        prune(network, [], 0.001)


def test_a_network_without_anything_prunable_is_refused() -> None:
    plain = tiny.network_around(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), {"input": torch.ones(2, 4)})
    with pytest.raises(UserError, match="nothing prunable"):
        examine(plain)


def test_remove_reports_progress_only_when_it_repairs(network: Network) -> None:
    structure, batches = examine(network).structure, tiny.batches(network, 1)
    steps: list[float] = []
    plan = Plan({structure.groups[0].name: (0,)})
    remove(network, structure, plan, batches, None, steps.append)
    assert steps == []
    remove(network, structure, plan, batches, 0.1, steps.append)
    assert steps == [1, 1, 1]
