"""Runs with --tokens, from the recipe to the checkpoint, the ONNX file and the report."""

import json
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from tiny_models import POSITIONS, classifier, save_bert, save_lines, texts
from torch import Tensor

from exporters import EngineConfig, build_engine, check_engine, input_ranges
from optin_deploy.analysis.module_roles import MERGING
from optin_deploy.config.recipe import Recipe, make_recipe
from optin_deploy.config.validation import check_options
from optin_deploy.data.calibration import from_batches
from optin_deploy.errors import UserError
from optin_deploy.models import checkpoint
from optin_deploy.report import read_report
from optin_deploy.report.web_page import render
from optin_deploy.run import pipeline, prune_stage
from optin_deploy.run.network_profile import run_profile
from optin_deploy.run.pipeline import Result, prune_export
from optin_deploy.tokens.merging import MergingBlocks

pytestmark = pytest.mark.slow


QUICK: dict[str, Any] = {"runtimes": ("ort-cpu",), "batch_sizes": (1,), "profile_seconds": 0.2, "threads": 1}
SCHEDULE = (17, 14, 11)


def batches() -> list[dict[str, Tensor]]:
    made = torch.Generator().manual_seed(0)
    network = classifier(10, depth=3, patch_size=8)
    name, sample = next(iter(network.inputs.items()))
    return [{name: torch.randn(4, *sample.shape[1:], generator=made)} for _ in range(6)]


def run(output: Path, **options: Any) -> Result:
    recipe = Recipe(model="mine", flops=0.5, **QUICK, **options)
    network = classifier(10, depth=3, patch_size=8)
    return prune_export(recipe, output=output, network=network, calibration=from_batches(batches()), quiet=True)


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return run(tmp_path_factory.mktemp("run") / "run", tokens=SCHEDULE)


def test_the_checkpoint_merges_and_the_onnx_file_too(result: Result) -> None:
    module = checkpoint.load(result.directory / "checkpoint")
    merging = [part for part in module.modules() if isinstance(part, MergingBlocks)]
    assert [part.schedule for part in merging] == [SCHEDULE]
    batch = batches()[-1]
    name, image = next(iter(batch.items()))
    expected = result.network.forward(batch)["logits"].detach()
    torch.testing.assert_close(result.network.forward(batch, module)["logits"].detach(), expected)
    session = onnxruntime.InferenceSession(result.directory / "pruned.onnx")
    for size in (1, 3):
        (found,) = session.run(None, {name: image[:size].numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected[:size], atol=1e-4, rtol=1e-4)


def test_an_engine_is_built_of_what_merges(result: Result, tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    name, sample = next(iter(result.network.inputs.items()))
    ranges = input_ranges({name: tuple(sample.shape)}, {name: {0: "batch"}}, (1, 4), 4, static=False)
    onnx, engine = result.directory / "pruned.onnx", tmp_path / "pruned.engine"
    built = build_engine(onnx, engine, ranges, EngineConfig("rtx", optimization_level=0))
    assert check_engine(engine, onnx) == built and engine.stat().st_size > 1000


def test_the_report_tells_of_tokens(result: Result) -> None:
    report = read_report(result.directory / "report.json")
    tokens = [(entry.group, entry.units, entry.kept) for entry in report.plan if entry.kind == "token"]
    assert tokens == [(f"blocks.{i}", 17, kept) for i, kept in enumerate(SCHEDULE)]
    assert all(gate.passed for gate in report.gates) and {gate.name for gate in report.gates} == {"budget", "parity"}
    assert "Tokens that enter each block" in render(report)
    parts = {row.name: row for row in report.layers[0].parts}
    assert parts[MERGING].pruned_ms > 0 and parts[MERGING].dense_ms == 0
    assert parts[MERGING].pruned_flops > 0 and parts[MERGING].dense_flops == 0
    assert min(row.dense_flops for row in parts.values()) >= 0 and min(row.pruned_flops for row in parts.values()) >= 0


def test_a_profile_of_what_merges_tells_what_merging_takes(result: Result) -> None:
    recipe = Recipe(
        model=str(result.directory / "checkpoint"), batch_size=2, threads=1, profile_seconds=0.5, table_seconds=0.3
    )
    times = {part.name: part.ms for part in run_profile(recipe, quiet=True).parts}
    assert times[MERGING] > 0


@pytest.mark.usefixtures("without_layers")
def test_a_run_goes_on_with_its_schedule(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "export_and_measure", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "run", tokens="auto", tokens_share=0.5)
    written = json.loads((tmp_path / "run" / "plan.json").read_text())["tokens"]
    monkeypatch.setattr(prune_stage, "token_schedule", interrupt)
    again = run(tmp_path / "run", tokens="auto", tokens_share=0.5)
    merging = next(part for part in again.network.module.modules() if isinstance(part, MergingBlocks))
    assert list(merging.schedule) == written and written[-1] < 17
    expected = checkpoint.load(tmp_path / "run" / "checkpoint")
    batch = batches()[0]
    got, wanted = (again.network.forward(batch, m)["logits"].detach() for m in (again.network.module, expected))
    torch.testing.assert_close(got, wanted)


@pytest.mark.usefixtures("without_layers")
def test_texts_merge_at_any_length(tmp_path: Path) -> None:
    save_bert(tmp_path / "bert", num_hidden_layers=2)
    save_lines(tmp_path / "sentences.txt", texts(60))
    recipe = Recipe(
        model=str(tmp_path / "bert"), flops=0.7, sequence_length=POSITIONS, calibration=tmp_path / "sentences.txt",
        calibration_samples=48, tokens="auto", tokens_share=0.5, **QUICK,
    )  # fmt: skip
    made = prune_export(recipe, output=tmp_path / "run", quiet=True)
    assert all(gate.passed for gate in made.report.gates), made.report.gates
    merging = next(part for part in made.network.module.modules() if isinstance(part, MergingBlocks))
    assert merging.stack.text and merging.schedule[-1] < merging.stack.tokens == POSITIONS
    again = checkpoint.load(tmp_path / "run" / "checkpoint")
    session = onnxruntime.InferenceSession(tmp_path / "run" / "pruned.onnx")
    for length in (POSITIONS, 5, 2):
        batch = {name: tensor[:, :length] for name, tensor in made.network.inputs.items()}
        expected = made.network.forward(batch)
        got = session.run(None, {name: tensor.numpy() for name, tensor in batch.items()})
        for value, name in zip(got, expected, strict=True):
            torch.testing.assert_close(torch.from_numpy(value), expected[name].detach(), atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(made.network.forward(batch, again)[name], expected[name])


def test_what_merges_is_not_pruned_again(result: Result, tmp_path: Path) -> None:
    recipe = Recipe(model=str(result.directory / "checkpoint"), flops=0.5, **QUICK)
    with pytest.raises(UserError, match="tokens merge already"):
        prune_export(recipe, output=tmp_path / "run", calibration=from_batches(batches()), quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"tokens": "some"}, "--tokens some: .*give auto, off, or how many enter each block"),
        ({"tokens": "197,a"}, "--tokens 197,a: "),
        ({"tokens": "0"}, "--tokens"),
        ({"tokens_share": 0.5}, "--tokens-share 0.5: it has an effect only with --tokens auto"),
        ({"tokens": "auto", "tokens_share": 1.5}, "--tokens-share 1.5"),
        ({"tokens": "auto", "rounds": 2}, "--tokens auto: tokens merge in one round, not in --rounds 2"),
        ({"tokens": "9,8", "sparsity": "2:4"}, "--tokens 9,8: --sparsity 2:4 follows the dense network token by token"),
        ({"tokens": "auto", "task_weight": 0}, "--tokens auto: with --task-weight 0 no output counts"),
        ({"tokens": "auto", "criterion": "magnitude"}, "--tokens auto: it needs --criterion trajectory-obs"),
    ],
)
def test_what_does_not_go_together_is_told(options: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=told):
        check_options(make_recipe({"model": "mine", "flops": 0.5, **options}))


def test_numbers_of_tokens_go_with_any_criterion() -> None:
    recipe = make_recipe({"model": "mine", "flops": 0.5, "tokens": "197, 180", "criterion": "magnitude"})
    check_options(recipe)
    assert recipe.tokens == (197, 180)
