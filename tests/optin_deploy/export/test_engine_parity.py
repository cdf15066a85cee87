import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from engine_runtimes import needs_device
from rich.console import Console
from tiny_models import own_network

from exporters import EngineConfig, EngineInfo, build_engine, input_ranges, onnx_from_program, trace
from exporters.shapes import Range
from optin_deploy.config.recipe import Recipe
from optin_deploy.export import engine_parity
from optin_deploy.export.engine_parity import check_engine_parity, checkable_engines, fit_batches, why_unchecked
from optin_deploy.network import Network, TensorOutputs
from optin_deploy.report.schema import Parity
from optin_deploy.run import measure_stages
from optin_deploy.run.report_builder import _parity_gate
from optin_deploy.utils.progress import Stages
from profilers import infer_file

pytestmark = pytest.mark.slow


def recipe(**options: Any) -> Recipe:
    return Recipe(**{"model": "mine", "flops": 0.6, "runtimes": ("ort-cpu", "rtx"), "threads": 1, **options})


def batches(network: Network, sizes: tuple[int, ...] = (1, 3, 8)) -> list[dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return [{name: torch.randn(size, *t.shape[1:]) for name, t in network.inputs.items()} for size in sizes]


@pytest.mark.parametrize(
    ("least", "most", "shapes"),
    [
        ((1, 1), (8, 12), [(1, 12), (3, 7), (8, 5)]),
        ((2, 1), (4, 12), [(2, 12), (3, 7), (4, 5)]),
        ((4, 12), (4, 12), [(4, 12)]),
    ],
)
def test_batches_come_to_shapes_that_an_engine_takes(
    least: tuple[int, int], most: tuple[int, int], shapes: list[tuple[int, int]]
) -> None:
    given = [{"ids": torch.arange(b * s).reshape(b, s)} for b, s in ((1, 12), (3, 7), (8, 5))]
    found = fit_batches(given, {"ids": Range(least, most, most)})
    assert [tuple(batch["ids"].shape) for batch in found] == shapes


def test_a_batch_is_cut_at_its_end_and_repeated_from_its_beginning() -> None:
    (cut,) = fit_batches([{"ids": torch.tensor([[1, 2], [3, 4]])}], {"ids": Range((1, 1), (1, 1), (1, 1))})
    assert cut["ids"].tolist() == [[1]]
    (found,) = fit_batches([{"ids": torch.tensor([[1, 2], [3, 4]])}], {"ids": Range((3, 3), (3, 3), (3, 3))})
    assert found["ids"].tolist() == [[1, 2, 1], [3, 4, 3], [1, 2, 1]]


def test_only_engines_with_weights_are_checked_and_only_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine_parity, "is_measurable", lambda runtime: False)
    assert checkable_engines(recipe()) == []
    assert "no GPU" in str(why_unchecked(recipe()))
    assert why_unchecked(recipe(runtimes=("ort-cpu",))) is None
    monkeypatch.setattr(engine_parity, "is_measurable", lambda runtime: True)
    assert [each.runtime for each in checkable_engines(recipe())] == ["rtx"] and why_unchecked(recipe()) is None
    stripped = recipe(weight_stripped=True)
    assert checkable_engines(stripped) == [] and "--weight-stripped" in str(why_unchecked(stripped))


def exported(network: Network, folder: Path, name: str = "net") -> Path:
    program = trace(TensorOutputs(network.module, network.outputs), network.inputs, network.dynamic_axes)
    path = folder / f"{name}.onnx"
    onnx_from_program(program, path, output_names=tuple(network.outputs), dynamic_axes=network.dynamic_axes)
    return path


def ranges(network: Network) -> dict[str, Range]:
    shapes = {name: tuple(t.shape) for name, t in network.inputs.items()}
    return input_ranges(shapes, network.dynamic_axes, (1, 4), 4, static=False)


def stand_in(monkeypatch: pytest.MonkeyPatch, network: Network, sha256: str = "1") -> list[Path]:
    """ONNX files in the place of engines, run by ONNX Runtime; the files that were run."""
    ran: list[Path] = []

    def infer(runtime: str, file: Path, *rest: Any) -> Any:
        assert runtime == "rtx"
        ran.append(file)
        return infer_file("ort-cpu", file, *rest)

    info = EngineInfo("rtx", "1", "", sha256, None, "", EngineConfig("rtx"), ranges(network))
    monkeypatch.setattr(engine_parity, "check_engine", lambda _: info)
    monkeypatch.setattr(measure_stages, "check_engine", lambda _: info)
    monkeypatch.setattr(engine_parity, "infer_file", infer)
    monkeypatch.setattr(engine_parity, "is_measurable", lambda _: True)
    return ran


def test_an_engine_that_computes_something_else_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    network, other = own_network(), own_network()
    stand_in(monkeypatch, network)
    with torch.no_grad():
        next(iter(other.module.parameters())).add_(0.1)
    for built_of, passes in ((network, True), (other, False)):
        parity = check_engine_parity(network, "rtx", exported(built_of, tmp_path), recipe(), batches(network, (8,)))
        assert [p.passed for p in parity] == [passes] * len(network.outputs)
        # Eight samples are more than the engine takes.
        assert all(p.shape[0] <= 4 for p in parity)


def test_a_run_checks_its_engines_once_and_again_when_they_are_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "run.json").write_text('{"fingerprint": "0"}')
    network = own_network()
    held_out = tuple(batches(network, (8,)))
    prepared = SimpleNamespace(calibration=SimpleNamespace(held_out=held_out))
    context: Any = SimpleNamespace(recipe=recipe(batch_sizes=(1, 4)), prepared=prepared, directory=tmp_path)
    networks: Any = {"dense": network, "pruned": network}
    for name in ("dense.rtx.engine", "pruned.rtx.engine"):
        exported(network, tmp_path, name).rename(tmp_path / name)
    for sha256, runs in (("1", 2), ("1", 0), ("2", 2)):
        ran = stand_in(monkeypatch, network, sha256)
        with Stages(Console(), quiet=True) as context.stages:
            rows = measure_stages._check_engines(context, networks)
        assert len(ran) == runs
        assert [(row.variant, row.runtime, row.passed) for row in rows] == [
            (variant, "rtx", True) for variant in ("dense", "pruned") for _ in network.outputs
        ]
    assert json.loads((tmp_path / "engine_parity.json").read_text())["rows"] == [row.model_dump() for row in rows]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("runtime", ["rtx", "tensorrt"])
def test_a_real_engine_passes(tmp_path: Path, runtime: str) -> None:
    needs_device(runtime)
    network = own_network()
    engine = tmp_path / "net.engine"
    build_engine(exported(network, tmp_path), engine, ranges(network), EngineConfig(runtime))
    parity = check_engine_parity(network, runtime, engine, recipe(parity_tolerance=1e-3), batches(network, (8,)))
    assert all(p.passed for p in parity)


def parity_row(**figures: Any) -> Parity:
    defaults = {"max_abs_error": 1e-6, "max_abs_reference": 1.0, "tolerance": 1e-4, "passed": True, "samples": 12}
    return Parity(variant="pruned", output="y", **{**defaults, **figures})


def test_the_gate_tells_which_product_is_off() -> None:
    row = parity_row(max_abs_error=0.5, passed=False)
    gate = _parity_gate([row.model_copy(update={"runtime": "rtx"}), row])
    assert gate.detail == "pruned y with TensorRT for RTX is off by 5.0e-01; pruned y is off by 5.0e-01"


def test_the_gate_tells_where_rounding_decided() -> None:
    gate = _parity_gate([parity_row(), parity_row(near_ties=2)])
    assert gate.passed
    told = "2 of 12 samples compared with other tokens merged, where rounding decides"
    assert gate.detail == f"largest error 1.0e-06 on held-out inputs; {told}"
