from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import pytest
import tiny
import torch
from safetensors.torch import load_file
from torch import Tensor

from optin_deploy.config.recipe import Recipe
from optin_deploy.criteria import scoring
from optin_deploy.criteria.fisher import mask_gradients
from optin_deploy.criteria.magnitude import magnitude_scores
from optin_deploy.criteria.random_baseline import random_scores
from optin_deploy.criteria.registry import Criterion
from optin_deploy.criteria.scoring import Scoring, save_scores, score
from optin_deploy.criteria.trajectory import exact_scores, sketch_scores, task_factors
from optin_deploy.criteria.trajectory_loss import LossSettings
from optin_deploy.criteria.trajectory_obs import obs_scores, probe_moments
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.search.costs import flop_costs
from optin_deploy.structure.groups import Structure
from optin_deploy.utils.progress import show_progress

pytestmark = pytest.mark.slow


CRITERIA: tuple[Criterion, ...] = get_args(Criterion)
WAYS = [("trajectory-obs", "sketch"), *(("trajectory", scorer) for scorer in get_args(scoring.Scorer))]


def scored(
    network: Network,
    structure: Structure,
    batches: list[tiny.Batch],
    *,
    labels: list[Tensor] | None = None,
    **options: Any,
) -> dict[str, Tensor]:
    costs = flop_costs(network.module, structure, network.inputs)
    return score(network, structure, costs, batches, Scoring(**options), labels=labels)


def some_labels(batches: list[tiny.Batch]) -> list[Tensor]:
    return [torch.arange(len(next(iter(batch.values())))) % 3 for batch in batches]


def test_heads_exactly_and_the_rest_by_sketch() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    batches = tiny.batches(network, 2)
    given = scored(network, structure, batches, criterion="trajectory", probes=4, task_weight=0.5, seed=5)
    factors = task_factors(network, structure.without_widths(), [batches[0]], 0.5, 5)
    exact = exact_scores(network, structure, structure.groups, batches, LossSettings(factors=factors, seed=5))
    sketch = sketch_scores(network, structure, batches, LossSettings(factors=factors, seed=5), probes=4)
    assert given.keys() == {g.name for g in structure.groups}
    for group in structure.groups:
        expected = (exact if group.kind == "head" else sketch)[group.name]
        torch.testing.assert_close(given[group.name], expected / 6, rtol=1e-6, atol=0)


@pytest.mark.parametrize(("full", "samples"), [(0, 2), (2, 2), (4, 4), (100, 8)])
def test_obs_scores_come_from_probes_of_pieces_of_a_batch(
    full: int, samples: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    monkeypatch.setattr(scoring, "_CHUNK_TOKENS", full * structure.tokens)
    batches = tiny.batches(network, 2, size=8)
    given = scored(network, structure, batches, probes=3, seed=5)
    first = {"x": batches[0]["x"][:samples]}
    factors = task_factors(network, structure.without_widths(), [first], 1.0, 5)
    moments = probe_moments(
        network,
        structure,
        batches,
        LossSettings(factors=factors, manifold=0.0, seed=5),
        probes=3,
        samples_at_once=samples,
    )
    for name, expected in obs_scores(network.module, structure, moments).items():
        assert torch.equal(given[name], expected)


@pytest.mark.parametrize(
    ("name", "tokens", "size", "samples"),
    [
        ("vit", 35, 32, 15),
        ("vit", 100, 32, 8),
        ("vit", 128, 16, 2),
        ("vit", 197, 16, 1),
        ("vit", 600, 16, 1),
        ("plain_resnet", 1024, 64, 16),
    ],
)
def test_a_backward_pass_takes_a_part_of_a_batch(name: str, tokens: int, size: int, samples: int) -> None:
    structure = replace(tiny.structure(name), tokens=tokens)
    batches = [{"x": torch.zeros(size, 1)}]
    assert scoring._samples_at_once(tiny.network(name), structure, batches) == samples


def test_the_other_criteria_are_what_their_functions_give() -> None:
    network, structure = tiny.network("bert_classifier"), tiny.structure("bert_classifier")
    batches = tiny.batches(network, 2)
    costs = flop_costs(network.module, structure, network.inputs)
    labels = some_labels(batches)
    gradients = mask_gradients(network, structure, batches, labels)
    for criterion, expected in (
        ("fisher", {n: sum(s.square() for s in g) / len(g) for n, g in gradients.items()}),
        ("magnitude", magnitude_scores(network.module, structure)),
        ("random", random_scores(structure, costs, 7)),
    ):
        given = scored(network, structure, batches, criterion=criterion, labels=labels, seed=7)
        assert given.keys() == expected.keys()
        for name, values in expected.items():
            torch.testing.assert_close(given[name], values)


@pytest.mark.parametrize("criterion", CRITERIA)
def test_scores_of_every_criterion_are_finite_and_not_negative(criterion: Criterion) -> None:
    network, structure = tiny.network("bert_classifier"), tiny.structure("bert_classifier")
    batches = tiny.batches(network, 1)
    given = scored(network, structure, batches, criterion=criterion, labels=some_labels(batches))
    assert {g.name: (g.units,) for g in structure.groups} == {n: tuple(s.shape) for n, s in given.items()}
    for values in given.values():
        assert (values.dtype, values.device.type) == (torch.float64, "cpu")
        assert values.isfinite().all() and float(values.min()) >= 0
        assert float(values.max()) > 0


def test_scores_are_per_sample() -> None:
    network, structure = tiny.network("bert_classifier"), tiny.structure("bert_classifier")
    batches = tiny.batches(network, 1)
    once, twice = (
        scored(network, structure, b, criterion="trajectory", scorer="exact") for b in (batches, 2 * batches)
    )
    for name in once:
        torch.testing.assert_close(twice[name], once[name], rtol=1e-5, atol=0)


def test_without_a_task_only_the_manifold_counts() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    batches = tiny.batches(network, 1)
    given = scored(network, structure, batches, criterion="trajectory", scorer="exact", task_weight=0.0)
    expected = exact_scores(network, structure, structure.groups, batches, LossSettings(factors={}, seed=0))
    for name in expected:
        torch.testing.assert_close(given[name], expected[name] / 3)


@pytest.mark.parametrize("name", ["vit", "bert"])
@pytest.mark.parametrize("tokens", [1, 20, 10_000])
def test_heads_are_scored_on_as_many_batches_as_hold_enough_tokens(
    name: str, tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "_EXACT_TOKENS", tokens)
    network, structure = tiny.network(name), tiny.structure(name)
    batches = tiny.batches(network, 4)
    # A batch has 15 tokens; of texts 7, 6 and 5 are not padding.
    expected = {1: 1, 20: 2, 10_000: 4}[tokens]
    given = scored(network, structure, batches, criterion="trajectory", probes=1)
    exact = scored(network, structure, batches[:expected], criterion="trajectory", scorer="exact")
    for group in structure.groups:
        assert torch.equal(given[group.name], exact[group.name]) == (group.kind == "head")


@pytest.mark.parametrize(("criterion", "scorer"), [*WAYS, ("fisher", "sketch")])
def test_progress_rises_to_one(criterion: Criterion, scorer: scoring.Scorer) -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    batches = tiny.batches(network, 3)
    options: dict[str, Any] = {"criterion": criterion, "scorer": scorer, "probes": 5}
    shown: list[float] = []
    with show_progress(shown.append):
        scored(network, structure, batches, labels=some_labels(batches), **options)
    assert len(shown) >= 3
    assert shown == sorted(shown) and shown[-1] == 1.0


@pytest.mark.parametrize(("criterion", "scorer"), [*WAYS, ("random", "sketch")])
def test_one_seed_makes_the_same_bytes(criterion: Criterion, scorer: scoring.Scorer, tmp_path: Path) -> None:
    network, structure = tiny.network("distilbert"), tiny.structure("distilbert")
    batches = tiny.batches(network, 2)
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        given = scored(network, structure, batches, criterion=criterion, scorer=scorer, probes=2, seed=seed)
        save_scores(given, tmp_path / name)
    found = {name: (tmp_path / name).read_bytes() for name in "abc"}
    assert found["a"] == found["b"] != found["c"]


def test_saved_scores_come_back(tmp_path: Path) -> None:
    scores = {"a": torch.tensor([1.0, 2.5], dtype=torch.float64), "b": torch.zeros(0, dtype=torch.float64)}
    save_scores(scores, tmp_path / "scores.safetensors")
    given = load_file(tmp_path / "scores.safetensors")
    assert given.keys() == scores.keys()
    assert all(torch.equal(given[n], s) for n, s in scores.items())
    assert [p.name for p in tmp_path.iterdir()] == ["scores.safetensors"]


@pytest.mark.parametrize(("criterion", "scorer"), [*WAYS, ("fisher", "sketch")])
def test_a_network_that_gives_nan_is_refused(criterion: Criterion, scorer: scoring.Scorer) -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    batches = [{"x": torch.full((2, 3, 16, 16), torch.nan)}]
    with pytest.raises(UserError, match="NaN") as caught:
        scored(network, structure, batches, criterion=criterion, scorer=scorer, labels=some_labels(batches))
    assert "\n" not in str(caught.value)


def test_one_draw_is_too_few_to_compare() -> None:
    network = tiny.network("vit")
    with pytest.raises(UserError, match="2 probes") as caught:
        scored(
            network,
            tiny.structure("vit"),
            tiny.batches(network, 1),
            criterion="trajectory",
            scorer="forward",
            probes=1,
        )
    assert "\n" not in str(caught.value)


def test_draws_of_each_criterion() -> None:
    assert [Scoring(c).draws for c in ("trajectory-obs", "trajectory")] == [1, 4]
    assert Scoring("trajectory", probes=7).draws == Scoring(probes=7).draws == 7


def test_fisher_needs_labels_and_logits() -> None:
    for name, labels, expected in (("vit", None, "--calibration-labels"), ("bert", [torch.zeros(3)], "class logits")):
        network = tiny.network(name)
        with pytest.raises(UserError, match=expected) as caught:
            scored(network, tiny.structure(name), tiny.batches(network, 1), criterion="fisher", labels=labels)
        assert "\n" not in str(caught.value)


def test_only_trajectory_obs_narrows_heads_of_itself() -> None:
    for criterion in CRITERIA:
        assert Scoring(criterion).narrows_heads == (criterion == "trajectory-obs")
        recipe = Recipe(model="m", flops=0.5, criterion=criterion)
        assert recipe.narrows_heads == Scoring(criterion).narrows_heads
        for wanted in (True, False):
            assert Recipe(model="m", flops=0.5, criterion=criterion, narrow_heads=wanted).narrows_heads == wanted


def test_maps_and_classifiers_are_judged_by_the_task_alone_unless_a_weight_is_given() -> None:
    for name, manifold in (("plain_resnet", 0.0), ("bert_classifier", 0.0), ("bert", 1.0)):
        network, structure = tiny.network(name), tiny.structure(name)
        assert (network.logits is None) == (name == "bert")
        assert Scoring().weights(network, structure) == (manifold, 1.0)
        assert Scoring(task_weight=2.0).weights(network, structure) == (1.0, 2.0)
        assert Scoring(criterion="trajectory").weights(network, structure) == (1.0, 1.0)


@pytest.mark.parametrize("name", ["plain_resnet", "bert_classifier"])
def test_the_task_alone_gives_other_scores_than_with_the_trajectory(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    batches = tiny.batches(network, 2)
    given, both = (scored(network, structure, batches, task_weight=weight) for weight in (None, 1.0))
    assert any(not torch.equal(given[group], both[group]) for group in given)


def test_recipe_and_scoring_have_the_same_defaults() -> None:
    recipe = Recipe(model="m", flops=0.5)
    given = Scoring(recipe.criterion, recipe.scorer, recipe.probes, recipe.task_weight, recipe.seed)
    assert given == Scoring()
