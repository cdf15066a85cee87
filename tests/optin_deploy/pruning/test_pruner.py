from typing import get_args

import pytest
import timm.layers
import tiny
import torch
from torch import Tensor, nn

from optin_deploy.criteria.registry import Criterion
from optin_deploy.criteria.scoring import Scorer, Scoring
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.nn.flops import count_flops
from optin_deploy.pruning.head_rotation import rotate_heads_to_pca
from optin_deploy.pruning.pruner import Pruned, prune
from optin_deploy.pruning.removal import Remover
from optin_deploy.pruning.rounds import next_step
from optin_deploy.pruning.settings import PruneSettings
from optin_deploy.pruning.space import analyze
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network
from optin_deploy.utils.progress import show_progress

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def network() -> Network:
    return tiny.vit(embed_dim=32, depth=3, mlp_ratio=4)


def classes(batches: list[tiny.Batch]) -> list[Tensor]:
    return [torch.arange(len(next(iter(batch.values())))) % 3 for batch in batches]


def share(pruned: Pruned, network: Network) -> float:
    return count_flops(pruned.network.module, network.inputs) / count_flops(network.module, network.inputs)


def same(ours: nn.Module, theirs: nn.Module) -> bool:
    given, expected = ours.state_dict(), theirs.state_dict()
    return given.keys() == expected.keys() and all(torch.equal(given[k], v) for k, v in expected.items())


@pytest.mark.parametrize("flops", [0.4, 0.7])
@pytest.mark.parametrize("scorer", ["sketch", "exact"])
def test_a_pruned_network_meets_its_budget(network: Network, flops: float, scorer: Scorer) -> None:
    scoring = Scoring("trajectory", scorer=scorer)
    pruned = prune(network, tiny.batches(network, 2), flops, scoring=scoring, align=8)
    assert flops - 0.01 <= share(pruned, network) <= flops
    assert pruned.space.costs.of(pruned.plan) == count_flops(pruned.network.module, network.inputs)
    assert pruned.network.forward(network.inputs)["output"].shape == (3, 3)
    assert pruned.scores.keys() == pruned.plan.kept.keys() == {g.name for g in pruned.space.structure.groups}
    assert all(g.kind != "width" for g in pruned.space.structure.groups)


@pytest.mark.parametrize("narrow", [None, True, False])
@pytest.mark.parametrize("criterion", get_args(Criterion))
def test_every_criterion_prunes_to_the_budget(network: Network, criterion: Criterion, narrow: bool | None) -> None:
    batches = tiny.batches(network, 2)
    scoring = Scoring(criterion)
    pruned = prune(network, batches, 0.5, scoring=scoring, labels=classes(batches), align=8, narrow=narrow)
    assert 0.49 <= share(pruned, network) <= 0.5
    narrows = criterion == "trajectory-obs" if narrow is None else narrow
    assert ({g.kind for g in pruned.space.structure.groups} == {"head", "width", "neuron"}) == narrows
    assert pruned.network.forward(network.inputs)["output"].isfinite().all()


@pytest.mark.parametrize("name", ["vit_layer_scale", "bert_classifier", "distilbert", "dinov2", "plain_resnet"])
def test_the_default_prunes_networks_of_all_kinds(name: str) -> None:
    dense = tiny.network(name)
    before = {k: v.clone() for k, v in dense.module.state_dict().items()}
    pruned = prune(dense, tiny.batches(dense, 3), 0.6, align=1)
    assert share(pruned, dense) <= 0.6
    assert all(torch.equal(v, before[k]) for k, v in dense.module.state_dict().items())


def test_heads_get_narrower_and_keep_their_first_dimensions() -> None:
    dense = tiny.vit(embed_dim=32, num_heads=2, depth=2)
    pruned = prune(dense, tiny.batches(dense, 3), 0.5)
    kept = {g.name: pruned.plan.kept[g.name] for g in pruned.space.structure.groups if g.kind == "width"}
    assert all(units == tuple(range(len(units))) for units in kept.values())
    assert any(len(units) < 16 for units in kept.values())
    for name, units in kept.items():
        attention = pruned.network.module.get_submodule(name.removesuffix(".width"))
        if isinstance(attention, timm.layers.Attention):
            assert attention.head_dim == len(units)


def test_pruning_twice_gives_the_same_bytes(network: Network) -> None:
    scoring = Scoring(seed=1)
    first, second = (prune(network, tiny.batches(network, 2), 0.5, scoring=scoring) for _ in range(2))
    assert first.plan == second.plan
    assert same(first.network.module, second.network.module)


@pytest.mark.parametrize("narrow", [True, False])
def test_without_compensation_it_is_only_sliced_rotate_heads_to_pca(network: Network, narrow: bool) -> None:
    batches = tiny.batches(network, 1)
    pruned = prune(network, batches, 0.5, ridge=None, narrow=narrow)
    turned = rotate_heads_to_pca(network, pruned.space.structure, batches)
    assert (turned is network) == (not narrow)
    assert same(pruned.network.module, slice_network(turned.module, pruned.space.structure, pruned.plan))


def test_repair_brings_the_outputs_closer(network: Network) -> None:
    batches = tiny.batches(network, 8)
    unseen = tiny.images("x", 16, seed=100)
    with torch.no_grad():
        dense = network.module(**unseen)
        errors = [
            float((prune(network, batches, 0.5, ridge=ridge).network.module(**unseen) - dense).norm())
            for ridge in (None, 0.1, "auto")
        ]
    assert errors[1] < errors[0]
    assert errors[2] < errors[0]


def test_pruning_what_was_pruned(network: Network) -> None:
    batches = tiny.batches(network, 1)
    first = prune(network, batches, 0.7, ridge=None, narrow=False)
    second = prune(first.network, batches, 0.6, ridge=None, narrow=False)
    assert second.network.inputs is network.inputs
    expected = slice_network(network.module, analyze(network).structure, second.plan.after(first.plan))
    assert same(second.network.module, expected)


# Rounds


@pytest.mark.parametrize("rounds", [2, 3])
@pytest.mark.parametrize("criterion", ["trajectory-obs", "magnitude"])
def test_rounds_meet_the_budget(network: Network, criterion: Criterion, rounds: int) -> None:
    batches = tiny.batches(network, 2)
    pruned = prune(network, batches, 0.5, scoring=Scoring(criterion), rounds=rounds, align=8)
    assert 0.49 <= share(pruned, network) <= 0.5
    # The plan counts units of the dense network, also where it came about in several steps.
    assert pruned.space.costs.of(pruned.plan) == count_flops(pruned.network.module, network.inputs)
    assert pruned.plan.kept.keys() == {g.name for g in pruned.space.structure.groups}


@pytest.mark.parametrize("ridge", [None, 0.1])
def test_two_rounds_are_their_parts(network: Network, ridge: float | None) -> None:
    batches, scoring = tiny.batches(network, 2), Scoring()
    pruned = prune(network, batches, 0.5, scoring=scoring, rounds=2, ridge=ridge, align=8)
    space = analyze(network)
    first = prune(network, batches, 0.5**0.5, scoring=scoring, ridge=ridge, align=8)
    assert 0.5**0.5 - 0.01 <= share(first, network) <= 0.5**0.5
    rest, plan = next_step(first.network, space, batches, PruneSettings(0.5, scoring, align=8))
    assert rest == analyze(first.network).structure
    dense = rotate_heads_to_pca(network, space.structure, batches)
    small = first.network.module
    together, smaller = Remover(dense, space, batches, ridge).remove_more((first.plan, small), (rest, plan))
    assert pruned.plan == together == plan.after(first.plan)
    assert same(pruned.network.module, smaller)
    for name, kept in together.kept.items():
        assert set(kept) <= set(first.plan.kept[name])
    if ridge is None:
        directly = slice_network(dense.module, space.structure, together)
        with torch.no_grad():
            given, expected = smaller(**network.inputs), directly(**network.inputs)
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)


def test_rounds_without_widths_stay_without(network: Network) -> None:
    pruned = prune(network, tiny.batches(network, 1), 0.6, rounds=2, narrow=False, align=8)
    heads = [m.head_dim for m in pruned.network.module.modules() if isinstance(m, timm.layers.Attention)]
    assert set(heads) <= {8}
    assert 0.59 <= share(pruned, network) <= 0.6


# Labels


def test_fisher_takes_labels_in_every_round(network: Network) -> None:
    batches = tiny.batches(network, 2)
    scoring, labels = Scoring("fisher"), classes(batches)
    given = prune(network, batches, 0.6, scoring=scoring, labels=labels, rounds=2, align=8)
    other = prune(network, batches, 0.6, scoring=scoring, labels=[(c + 1) % 3 for c in labels], rounds=2, align=8)
    assert any(not torch.equal(given.scores[name], other.scores[name]) for name in given.scores)


def test_fisher_without_labels_or_logits_is_refused(network: Network) -> None:
    for dense, expected in ((network, "labels"), (tiny.network("bert"), "class logits")):
        batches = tiny.batches(dense, 1)
        labels = None if dense is network else classes(batches)
        with pytest.raises(UserError, match=expected):
            prune(dense, batches, 0.6, scoring=Scoring("fisher"), labels=labels)


# Refusals


@pytest.mark.parametrize("flops", [-0.5, 0, 1, 50, float("nan")])
def test_a_budget_out_of_range_is_refused(network: Network, flops: float) -> None:
    with pytest.raises(UserError, match="above 0 and below 1"):
        prune(network, [], flops)


def test_no_rounds_are_refused(network: Network) -> None:
    with pytest.raises(UserError, match="rounds=0"):
        prune(network, [], 0.5, rounds=0)


def test_a_budget_below_the_floor_is_refused_before_any_work(network: Network) -> None:
    costs = analyze(network).costs
    with pytest.raises(UserError, match=f"{costs.floor / costs.total:.3f}"):
        prune(network, [], 0.001)


def test_a_network_without_anything_prunable_is_refused() -> None:
    plain = tiny.network_around(nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4)), {"input": torch.ones(2, 4)})
    with pytest.raises(UserError, match="nothing prunable"):
        analyze(plain)


def test_remove_reports_progress_only_when_it_repairs(network: Network) -> None:
    space, batches = analyze(network), tiny.batches(network, 1)
    shown: list[float] = []
    plan = Plan({space.structure.groups[0].name: (0,)})
    with show_progress(shown.append):
        Remover(network, space, batches, 0.1).remove(plan)
    assert shown == pytest.approx([1 / 3, 2 / 3, 1])
