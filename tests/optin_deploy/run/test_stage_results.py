"""Files that stages leave in a run directory are read as typed values, those of earlier versions too."""

import json
from pathlib import Path

import pytest

from optin_deploy.analysis.results import Bottleneck, LayerBreakdown, TimeRow, Unprofiled, WholeRow
from optin_deploy.errors import UserError
from optin_deploy.report.schema import Evaluation, LatencyBudget, Parity
from optin_deploy.run.run_directory import read_json, read_with_checkpoint, write_json
from profilers import Comparison, Measurement, RawSamples

SAMPLES = {name: [[1.0, 1.1], [1.0, 1.0], [1.1, 1.0]] for name in ("dense", "dense_again", "pruned")}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    (tmp_path / "run.json").write_text('{"fingerprint": "a"}')
    return tmp_path


def breakdown() -> LayerBreakdown:
    row = TimeRow("attention", 2.0, 1.0, 10, 5)
    whole = WholeRow("measured", 3.0, 2.0, 10, 5)
    return LayerBreakdown("ort-cpu", 1, (row,), (row,), (row,), row, whole, row, 0.5, (Bottleneck(0.5, "why"),))


def test_layers_come_back_the_same(directory: Path) -> None:
    layers = [breakdown(), Unprofiled("rtx", "it says nothing")]
    write_json(directory / "layers.json", layers)
    assert read_json(directory / "layers.json", list[LayerBreakdown | Unprofiled]) == layers


def test_a_profile_comes_back_the_same(directory: Path) -> None:
    profile = Comparison(
        (Measurement.from_samples("ort-cpu", 1, RawSamples(SAMPLES, True, 1.0)),), {"cpu": "abacus"}, {}
    )
    write_json(directory / "profile.json", profile)
    assert read_json(directory / "profile.json", Comparison) == profile


def test_a_failed_parity_comes_back_the_same(directory: Path) -> None:
    row = Parity(
        variant="dense",
        output="y",
        max_abs_error=float("inf"),
        max_abs_reference=1.0,
        tolerance=1e-4,
        passed=False,
    )
    write_json(directory / "parity.json", [row])
    assert read_json(directory / "parity.json", list[Parity]) == [row]


def test_an_evaluation_of_an_earlier_version_is_read(directory: Path) -> None:
    figures = {"metric": "accuracy", "dataset": "dev.csv", "samples": 3, "dense": 90.0, "pruned": 80.0}
    (directory / "evaluation.json").write_text(json.dumps(figures))
    assert read_json(directory / "evaluation.json", Evaluation).kept == 80.0


@pytest.mark.parametrize("change", [{"measured": None}, {"parts": [{"name": "attention"}]}, {"lost_ms": "much"}])
def test_a_result_of_another_layout_is_refused_in_one_line(directory: Path, change: dict[str, object]) -> None:
    write_json(directory / "layers.json", [breakdown()])
    (entry,) = json.loads((directory / "layers.json").read_text())
    (directory / "layers.json").write_text(json.dumps([entry | change]))
    with pytest.raises(UserError, match=r"layers\.json") as caught:
        read_json(directory / "layers.json", list[LayerBreakdown | Unprofiled])
    assert "\n" not in str(caught.value)


def test_a_file_that_belongs_to_the_checkpoint_cannot_be_made_alone(directory: Path) -> None:
    for content in (None, "{}"):
        if content is not None:
            (directory / "latency.json").write_text(content)
        with pytest.raises(UserError, match=r"latency\.json .*checkpoint") as caught:
            read_with_checkpoint(directory, "latency.json", LatencyBudget)
        assert "\n" not in str(caught.value)
