"""Runs with --sparsity 2:4, alone and behind a budget, from the command line to the engine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_models import TinyModule, own_batches, own_network, save_bert, save_lines, texts
from torch import nn

from exporters import check_engine
from optin_deploy.cli.main import main
from optin_deploy.compensation.sparsity import has_pattern
from optin_deploy.config.recipe import Recipe
from optin_deploy.data.calibration import from_batches
from optin_deploy.errors import UserError
from optin_deploy.models import checkpoint
from optin_deploy.models.custom import custom_network
from optin_deploy.report import read_report
from optin_deploy.report.web_page import render
from optin_deploy.run import pipeline, prune_stage
from optin_deploy.run.pipeline import Result, prune_export

pytestmark = pytest.mark.slow


QUICK: dict[str, Any] = {"runtimes": ("ort-cpu",), "batch_sizes": (1,), "profile_seconds": 0.2, "threads": 1}


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("bert")
    save_bert(path / "bert")
    save_lines(path / "texts.txt", texts(60))
    save_lines(path / "labelled.csv", [f"{t},{i % 3}" for i, t in enumerate(texts(30))])
    return path


def maps(module: nn.Module, blocks: str) -> dict[str, nn.Linear]:
    return {n: m for n, m in module.named_modules() if isinstance(m, nn.Linear) and n.startswith(blocks)}


def test_sparsity_alone_from_the_command_line(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["prune-export", "--model", bert / "bert", "--sparsity", "2:4", "--calibration", bert / "texts.txt"]
    arguments += ["--calibration-samples", 24, "--sequence-length", 16, "--evaluate", bert / "labelled.csv"]
    arguments += ["--runtimes", "ort-cpu", "--batch-sizes", 1, "--profile-seconds", 0.2, "--threads", 1]
    monkeypatch.setattr("sys.argv", ["optin-deploy", *map(str, arguments), "--output", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as ended:
        main()
    told = " ".join(capsys.readouterr().out.split())
    assert not ended.value.code
    assert "FLOPs unchanged, weights 2:4 sparse" in told and "realised ratio" not in told
    report = read_report(tmp_path / "run" / "report.json")
    module = checkpoint.load(tmp_path / "run" / "checkpoint")
    sparse = maps(module, "bert.encoder.layer.")
    assert report.sparsity is not None
    assert (report.sparsity.maps, report.sparsity.zeros, report.sparsity.left_dense) == (len(sparse), 0.5, ())
    assert f"2:4 in {len(sparse)} linear layers" in told
    for layer in sparse.values():
        assert has_pattern(layer.weight) and int((layer.weight == 0).sum()) == layer.weight.numel() // 2
    assert report.pruned.flops == report.dense.flops and report.pruned.parameters == report.dense.parameters
    assert report.realised == [] and all(layers.causes == () for layers in report.layers)
    assert [(g.name, g.passed) for g in report.gates] == [("parity", True)]
    assert all(entry.kept == entry.units for entry in report.plan)
    assert report.agreement[0].cosine > 0.5 and report.evaluation is not None
    assert not (tmp_path / "run" / "scores.safetensors").exists()
    assert "score" not in report.stage_seconds
    assert "2:4 in" in render(report)


@pytest.mark.usefixtures("without_layers")
@pytest.mark.parametrize("options", [{"flops": 0.7}, {"flops": 0.7, "compensate": False}, {"ridge": 0.1}])
def test_a_run_goes_on_with_the_sparse_weights_of_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    def run() -> Result:
        given = Recipe(model="mine", sparsity="2:4", **QUICK, **options)
        batches = from_batches(own_batches())
        return prune_export(given, output=tmp_path / "run", network=own_network(), calibration=batches, quiet=True)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(pipeline, "export_and_measure", interrupt)
        run()
    stored = checkpoint.load(tmp_path / "run" / "checkpoint", TinyModule()).state_dict()
    monkeypatch.setattr(prune_stage.Remover, "make_sparse", interrupt)
    result = run()
    assert all(torch.equal(t, stored[n]) for n, t in result.network.module.state_dict().items())
    report, inside = result.report, maps(result.network.module, "blocks.")
    # What is left of a layer need not be a multiple of four.
    sparse = [n for n, layer in inside.items() if layer.in_features % 4 == 0]
    assert sparse == [n for n, layer in inside.items() if has_pattern(layer.weight)]
    assert report.sparsity is not None and report.sparsity.maps == len(sparse) > 0
    assert report.sparsity.left_dense == tuple(n for n in inside if n not in sparse)
    plan = json.loads((tmp_path / "run" / "plan.json").read_text())["kept"]
    assert {e.group: e.kept for e in report.plan} == {n: len(k) for n, k in plan.items()}
    gates = {g.name: g.passed for g in report.gates}
    assert gates == ({"budget": True, "parity": True} if "flops" in options else {"parity": True})
    assert bool(report.realised) == ("flops" in options)


def test_engines_are_built_for_sparse_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    given = Recipe(model="mine", sparsity="2:4", **{**QUICK, "runtimes": ("ort-cpu", "rtx")})
    run = prune_export(
        given, output=tmp_path / "run", network=own_network(), calibration=from_batches(own_batches()), quiet=True
    )
    for engine in run.report.engines:
        assert check_engine(run.directory / engine.file).config.sparse_weights


class Odd(nn.Module):
    """A user's own FFN of widths that are no multiples of four."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 2, 3)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.down(self.act(self.up(image)))


def test_a_network_without_groups_of_four_is_refused(tmp_path: Path) -> None:
    network = custom_network(Odd(), {"image": torch.randn(2, 3, 9, 9)})
    calibration = from_batches([{"image": torch.randn(4, 3, 9, 9)} for _ in range(2)])
    with pytest.raises(UserError, match=r"^--sparsity 2:4: no linear layer"):
        prune_export(
            Recipe(model="mine", sparsity="2:4", **QUICK),
            output=tmp_path / "run",
            network=network,
            calibration=calibration,
            quiet=True,
        )
    assert not list(tmp_path.iterdir())
