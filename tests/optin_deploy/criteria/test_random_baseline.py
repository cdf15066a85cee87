import pytest
import tiny
import torch

from optin_deploy.criteria.random_baseline import random_scores
from optin_deploy.search.costs import Costs, flop_costs
from optin_deploy.search.knapsack import search
from optin_deploy.structure.groups import CostModules, Group, Structure

pytestmark = pytest.mark.slow


def test_scores_are_uniform_draws_times_the_cost_of_a_unit() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    costs = flop_costs(network.module, structure, network.inputs)
    generator = torch.Generator().manual_seed(3)
    for name, scores in random_scores(structure, costs, 3).items():
        draws = [float(torch.rand(1, generator=generator, dtype=torch.float64)) for _ in scores]
        assert scores.dtype == torch.float64
        assert scores.tolist() == pytest.approx([costs.per_unit[name] * d for d in draws])


def test_a_seed_makes_the_scores() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    costs = flop_costs(network.module, structure, network.inputs)
    first, again, other = (random_scores(structure, costs, seed) for seed in (0, 0, 1))
    assert all(torch.equal(first[n], again[n]) and not torch.equal(first[n], other[n]) for n in first)


def test_every_group_keeps_about_the_same_share() -> None:
    groups = tuple(
        Group(n, "neuron", units, 1, n, (), CostModules()) for n, units in (("a", 150), ("b", 300), ("c", 300))
    )
    per_unit = {"a": 20.0, "b": 1.0, "c": 5.0}
    total = sum(per_unit[g.name] * g.units for g in groups)
    costs = Costs(total, per_unit, {g.name: g.units for g in groups})
    structure = Structure(("block",), groups, 1)
    plan = search(structure, random_scores(structure, costs, 0), costs, 0.6, 1)
    for group in groups:
        assert len(plan.kept[group.name]) / group.units == pytest.approx(0.6, abs=0.08)
