"""Runs to a latency budget, measured for real on networks so small that only what is recorded can be judged."""

from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from optin_deploy.config.recipe import Recipe
from optin_deploy.errors import UserError
from optin_deploy.report import read_report, wording
from optin_deploy.report.terminal import summary
from optin_deploy.run.pipeline import Result, prune_export

pytestmark = pytest.mark.slow


QUICK: dict[str, Any] = {
    "runtimes": ("ort-cpu",),
    "batch_sizes": (1, 2),
    "profile_seconds": 0.2,
    "table_seconds": 0.3,
    "threads": 1,
    "calibration_samples": 8,
}


@pytest.fixture(scope="module", autouse=True)
def quick_rounds(quick_tables: pytest.MonkeyPatch) -> None:
    quick_tables.setattr("optin_deploy.run.measure_stages.LAYER_RUNTIMES", ())


@pytest.fixture(scope="module")
def run(shallow: str, tmp_path_factory: pytest.TempPathFactory) -> Result:
    recipe = Recipe(**QUICK, model=shallow, latency=0.9, batch_size=2)
    return prune_export(recipe, output=tmp_path_factory.mktemp("latency") / "run", quiet=True)


def test_what_the_report_says_of_the_budget(run: Result) -> None:
    report = read_report(run.directory / "report.json")
    met = report.latency_budget
    assert met is not None
    assert (met.runtime, met.batch_size, met.fraction) == ("ort-cpu", 2, 0.9)
    assert 1 <= len(met.rounds) <= 2
    assert 0 <= met.taken < len(met.rounds)
    assert 0 < met.floor_ms < met.dense_ms
    assert met.tables_cached == 0 < met.tables
    assert [g.name for g in report.gates] == ["latency", "parity"]
    assert report.budget.flops is None
    assert "latency tables" in report.stage_seconds
    html = (run.directory / "report.html").read_text(encoding="utf-8")
    assert "Latency budget" in html
    assert wording.latency_budget(report) in " ".join(html.split())
    console = Console(width=100)
    with console.capture() as captured:
        console.print(summary(report))
    assert "latency budget" in captured.get()
    assert wording.headline(report).batch_size == 2


def test_tables_are_used_again_and_both_budgets_hold(run: Result, shallow: str, tmp_path: Path) -> None:
    recipe = Recipe(**QUICK, model=shallow, latency=0.95, flops=0.8, batch_size=2)
    report = prune_export(recipe, output=tmp_path / "run", quiet=True).report
    assert report.latency_budget is not None
    assert report.latency_budget.tables_cached == report.latency_budget.tables
    assert report.flops_ratio <= 0.8
    assert [g.name for g in report.gates] == ["budget", "latency", "parity"]


def test_a_finished_run_is_not_measured_again(run: Result, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optin_deploy.run.latency_stage.measure_latency_model", None)
    monkeypatch.setattr("optin_deploy.run.latency_stage.solve_latency_budget", None)
    recipe = Recipe.model_validate(run.report.settings)
    again = prune_export(recipe, output=run.directory, quiet=True)
    assert again.report.latency_budget == run.report.latency_budget


@pytest.mark.parametrize(
    ("budget", "message"),
    [
        ({"latency": 0.001}, r"0\.001 of the latency cannot be reached"),
        ({"latency_ms": 1e6}, r"--latency-ms 1e\+06: .* ms"),
    ],
)
def test_an_unreachable_latency_leaves_nothing_behind(
    run: Result, shallow: str, tmp_path: Path, budget: dict[str, float], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        prune_export(Recipe(**QUICK, model=shallow, batch_size=2, **budget), output=tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_sizes_on_the_edges_under_a_flop_budget(run: Result, shallow: str, tmp_path: Path) -> None:
    recipe = Recipe(**QUICK, model=shallow, flops=0.6, align="auto", batch_size=2)
    report = prune_export(recipe, output=tmp_path / "run", quiet=True).report
    assert 0.59 <= report.flops_ratio <= 0.6
    assert report.latency_budget is None
