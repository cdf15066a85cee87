import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import tiny
import torch
from safetensors.torch import load_file
from tiny_models import TinyModule, own_batches, own_network, save_bert, save_lines, texts

from exporters import check_parity, onnx_from_program, trace
from optin_deploy.config.recipe import Recipe, make_recipe
from optin_deploy.criteria.fisher import fisher_scores, mask_gradients
from optin_deploy.criteria.scoring import Scoring
from optin_deploy.data.calibration import from_batches, load_calibration
from optin_deploy.errors import UserError
from optin_deploy.export import onnx_file, requirements
from optin_deploy.models import checkpoint
from optin_deploy.models.load import load_network
from optin_deploy.network import Network, TensorOutputs
from optin_deploy.nn.flops import count_flops
from optin_deploy.pruning.head_rotation import rotate_heads_to_pca
from optin_deploy.pruning.pruner import prune
from optin_deploy.pruning.space import analyze
from optin_deploy.report import read_report
from optin_deploy.run import compare_stage, pipeline, prune_stage
from optin_deploy.run.pipeline import Result, prune_export
from optin_deploy.run.report_builder import _weights_origin
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network
from profilers.environment import Cores

pytestmark = pytest.mark.slow


QUICK: dict[str, Any] = {"runtimes": ("ort-cpu",), "batch_sizes": (1,), "profile_seconds": 0.2, "threads": 1}
FILES = {
    "run.json",
    "recipe.yaml",
    "scores.safetensors",
    "plan.json",
    "checkpoint",
    "agreement.json",
    "pictures.json",
    "dense.onnx",
    "pruned.onnx",
    "parity.json",
    "profile.json",
    "layers.json",
    "report.json",
    "report.html",
    "report.md",
}


def vision_recipe(model: str, **options: Any) -> Recipe:
    return Recipe(**{**QUICK, "model": model, "flops": 0.6, "calibration_samples": 8, **options})


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

    monkeypatch.setattr(pipeline, "export_and_measure", interrupt)


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
    names = {p.name for p in run.directory.iterdir()} - {".lock"}
    assert names == FILES | ({"evaluation.json"} if run.report.evaluation else set())


def test_report_can_be_read(run: Result) -> None:
    read = read_report(run.directory / "report.json")
    assert read == run.report
    assert len((run.directory / "report.html").read_text(encoding="utf-8")) > 5000
    assert [(m.runtime, m.batch_size) for m in read.profile] == [("ort-cpu", 1)]
    assert read.realised[0].ratio.value > 0
    (layers,) = read.layers
    assert (layers.runtime, layers.batch_size) == ("ort-cpu", 1)
    for rows in (layers.parts, layers.blocks, layers.kinds):
        total = sum(row.pruned_ms for row in rows) + layers.between.pruned_ms
        assert total == pytest.approx(read.profile[0].summary.pruned.p50_ms)
    assert all(read.stage_seconds.get(stage, 0) > 0 for stage in ("score", "export ONNX", "measure"))


def test_a_run_from_python_says_so_and_can_be_done_again(own: Result, vision: Result) -> None:
    """No command can name a module that came from Python."""
    command = own.report.command
    assert command.startswith("# ") and "Python" in command.splitlines()[0]
    given: list[Any] = []
    values = {"network": "a network", "calibration": "data"}
    lines = [line for line in command.splitlines() if "import prune_export" not in line]
    exec("\n".join(lines), {**values, "prune_export": lambda recipe, **rest: given.extend([recipe, rest])})
    assert given == [make_recipe({}, own.directory / "recipe.yaml"), values]
    assert "optin-deploy prune-export --recipe" not in (own.directory / "report.html").read_text(encoding="utf-8")
    assert vision.report.command == f"optin-deploy prune-export --recipe {vision.directory / 'recipe.yaml'}"


def test_weights_of_a_directory_are_not_called_pretrained(own: Result, tmp_path: Path) -> None:
    network = replace(own.network, weights="pretrained")
    recipe = Recipe(model=str(tmp_path), flops=0.5)
    assert _weights_origin(recipe, network) == "the directory's own"
    assert _weights_origin(recipe, own.network) == "user"
    assert _weights_origin(Recipe(model="deit_tiny_patch16_224", flops=0.5), network) == "pretrained"


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


def test_lower_precision_is_checked_measured_and_evaluated_as_exported(text: Result, tmp_path: Path) -> None:
    recipe = Recipe.model_validate({**text.report.settings, "precision": "fp16"})
    low = prune_export(recipe, output=tmp_path / "run", quiet=True)
    assert low.report.precision == "fp16"
    assert low.report.dense.onnx_mib < 0.9 * text.report.dense.onnx_mib
    assert all(row.passed and row.tolerance == 1e-2 for row in low.report.parity)
    assert max(row.max_abs_error for row in low.report.parity) > max(row.max_abs_error for row in text.report.parity)
    assert [m.runtime for m in low.report.profile] == ["ort-cpu"]
    assert low.report.evaluation is not None and text.report.evaluation is not None
    # The modules are the same; the file is what is deployed.
    assert low.report.evaluation.pruned == text.report.evaluation.pruned
    assert low.report.evaluation.deployed is not None and text.report.evaluation.deployed is None
    assert abs(low.report.evaluation.deployed - low.report.evaluation.pruned) <= 10
    # Operators are found in their blocks whatever wraps the network.
    assert {part.name for part in low.report.layers[0].parts} == {part.name for part in text.report.layers[0].parts}


# Doing it again


def artefacts(directory: Path) -> dict[str, bytes]:
    names = ("scores.safetensors", "plan.json", "checkpoint/model.safetensors", "checkpoint/optin.json")
    return {name: (directory / name).read_bytes() for name in names}


def times(directory: Path) -> dict[str, int]:
    return {p.name: p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file() and p.name != ".lock"}


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
    assert {p.name for p in directory.iterdir()} - {".lock"} == FILES
    assert result.report.flops_ratio == vision.report.flops_ratio
    for ours, theirs in zip(result.report.parity, vision.report.parity, strict=True):
        assert ours.max_abs_reference == theirs.max_abs_reference


def test_a_run_stopped_behind_its_scores_goes_on_in_the_same_bases(
    shallow: str, vision: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = tmp_path / "run"

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(prune_stage, "_prune", interrupt)
        prune_export(vision_recipe(shallow), output=directory, quiet=True)
    assert not (directory / "checkpoint").exists()
    monkeypatch.setattr(prune_stage, "score", interrupt)
    with pytest.raises(KeyboardInterrupt):
        no_export(monkeypatch)
        prune_export(vision_recipe(shallow), output=directory, quiet=True)
    assert artefacts(directory) == artefacts(vision.directory)


@pytest.mark.parametrize("rounds", [1, 2])
def test_a_run_with_a_checkpoint_reads_its_plan(
    shallow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rounds: int
) -> None:
    directory, recipe = tmp_path / "run", vision_recipe(shallow, rounds=rounds, align=8)
    run_until_export(recipe, directory)
    found: list[tuple[dict[str, list[int]], Network]] = []

    def export(_: object, small: Network, *__: object) -> None:
        found.append((json.loads((directory / "plan.json").read_text())["kept"], small))
        raise KeyboardInterrupt

    for name in ("score", "rotate_heads_to_pca", "remove_in_rounds"):
        monkeypatch.setattr(prune_stage, name, None)
    monkeypatch.setattr(pipeline, "export_and_measure", export)
    before = artefacts(directory)
    with pytest.raises(KeyboardInterrupt):
        prune_export(recipe, output=directory, quiet=True)
    ((plan, small),) = found
    assert plan == {n: list(k) for n, k in checkpoint.read_plan(directory / "checkpoint").kept.items()}
    assert_stored(directory, small.module)
    assert artefacts(directory) == before


def test_finished_run_is_not_done_again(own: Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A copy, since tests of the run itself may come later.
    directory = Path(shutil.copytree(own.directory, tmp_path / "run"))
    for late in ("profile.json", "report.json", "report.html", "report.md"):
        (directory / late).unlink()
    before = times(directory)
    made: list[str] = []
    homes = {
        "score": prune_stage,
        "agreement": compare_stage,
        "onnx_in_precision": onnx_file,
        "run_onnx": onnx_file,
    }
    for name, home in homes.items():
        monkeypatch.setattr(home, name, lambda *_, name=name, **__: made.append(name))
    again = prune_export(
        Recipe(**QUICK, model="mine", flops=0.5),
        output=directory,
        network=own_network(),
        calibration=from_batches(own_batches()),
        quiet=True,
    )
    assert not made
    rewritten = {"run.json", "recipe.yaml", "README.md"}
    after = times(directory)
    assert after["README.md"] > before["README.md"]
    assert {n: t for n, t in before.items() if n not in rewritten} == {
        n: t for n, t in after.items() if n in before.keys() - rewritten
    }
    assert {"profile.json", "report.json", "report.html", "report.md"} <= after.keys()
    assert again.report.agreement == own.report.agreement


@pytest.mark.parametrize("change", [{"flops": 0.55}, {"seed": 1}, {"calibration_samples": 9}])
def test_another_run_is_refused(shallow: str, vision: Result, change: dict[str, Any]) -> None:
    before = times(vision.directory)
    with pytest.raises(UserError, match="holds another run"):
        prune_export(vision_recipe(shallow, **change), output=vision.directory, quiet=True)
    assert times(vision.directory) == before


def stored(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "checkpoint" / "model.safetensors")


def assert_stored(directory: Path, module: torch.nn.Module) -> None:
    found = stored(directory)
    assert found.keys() == module.state_dict().keys()
    assert all(torch.equal(t, found[n]) for n, t in module.state_dict().items())


@pytest.mark.parametrize("narrow", [True, False])
def test_without_compensation(shallow: str, vision: Result, tmp_path: Path, narrow: bool) -> None:
    recipe = vision_recipe(shallow, compensate=False, narrow_heads=narrow)
    run_until_export(recipe, tmp_path / "run")
    dense = load_network(shallow)
    structure = analyze(dense, narrow=narrow).structure
    turned = rotate_heads_to_pca(dense, structure, load_calibration(dense, None, samples=8).batches)
    assert (turned is dense) == (not narrow)
    plan = checkpoint.read_plan(tmp_path / "run" / "checkpoint")
    assert_stored(tmp_path / "run", slice_network(turned.module, structure, plan))
    found, compensated = stored(tmp_path / "run"), stored(vision.directory)
    assert any(t.shape != compensated[n].shape or not torch.equal(t, compensated[n]) for n, t in found.items())


@pytest.mark.usefixtures("without_layers")
def test_heads_get_narrower_in_the_exported_network(tmp_path: Path) -> None:
    save_bert(tmp_path / "bert", num_attention_heads=1)
    lines = save_lines(tmp_path / "texts.txt", texts(60))
    options = {"calibration": lines, "calibration_samples": 16, "sequence_length": 16, "align": 1}
    result = prune_export(
        Recipe(**QUICK, model=str(tmp_path / "bert"), flops=0.5, **options), output=tmp_path / "run", quiet=True
    )
    widths = [e for e in result.report.plan if e.kind == "width"]
    heads = {e.group: e.kept for e in result.report.plan if e.kind == "head"}
    assert any(0 < e.kept < e.units and heads[e.group.removesuffix(".width")] for e in widths)
    assert [(g.name, g.passed) for g in result.report.gates] == [("budget", True), ("parity", True)]
    test_onnx_runs_at_other_sizes(result)
    test_checkpoint_is_the_pruned_network(result)


@pytest.mark.parametrize(("name", "opset"), [("vit", 20), ("vit", 23), ("bert", 20), ("distilbert", 23)])
def test_exports_of_narrow_heads_agree_with_torch(tmp_path: Path, name: str, opset: int) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    first, second = (g.name for g in structure.groups if g.kind == "head")
    plan = Plan({first: (0, 2, 3), f"{first}.width": (0, 1, 3), second: (1,), f"{second}.width": (2,)})
    small = network.with_module(slice_network(network.module, structure, plan))
    module, names = TensorOutputs(small.module, small.outputs), tuple(small.outputs)
    axes = {n: {0: "batch"} if name == "vit" else {0: "batch", 1: "sequence"} for n in small.inputs}
    program, path = trace(module, small.inputs, axes), tmp_path / "small.onnx"
    onnx_from_program(program, path, output_names=names, dynamic_axes=axes, opset=opset)
    batches = tiny.batches(small, 2, size=5) if name == "vit" else [tiny.texts(1, 5), tiny.texts(4, 11)]
    assert all(parity.passed for parity in check_parity(module, path, batches, names, tolerance=1e-5))


@pytest.mark.parametrize("options", [{}, {"rounds": 2}, {"criterion": "trajectory", "narrow_heads": True}])
def test_a_run_is_prune_in_one_call(shallow: str, tmp_path: Path, options: dict[str, Any]) -> None:
    run_until_export(vision_recipe(shallow, ridge=0.1, align=8, **options), tmp_path / "run")
    dense = load_network(shallow)
    arguments = {"narrow": options.get("narrow_heads"), "rounds": options.get("rounds", 1)}
    scoring = Scoring(options.get("criterion", "trajectory-obs"))
    batches = load_calibration(dense, None, samples=8).batches
    expected = prune(dense, batches, 0.6, scoring=scoring, ridge=0.1, align=8, **arguments)
    assert checkpoint.read_plan(tmp_path / "run" / "checkpoint") == expected.plan
    assert_stored(tmp_path / "run", expected.network.module)
    scores = load_file(tmp_path / "run" / "scores.safetensors")
    assert all(torch.equal(scores[n], t) for n, t in expected.scores.items())


@pytest.mark.usefixtures("without_layers")
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


# Labels


@pytest.fixture(scope="module")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a classifier ``bert``, an encoder ``encoder`` and a labelled table ``t.csv``."""
    path = tmp_path_factory.mktemp("labelled")
    save_bert(path / "bert")
    save_bert(path / "encoder", head=False)
    save_lines(path / "t.csv", ["text,class", *(f"{t},{i % 3}" for i, t in enumerate(texts(60)))])
    return path


def fisher_recipe(path: Path, model: str = "bert", **options: Any) -> Recipe:
    given = {"calibration": path / "t.csv", "calibration_column": "text", "calibration_samples": 24}
    given |= {"sequence_length": 16, "flops": 0.7, "criterion": "fisher", "align": 8, **options}
    return Recipe(**QUICK, model=str(path / model), **given)


@pytest.mark.parametrize("rounds", [1, 2])
def test_fisher_with_labels(labelled: Path, tmp_path: Path, rounds: int) -> None:
    recipe = fisher_recipe(labelled, calibration_labels="class", rounds=rounds)
    run_until_export(recipe, tmp_path / "run")
    dense = load_network(recipe.model, sequence_length=16)
    given = load_calibration(dense, recipe.calibration, column="text", labels="class", samples=24)
    gradients = mask_gradients(dense, analyze(dense, narrow=False).structure, given.batches, given.labels)
    scores = load_file(tmp_path / "run" / "scores.safetensors")
    assert scores.keys() == gradients.keys()
    for name, expected in fisher_scores(gradients).items():
        torch.testing.assert_close(scores[name], expected)
    small = load_network(str(tmp_path / "run" / "checkpoint"))
    assert 0.69 <= count_flops(small.module, small.inputs) / count_flops(dense.module, small.inputs) <= 0.7


def test_other_labels_are_another_run(labelled: Path, tmp_path: Path) -> None:
    recipe = fisher_recipe(labelled, calibration=tmp_path / "t.csv", calibration_labels="class")
    for shift in (0, 1):
        lines = ["text,class", *(f"{t},{(i + shift) % 3}" for i, t in enumerate(texts(60)))]
        save_lines(tmp_path / "t.csv", lines)
        if not shift:
            run_until_export(recipe, tmp_path / "run")
    with pytest.raises(UserError, match="holds another run"):
        prune_export(recipe, output=tmp_path / "run", quiet=True)


@pytest.mark.parametrize(
    ("model", "options", "expected"),
    [
        ("bert", {}, "--calibration-labels"),
        ("encoder", {}, "no class logits"),
        ("encoder", {"calibration_labels": "class"}, "no class logits"),
        ("bert", {"calibration_labels": "kind"}, "no column 'kind'"),
        ("bert", {"calibration": None, "calibration_column": None}, "--calibration-labels"),
    ],
)
def test_fisher_without_what_it_needs_leaves_nothing(
    labelled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, model: str, options: dict[str, Any], expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=expected) as caught:
        prune_export(fisher_recipe(labelled, model, **options), quiet=True)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


# Nothing is left behind where inputs are wrong


def poisoned() -> Network:
    network = own_network()
    with torch.no_grad():
        network.module.get_parameter("head.weight").fill_(float("nan"))
    return network


@pytest.mark.parametrize(
    ("options", "network", "expected"),
    [
        ({"flops": 0.001}, own_network, r"cannot be reached.* 0\.\d+"),
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


def test_more_threads_than_this_process_has_cores_are_refused(
    shallow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(requirements, "usable_cores", lambda: Cores(physical=1, logical=1))
    with pytest.raises(UserError, match=r"^--threads 2: .* 1 "):
        prune_export(vision_recipe(shallow, threads=2), output=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_pruning_gives_its_gpu_memory_back_before_files_are_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    order: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: order.append("empty cache"))

    def stop(*_: object) -> None:
        order.append("export")
        raise UserError("stop here")

    monkeypatch.setattr(pipeline, "export_and_measure", stop)
    with pytest.raises(UserError, match="stop here"):
        prune_export(
            Recipe(**QUICK, model="own", flops=0.6),
            output=tmp_path / "run",
            network=own_network(),
            calibration=from_batches(own_batches()),
            quiet=True,
        )
    assert order == ["empty cache", "export"]
