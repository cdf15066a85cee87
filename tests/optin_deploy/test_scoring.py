from pathlib import Path

import pytest
import tiny
import torch
from safetensors.torch import load_file

from optin_deploy import scoring
from optin_deploy.criteria.trajectory import exact_scores, sketch_scores, task_factor
from optin_deploy.errors import UserError
from optin_deploy.scoring import save_scores, score, scoring_steps


def test_heads_exactly_and_neurons_by_sketch() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    batches = tiny.batches(network, 2)
    given = score(network, structure, batches, probes=4, task_weight=0.5, seed=5)
    factor = task_factor(network, structure, batches[0], 0.5, 5)
    exact = exact_scores(network, structure, structure.groups, batches, factor=factor, seed=5)
    sketch = sketch_scores(network, structure, batches, probes=4, weights=(1.0, factor), seed=5)
    for group in structure.groups:
        expected = (exact if group.kind == "head" else sketch)[group.name]
        torch.testing.assert_close(given[group.name], expected / 6, rtol=1e-6, atol=0)


def test_scores_are_per_sample() -> None:
    network, structure = tiny.network("bert_classifier"), tiny.structure("bert_classifier")
    batches = tiny.batches(network, 1)
    once, twice = (score(network, structure, b, scorer="exact", seed=0) for b in (batches, batches * 2))
    for name in once:
        torch.testing.assert_close(twice[name], once[name], rtol=1e-5, atol=0)


def test_without_a_task_only_the_manifold_counts() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    batches = tiny.batches(network, 1)
    given = score(network, structure, batches, scorer="exact", task_weight=0.0)
    expected = exact_scores(network, structure, structure.groups, batches, factor=0.0, seed=0)
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
    given = score(network, structure, batches, probes=1, seed=0)
    exact = score(network, structure, batches[:expected], scorer="exact", seed=0)
    for group in structure.groups:
        assert torch.equal(given[group.name], exact[group.name]) == (group.kind == "head")


@pytest.mark.parametrize("scorer", ["sketch", "exact"])
def test_the_announced_steps_are_taken(scorer: scoring.Scorer) -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    steps: list[int] = []
    score(network, structure, tiny.batches(network, 3), scorer=scorer, probes=5, advance=steps.append)
    assert sum(steps) == scoring_steps(structure, 3, scorer, 5)


@pytest.mark.parametrize("scorer", ["sketch", "exact"])
def test_one_seed_makes_the_same_bytes(scorer: scoring.Scorer, tmp_path: Path) -> None:
    network, structure = tiny.network("distilbert"), tiny.structure("distilbert")
    batches = tiny.batches(network, 2)
    for name in ("a", "b"):
        save_scores(score(network, structure, batches, scorer=scorer, probes=2, seed=1), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_saved_scores_come_back(tmp_path: Path) -> None:
    scores = {"a": torch.tensor([1.0, 2.5], dtype=torch.float64), "b": torch.zeros(0, dtype=torch.float64)}
    save_scores(scores, tmp_path / "scores.safetensors")
    given = load_file(tmp_path / "scores.safetensors")
    assert given.keys() == scores.keys()
    assert all(torch.equal(given[n], s) for n, s in scores.items())
    assert [p.name for p in tmp_path.iterdir()] == ["scores.safetensors"]


@pytest.mark.parametrize("scorer", ["sketch", "exact"])
def test_a_network_that_gives_nan_is_refused(scorer: scoring.Scorer) -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    with pytest.raises(UserError, match="NaN"):
        score(network, structure, [{"x": torch.full((2, 3, 16, 16), torch.nan)}], scorer=scorer)
