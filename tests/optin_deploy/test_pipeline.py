import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
from safetensors.torch import load_file
from tiny_models import TinyModule, own_batches, own_network, save_bert, save_lines, save_shallow, texts

from optin_deploy import checkpoint, pipeline
from optin_deploy.calibration import from_batches
from optin_deploy.costs import count_flops
from optin_deploy.errors import UserError
from optin_deploy.models import load_network
from optin_deploy.network import Network
from optin_deploy.pipeline import Result, prune_export
from optin_deploy.recipe import Recipe
from optin_deploy.report import read_report
from optin_deploy.slicing import sliced
from optin_deploy.structure.describe import describe

QUICK: dict[str, Any] = {"runtimes": ("ort-cpu",), "batch_sizes": (1,), "profile_seconds": 0.2, "threads": 1}
FILES = {
    "run.json",
    "recipe.yaml",
    "scores.safetensors",
    "plan.json",
    "checkpoint",
    "agreement.json",
    "dense.onnx",
    "pruned.onnx",
    "parity.json",
    "profile.json",
    "report.json",
    "report.html",
}


def vision_recipe(model: str, **options: Any) -> Recipe:
    return Recipe(**{**QUICK, "model": model, "flops": 0.6, "calibration_samples": 8, **options})


@pytest.fixture(scope="module")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("shallow") / "model"
    save_shallow(path)
    return str(path)


@pytest.fixture(scope="module")
def vision(shallow: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    return prune_export(vision_recipe(shallow), output=tmp_path_factory.mktemp("vision") / "deep" / "run", quiet=True)


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Result:
    path = tmp_path_factory.mktemp("text")
    save_bert(path / "bert")
    recipe = Recipe(
        **QUICK,
        model=str(path / "bert"),
        flops=0.7,
        sequence_length=16,
        calibration=save_lines(path / "texts.txt", texts(60)),
        calibration_samples=24,
        evaluate=save_lines(path / "labelled.csv", [f"{t},{i % 3}" for i, t in enumerate(texts(30))]),
    )
    return prune_export(recipe, output=path / "run", quiet=True)


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Result:
    recipe = Recipe(**QUICK, model="mine", flops=0.5)
    path = tmp_path_factory.mktemp("own") / "run"
    return prune_export(recipe, output=path, network=own_network(), calibration=from_batches(own_batches()), quiet=True)


@pytest.fixture(params=["vision", "text", "own"])
def run(request: pytest.FixtureRequest) -> Result:
    result: Result = request.getfixturevalue(request.param)
    return result


def no_export(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_exported", interrupt)


def run_until_export(recipe: Recipe, directory: Path, **options: Any) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        no_export(patch)
        prune_export(recipe, output=directory, quiet=True, **options)


def loaded(run: Result) -> torch.nn.Module:
    module = TinyModule() if run.network.source.library == "custom" else None
    return checkpoint.load(run.directory / "checkpoint", module)


def other_batch(network: Network) -> dict[str, torch.Tensor]:
    """Five samples, and sequences of another length than those the network was exported with."""
    if network.sequence_inputs:
        return dict(network.preprocessing(texts(5)))
    return {name: torch.randn(5, *t.shape[1:]) for name, t in network.inputs.items()}


# What a run leaves


def test_all_files_are_there(run: Result) -> None:
    names = {p.name for p in run.directory.iterdir()}
    assert names == FILES | ({"evaluation.json"} if run.report.evaluation else set())


def test_report_can_be_read(run: Result) -> None:
    read = read_report(run.directory / "report.json")
    assert read == run.report
    assert len((run.directory / "report.html").read_text(encoding="utf-8")) > 5000
    assert [(m.runtime, m.batch_size) for m in read.profile] == [("ort-cpu", 1)]
    assert read.realised[0].ratio.value > 0
    assert all(read.stage_seconds.get(stage, 0) > 0 for stage in ("score", "export ONNX", "measure"))


def test_flops_are_within_the_window(run: Result) -> None:
    flops = run.report.budget.flops
    assert flops - 0.01 <= run.report.flops_ratio <= flops
    assert run.report.pruned.flops == count_flops(loaded(run), run.network.inputs)
    assert [(g.name, g.passed) for g in run.report.gates] == [("budget", True), ("parity", True)]


def test_checkpoint_is_the_pruned_network(run: Result) -> None:
    batch = other_batch(run.network)
    with torch.inference_mode():
        ours, theirs = run.network.forward(batch), run.network.forward(batch, loaded(run))
    assert all(torch.equal(ours[name], theirs[name]) for name in run.network.outputs)
    plan = json.loads((run.directory / "plan.json").read_text())
    kept = {entry.group: entry.kept for entry in run.report.plan}
    assert {name: len(units) for name, units in plan["kept"].items()} == kept
    assert (
        sum(p.numel() for p in loaded(run).parameters()) == run.report.pruned.parameters < run.report.dense.parameters
    )


def test_onnx_runs_at_other_sizes(run: Result) -> None:
    batch = other_batch(run.network)
    session = onnxruntime.InferenceSession(run.directory / "pruned.onnx", providers=["CPUExecutionProvider"])
    found = session.run(None, {name: t.numpy() for name, t in batch.items()})
    with torch.inference_mode():
        expected = run.network.forward(batch)
    for ours, theirs in zip(found, expected.values(), strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), atol=1e-4, rtol=1e-4)


def test_agreement_and_parity_are_reported(run: Result) -> None:
    (agreed,) = run.report.agreement
    assert 0.3 < agreed.cosine < 1
    assert 0 < agreed.relative_error < 1
    assert agreed.top1_agreement is not None
    assert {p.variant for p in run.report.parity} == {"dense", "pruned"}
    assert all(p.passed and p.max_abs_error < 1e-4 for p in run.report.parity)


def test_evaluation_is_reported(text: Result, vision: Result) -> None:
    assert vision.report.evaluation is None
    found = text.report.evaluation
    assert found is not None
    assert (found.metric, found.samples) == ("accuracy", 30)
    assert 0 <= found.pruned <= 100
    assert 0 <= found.dense <= 100


# Doing it again


def artefacts(directory: Path) -> dict[str, bytes]:
    names = ("scores.safetensors", "plan.json", "checkpoint/model.safetensors", "checkpoint/optin.json")
    return {name: (directory / name).read_bytes() for name in names}


def times(directory: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}


def test_interrupted_run_goes_on_and_gives_the_same(shallow: str, vision: Result, tmp_path: Path) -> None:
    directory = tmp_path / "run"
    run_until_export(vision_recipe(shallow), directory)
    assert artefacts(directory) == artefacts(vision.directory)
    before = times(directory)
    result = prune_export(vision_recipe(shallow), output=directory, quiet=True)
    assert {name: stamp for name, stamp in times(directory).items() if name in before} == {
        **before,
        "run.json": times(directory)["run.json"],
        "recipe.yaml": times(directory)["recipe.yaml"],
    }
    assert {p.name for p in directory.iterdir()} == FILES
    assert result.report.flops_ratio == vision.report.flops_ratio
    for ours, theirs in zip(result.report.parity, vision.report.parity, strict=True):
        assert ours.max_abs_reference == theirs.max_abs_reference


def test_finished_run_is_not_done_again(own: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    for late in ("profile.json", "report.json", "report.html"):
        (own.directory / late).unlink()
    before = times(own.directory)
    made: list[str] = []
    for name in ("score", "agreement", "onnx_from_program", "check_parity"):
        monkeypatch.setattr(pipeline, name, lambda *_, name=name, **__: made.append(name))
    again = prune_export(
        Recipe(**QUICK, model="mine", flops=0.5),
        output=own.directory,
        network=own_network(),
        calibration=from_batches(own_batches()),
        quiet=True,
    )
    assert not made
    rewritten = {"run.json", "recipe.yaml"}
    after = times(own.directory)
    assert {n: t for n, t in before.items() if n not in rewritten} == {
        n: t for n, t in after.items() if n in before.keys() - rewritten
    }
    assert {"profile.json", "report.json", "report.html"} <= after.keys()
    assert again.report.agreement == own.report.agreement


@pytest.mark.parametrize("change", [{"flops": 0.55}, {"seed": 1}, {"calibration_samples": 9}])
def test_another_run_is_refused(shallow: str, vision: Result, change: dict[str, Any]) -> None:
    before = times(vision.directory)
    with pytest.raises(UserError, match="holds another run"):
        prune_export(vision_recipe(shallow, **change), output=vision.directory, quiet=True)
    assert times(vision.directory) == before


def test_without_compensation(shallow: str, vision: Result, tmp_path: Path) -> None:
    recipe = vision_recipe(shallow, compensate=False)
    run_until_export(recipe, tmp_path / "run")
    dense = load_network(shallow)
    small = sliced(
        dense.module,
        describe(dense.module, dense.inputs),
        checkpoint.read_plan(tmp_path / "run" / "checkpoint"),
    )
    found = load_file(tmp_path / "run" / "checkpoint" / "model.safetensors")
    assert all(torch.equal(t, found[n]) for n, t in small.state_dict().items())
    repaired = load_file(vision.directory / "checkpoint" / "model.safetensors")
    assert any(not torch.equal(t, repaired[n]) for n, t in found.items())


def test_pruning_a_pruned_network(vision: Result, tmp_path: Path) -> None:
    first = vision.directory / "checkpoint"
    recipe = Recipe(**QUICK, model=str(first), flops=0.9, calibration_samples=8)
    run_until_export(recipe, tmp_path / "run")
    second = tmp_path / "run" / "checkpoint"
    before, after = checkpoint.read_plan(first), checkpoint.read_plan(second)
    assert all(set(after.kept[name]) <= set(kept) for name, kept in before.kept.items())
    dense, small = load_network(str(first)), load_network(str(second))
    ratio = count_flops(small.module, small.inputs) / count_flops(dense.module, dense.inputs)
    assert 0.89 <= ratio <= 0.9
    with torch.inference_mode():
        assert torch.isfinite(small.forward(other_batch(small))["logits"]).all()


# Nothing is left behind where inputs are wrong


def poisoned() -> Network:
    network = own_network()
    with torch.no_grad():
        network.module.get_parameter("head.weight").fill_(float("nan"))
    return network


@pytest.mark.parametrize(
    ("options", "network", "expected"),
    [
        ({"flops": 0.001}, own_network, r"0\.\d+ are left"),
        ({"runtimes": ("ort-cuda",)}, own_network, "no CUDA device"),
        ({"device": "cuda"}, own_network, "no CUDA device"),
        ({"evaluate": Path("none.csv")}, own_network, "does not exist"),
        ({}, poisoned, "NaN or infinity"),
    ],
)
def test_refusals_leave_nothing(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    options: dict[str, Any],
    network: Callable[[], Network],
    expected: str,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.chdir(tmp_path)
    recipe = Recipe(**{**QUICK, "model": "mine", "flops": 0.5, **options})
    with pytest.raises(UserError, match=expected) as caught:
        prune_export(recipe, network=network(), calibration=from_batches(own_batches()), quiet=True)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())
