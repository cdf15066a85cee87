import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_runtimes import needs_device
from tiny_models import own_batches, own_network

from exporters import (
    EngineConfig,
    EngineInfo,
    ExportError,
    build_engine,
    check_engine,
    input_ranges,
    onnx_from_program,
    trace,
)
from optin_deploy.cli.main import main
from optin_deploy.config.recipe import Recipe
from optin_deploy.data.calibration import from_batches
from optin_deploy.export import engines
from optin_deploy.export.engines import EngineRequest, build_engines, engine_config, repeat_builds, requested_engines
from optin_deploy.network import TensorOutputs
from optin_deploy.pruning.space import analyze
from optin_deploy.report import read_report
from optin_deploy.report.web_page import render
from optin_deploy.run import measure_stages, report_builder
from optin_deploy.run.pipeline import Result, prune_export
from profilers import Comparison, Measurement, ProfilingError, RawSamples, Variant

pytestmark = pytest.mark.slow

VARIANTS = ("dense", "dense_again", "pruned")
NO_GPU = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")


def recipe(**options: Any) -> Recipe:
    quick = {"runtimes": ("ort-cpu", "rtx"), "batch_sizes": (1, 2), "profile_seconds": 0.2, "threads": 1}
    return Recipe(**{"model": "mine", "flops": 0.6, **quick, **options})


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [EngineRequest("rtx", (1, 2), 2, False)]),
        ({"static": True}, [EngineRequest("rtx", (1,), 1, True), EngineRequest("rtx", (2,), 2, True)]),
        ({"runtimes": ("torch",), "runtime": "tensorrt"}, [EngineRequest("tensorrt", (1, 2), 2, False)]),
        ({"runtimes": ("ort-cpu",)}, []),
        ({"latency": 0.5, "runtime": "rtx", "batch_size": 4}, [EngineRequest("rtx", (1, 2, 4), 4, False)]),
    ],
)
def test_engines_follow_the_recipe(options: dict[str, Any], expected: list[EngineRequest]) -> None:
    assert requested_engines(recipe(**options)) == expected


def test_names_tell_variant_product_and_size(tmp_path: Path) -> None:
    assert EngineRequest("rtx", (1, 2), 2, False).file(tmp_path, "dense").name == "dense.rtx.engine"
    assert EngineRequest("tensorrt", (2,), 2, True).file(tmp_path, "pruned").name == "pruned.tensorrt.b2.engine"


def test_every_option_reaches_the_builder() -> None:
    options = {
        "builder_optimization_level": 2,
        "workspace_mib": 64,
        "refittable": True,
        "weight_stripped": True,
        "version_compatible": True,
        "precision": "tf32",
        "sparsity": "2:4",
    }
    assert engine_config(recipe(**options), "rtx") == EngineConfig("rtx", 2, 64, True, True, True, True, True)
    assert engine_config(recipe(), "rtx") == EngineConfig("rtx")


def test_only_what_is_missing_is_built(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built: dict[Path, EngineInfo] = {}

    def build(onnx: Path, engine: Path, inputs: Any, config: EngineConfig, _: Path | None) -> None:
        engine.touch()
        built[engine] = EngineInfo("rtx", "1", "", "", None, "", config, dict(inputs))

    def check(engine: Path, onnx: Path) -> EngineInfo:
        assert onnx.name == f"{engine.name.split('.')[0]}.onnx"
        if engine not in built:
            raise ExportError("missing")
        return built[engine]

    monkeypatch.setattr(engines, "build_engine", build)
    monkeypatch.setattr(engines, "check_engine", check)
    monkeypatch.setattr(engines, "timing_cache", lambda _: None)
    networks = {"dense": own_network(), "pruned": own_network()}

    def run(**options: Any) -> list[str]:
        before = dict(built)
        build_engines(recipe(**options), networks, tmp_path)
        return sorted(file.name for file in built if built[file] != before.get(file))

    assert run() == ["dense.rtx.engine", "pruned.rtx.engine"]
    assert run() == []
    assert run(workspace_mib=8) == ["dense.rtx.engine", "pruned.rtx.engine"]
    assert run(batch_sizes=(1, 3), workspace_mib=8) == ["dense.rtx.engine", "pruned.rtx.engine"]
    del built[tmp_path / "pruned.rtx.engine"]
    assert run(batch_sizes=(1, 3), workspace_mib=8) == ["pruned.rtx.engine"]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Result:
    pytest.importorskip("tensorrt_rtx")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        calibration = from_batches(own_batches())
        output = tmp_path_factory.mktemp("run") / "run"
        return prune_export(recipe(), output=output, network=own_network(), calibration=calibration, quiet=True)


@NO_GPU
def test_without_a_gpu_engines_are_built_and_all_else_is_kept(built: Result) -> None:
    report = read_report(built.directory / "report.json")
    assert [(e.variant, e.file) for e in report.engines] == [
        ("dense", "dense.rtx.engine"),
        ("pruned", "pruned.rtx.engine"),
    ]
    for engine in report.engines:
        info = check_engine(built.directory / engine.file, built.directory / f"{engine.variant}.onnx")
        assert engine.builder == f"TensorRT for RTX {info.builder_version}"
    assert {m.runtime for m in report.profile} == {"ort-cpu"} and len(report.layers) == 1
    assert [(u.runtime, u.reason) for u in report.unmeasured] == [("rtx", "no GPU is present")]
    assert report.warnings == ["Engines were not checked against PyTorch: no GPU is present."]
    assert {row.runtime for row in report.parity} == {"ort-cpu"}
    page = render(report)
    assert "Not measured with TensorRT for RTX: no GPU is present." in page and "dense.rtx.engine" in page


@NO_GPU
def test_a_run_with_no_runtime_to_measure_is_complete_otherwise(built: Result, tmp_path: Path) -> None:
    calibration = from_batches(own_batches())
    only = prune_export(
        recipe(runtimes=("rtx",)), output=tmp_path / "run", network=own_network(), calibration=calibration, quiet=True
    )
    assert only.report.profile == [] and len(only.report.engines) == 2
    assert json.loads((tmp_path / "run" / "report.json").read_text())["realised"] == []


@NO_GPU
def test_the_command_line_ends_with_2_and_says_what_is_there(
    built: Result, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("optin_deploy.run.pipeline.prune_export_together", lambda *_, **__: built)
    monkeypatch.setattr("sys.argv", ["optin-deploy", "prune-export", "--model", "mine", "--flops", "0.6"])
    with pytest.raises(SystemExit) as ended:
        main()
    told = capsys.readouterr()
    assert ended.value.code == 2
    assert "engines" in told.out and "dense.rtx.engine" in told.out
    assert told.err.strip() == (
        f"error: --runtimes rtx: no GPU is present; its engines are in {built.directory}, and all else is done"
    )


def test_measurements_are_made_again_where_a_device_has_come(built: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def measure(_: Any, __: Any, ___: Any, runtimes: tuple[str, ...]) -> Comparison:
        asked.append(runtimes)
        return Comparison(tuple(replace(built.report.profile[0], runtime=r) for r in runtimes), {}, {})

    monkeypatch.setattr(measure_stages, "_measure", measure)
    folder = built.directory.with_name("later")
    folder.mkdir()
    (folder / "run.json").write_text('{"fingerprint": "0"}')
    (folder / "layers.json").write_text("[]")
    context: Any = SimpleNamespace(recipe=recipe(), directory=folder)
    for there in (False, False, True, True):
        monkeypatch.setattr(measure_stages, "is_measurable", lambda runtime, there=there: there or runtime != "rtx")
        measure_stages._profile(context, {}, {})
    assert asked == [("ort-cpu",), ("ort-cpu", "rtx")]
    assert not (folder / "layers.json").exists()


def test_an_engine_that_tells_nothing_of_its_layers_is_told_of(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fail(runtime: str, file: Path, *_: Any, onnx: Path, **__: Any) -> None:
        assert onnx.name in ("dense.onnx", "pruned.onnx")
        raise ProfilingError("profiling the layers failed: it said nothing")

    monkeypatch.setattr(measure_stages, "layer_profile", fail)
    network = own_network()
    context: Any = SimpleNamespace(recipe=recipe(), space=analyze(network))
    networks: Any = {"dense": network, "pruned": network}
    files: Any = {
        name: Variant(tmp_path / f"{name}.onnx", engines={("rtx", 2): tmp_path / f"{name}.engine"})
        for name in ("dense", "pruned")
    }
    measured = Measurement.from_samples("rtx", 2, RawSamples(dict.fromkeys(VARIANTS, [[1.0]] * 3), True, 1.0))
    layers = measure_stages._break_down_layers(context, networks, files, [measured])
    monkeypatch.setattr(report_builder, "why_unchecked", lambda _: None)
    assert report_builder._warnings(context.recipe, layers) == [
        "No account of where the time goes with TensorRT for RTX: profiling the layers failed: it said nothing."
    ]
    with pytest.raises(ProfilingError):
        measure_stages._break_down_layers(context, networks, files, [replace(measured, runtime="ort-cpu")])


def test_further_builds_are_made_anew_and_of_the_same(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    network = own_network()
    onnx, engine, folder = tmp_path / "net.onnx", tmp_path / "net.rtx.engine", tmp_path / "more"
    program = trace(TensorOutputs(network.module, network.outputs), network.inputs, network.dynamic_axes)
    onnx_from_program(program, onnx, output_names=tuple(network.outputs), dynamic_axes=network.dynamic_axes)
    shapes = {name: tuple(t.shape) for name, t in network.inputs.items()}
    config = EngineConfig("rtx", optimization_level=1)
    info = build_engine(onnx, engine, input_ranges(shapes, network.dynamic_axes, (1, 2), 2, static=False), config)
    assert repeat_builds(engine, onnx, 1, folder) == (engine,) and not folder.exists()
    kept, again = repeat_builds(engine, onnx, 2, folder)
    assert kept == engine and again.parent == folder
    other = check_engine(again, onnx)
    assert (other.config, other.inputs, other.onnx_sha256) == (info.config, info.inputs, info.onnx_sha256)


def test_only_engines_that_can_be_measured_are_built_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, int]] = []

    def build(engine: Path, onnx: Path, count: int, folder: Path) -> tuple[Path, ...]:
        asked.append((engine.name, count))
        return (engine, *(folder / f"{engine.stem}.{number}" for number in range(2, count + 1)))

    monkeypatch.setattr(measure_stages, "repeat_builds", build)
    monkeypatch.setattr(measure_stages, "is_measurable", lambda runtime: runtime == "rtx")
    shared, other = tmp_path / "net.rtx.engine", tmp_path / "net.tensorrt.engine"
    variant = Variant(Path("net.onnx"), engines={("rtx", 1): shared, ("rtx", 8): shared, ("tensorrt", 1): other})
    found = measure_stages._build_again(variant, recipe(engine_builds=4), tmp_path)
    assert asked == [("net.rtx.engine", 4)]
    assert len(found.builds("rtx", 1)) == 4 and found.builds("rtx", 1) == found.builds("rtx", 8)
    assert found.builds("tensorrt", 1) == (other,)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_run_on_a_gpu_tells_how_builds_differ(built: Result) -> None:
    needs_device("rtx")
    report = built.report
    engines_run = [m for m in report.profile if m.runtime == "rtx"]
    assert engines_run and all(len(m.builds["dense"].p50_ms) == 3 for m in engines_run)
    assert {row.runtime for row in report.parity} == {"ort-cpu", "rtx"}
    assert "Builds of one engine" in render(report)
