import json
import re
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
from google.protobuf import text_format

from exporters import PARITY_TOLERANCES, EngineConfig, ExportError, OutputParity, check_engine
from exporters.trt_engine import EngineInfo
from optin_deploy import load_network
from optin_deploy.cli.main import main
from optin_deploy.config.recipe import Recipe
from optin_deploy.errors import GateError, UserError
from optin_deploy.export import command
from optin_deploy.export.command import default_name, export_network

pytestmark = pytest.mark.slow


def recipe(model: str, **options: Any) -> Recipe:
    return Recipe(**{"model": model, "batch_sizes": (1, 4), "threads": 1, **options})


def test_a_plain_export_is_what_torch_computes(shallow: str, tmp_path: Path) -> None:
    made = export_network(recipe(shallow), tmp_path / "out", quiet=True)
    file = tmp_path / "out" / "model.onnx"
    assert made.files == {str(file): file.stat().st_size}
    assert all(p.passed for p in made.parity)
    network = load_network(shallow)
    batch = {name: torch.cat([t, t + 1]) for name, t in network.inputs.items()}
    given = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(
        None, {n: t.numpy() for n, t in batch.items()}
    )
    with torch.inference_mode():
        for ours, theirs in zip(network.forward(batch).values(), given, strict=True):
            torch.testing.assert_close(torch.from_numpy(theirs), ours, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_lower_precision_makes_a_smaller_file_that_passes_its_own_gate(
    shallow: str, tmp_path: Path, precision: str
) -> None:
    made = export_network(recipe(shallow, precision=precision), tmp_path / "low", quiet=True)
    full = export_network(recipe(shallow), tmp_path / "full", quiet=True)
    assert all(p.passed and p.tolerance == PARITY_TOLERANCES[precision] for p in made.parity)
    assert max(p.max_abs_error for p in made.parity) > 10 * max(p.max_abs_error for p in full.parity)
    assert sum(made.files.values()) < sum(full.files.values())


@pytest.mark.parametrize("static", [False, True])
def test_engines_stand_beside(shallow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, static: bool) -> None:
    pytest.importorskip("tensorrt_rtx")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = export_network(recipe(shallow, runtimes=("rtx",), static=static), tmp_path / "out", quiet=True)
    assert (made.unchecked is None) == bool(made.engines) == torch.cuda.is_available()
    names = ["model.rtx.b1.engine", "model.rtx.b4.engine"] if static else ["model.rtx.engine"]
    for name in names:
        check_engine(tmp_path / "out" / name, tmp_path / "out" / "model.onnx")
    kinds = ("json", "layers.json") if torch.cuda.is_available() else ("json",)
    beside = {f"{name}.{kind}" for name in names for kind in kinds}
    assert {p.name for p in (tmp_path / "out").iterdir()} == {"model.onnx", *names, *beside}


@pytest.mark.parametrize("error", [1e-6, 0.5])
def test_an_engine_that_can_be_run_has_to_pass(
    shallow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: float
) -> None:
    def check(network: Any, runtime: str, engine: Path, *_: Any) -> Any:
        assert runtime == "tensorrt" and engine.is_file()
        return (OutputParity("logits", error, error, 1.0, 1e-4, error < 1e-4, (1, 3)),)

    def build(onnx: Path, engine: Path, inputs: Any, config: EngineConfig, _: Path | None) -> EngineInfo:
        engine.write_text("engine")
        return EngineInfo("tensorrt", "10.15.1", "", "", None, "", config, inputs)

    monkeypatch.setattr(command, "build_engine", build)
    monkeypatch.setattr(command, "timing_cache", lambda _: None)
    monkeypatch.setattr(command, "check_runtimes", lambda _: None)
    monkeypatch.setattr(command, "check_engine_parity", check)
    monkeypatch.setattr("optin_deploy.export.engine_parity.is_measurable", lambda _: True)
    asked = recipe(shallow, runtimes=("tensorrt",))
    if error < 1e-4:
        made = export_network(asked, tmp_path / "out", quiet=True)
        assert made.unchecked is None and made.to_dict()["engines"]["model.tensorrt.engine"][0]["passed"]
    else:
        with pytest.raises(GateError, match=r"^parity: logits .*5\.0e-01.*TensorRT.*nothing"):
            export_network(asked, tmp_path / "out", quiet=True)
        assert not list(tmp_path.iterdir())


def config(folder: Path) -> Any:
    model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config_pb2.ModelConfig())


def test_a_repository_has_a_model_for_each_back_end(
    shallow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # TensorRT itself cannot be had everywhere; what it is asked for can.
    def build(onnx: Path, engine: Path, inputs: Any, config: EngineConfig, _: Path | None) -> EngineInfo:
        assert onnx.is_file() and [(r.least[0], r.most[0]) for r in inputs.values()] == [(1, 4)]
        engine.parent.mkdir(parents=True)
        engine.write_text("engine")
        return EngineInfo("tensorrt", "10.15.1", "", "", None, "", config, inputs)

    monkeypatch.setattr(command, "build_engine", build)
    monkeypatch.setattr(command, "timing_cache", lambda _: None)
    monkeypatch.setattr(command, "check_runtimes", lambda _: None)
    monkeypatch.setattr(command, "is_checkable", lambda *_: False)
    (tmp_path / "repository" / "other").mkdir(parents=True)
    asked = recipe(shallow, runtimes=("tensorrt",), batch_sizes=(2, 4))
    export_network(asked, tmp_path / "repository", "triton", "mine", quiet=True)
    assert {p.name for p in (tmp_path / "repository").iterdir()} == {"other", "mine_onnx", "mine_tensorrt"}
    onnx, plan = (config(tmp_path / "repository" / name) for name in ("mine_onnx", "mine_tensorrt"))
    assert (onnx.name, onnx.backend) == ("mine_onnx", "onnxruntime")
    assert (plan.name, plan.backend) == ("mine_tensorrt", "tensorrt")
    assert onnx.max_batch_size == plan.max_batch_size == 4
    assert [t.name for t in onnx.input] == list(load_network(shallow).inputs) == [t.name for t in plan.input]
    assert (tmp_path / "repository" / "mine_onnx" / "1" / "model.onnx").is_file()
    assert (tmp_path / "repository" / "mine_tensorrt" / "1" / "model.plan").is_file()
    with pytest.raises(UserError, match=r"mine_onnx exists already.*--output.*--name"):
        export_network(asked, tmp_path / "repository", "triton", "mine", quiet=True)


def test_a_folder_that_is_there_is_not_touched(shallow: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{tmp_path} exists already.*--output$"):
        export_network(recipe(shallow), tmp_path, quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("layout", ["plain", "triton"])
def test_what_is_not_what_torch_computes_is_not_left_behind(shallow: str, tmp_path: Path, layout: Any) -> None:
    with pytest.raises(GateError, match=r"^parity: .*nothing"):
        export_network(recipe(shallow, parity_tolerance=1e-15), tmp_path / "out", layout, quiet=True)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_an_engine_that_cannot_be_built_leaves_nothing(
    shallow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any) -> None:
        raise ExportError("no")

    monkeypatch.setattr(command, "build_engine", fail)
    monkeypatch.setattr(command, "timing_cache", lambda _: None)
    monkeypatch.setattr(command, "check_runtimes", lambda _: None)
    monkeypatch.setattr(command, "is_checkable", lambda *_: False)
    with pytest.raises(ExportError):
        export_network(recipe(shallow, runtimes=("rtx",)), tmp_path / "out", quiet=True)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("deit_small", "deit_small"),
        ("sentence-transformers/all-MiniLM-L6-v2", "all-MiniLM-L6-v2"),
        ("runs/deit 0.5/checkpoint", "deit_0_5"),
        ("vit.augreg", "vit_augreg"),
    ],
)
def test_names_are_made_of_models(model: str, expected: str) -> None:
    assert default_name(model) == expected


def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    monkeypatch.setattr("sys.argv", ["optin-deploy", "export", *arguments, "--quiet"])
    with pytest.raises(SystemExit) as ended:
        main()
    out, err = capsys.readouterr()
    return int(ended.value.code or 0), out, err


def test_the_command_line_tells_files_and_parity(
    shallow: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = told(monkeypatch, capsys, "--model", shallow, "--output", "out")
    assert code == 0
    assert re.search(r"out/model\.onnx", out) and "largest error of ONNX Runtime against PyTorch" in out
    code, out, _ = told(monkeypatch, capsys, "--model", shallow, "--layout", "triton", "--name", "mine", "--json")
    assert code == 0
    files = json.loads(out)["files"]
    assert [Path(file).name for file in files] == ["model.onnx", "config.pbtxt"]
    assert all(Path(file).is_relative_to(f"exports/{default_name(shallow)}/mine_onnx") for file in files)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is needed"),
        (["--model", "deit_tiny", "--layout", "zip"], "--layout zip: choose from plain, triton"),
        (["--model", "deit_tiny", "--name", "x"], "--name x: it has an effect only with --layout triton"),
        (["--model", "deit_tiny", "--layout", "triton", "--name", "../x"], "--name ../x: "),
        (["--model", "deit_tiny", "--layout", "triton", "--runtimes", "rtx"], "Triton runs engines of TensorRT, not"),
        (["--model", "deit_tiny", "--layout", "triton", "--static"], "--static: Triton batches requests"),
        (["--model", "deit_tiny", "--refittable"], "--refittable: it has an effect only with --runtimes rtx"),
        (["--model", "deit_tiny", "--opset", "3"], "--opset 3"),
        (["--model", "no_such_network"], "no_such_network"),
    ],
)
def test_bad_options_end_with_2_and_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, err = told(monkeypatch, capsys, *arguments)
    assert (code, out) == (2, "")
    assert message in err and len(err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())
