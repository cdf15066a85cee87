"""Sweeps: what is planned, what is shared and resumed, what is dominated, and how it is shown."""

import json
import math
import re
import sys
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tiny_models import own_batches, own_network, save_shallow

import optin_deploy
from optin_deploy.cli.main import main
from optin_deploy.config.recipe import Recipe
from optin_deploy.config.sweep_plan import as_yaml, plan, read_sweep
from optin_deploy.data.calibration import from_batches
from optin_deploy.errors import UserError
from optin_deploy.report import Report, read_report
from optin_deploy.report.schema import Evaluation, Gate
from optin_deploy.run import measure_stages, pipeline, prune_stage
from optin_deploy.sweeps import run as sweep_run
from optin_deploy.sweeps.pareto import pareto_front
from optin_deploy.sweeps.report_builder import build_sweep_report
from optin_deploy.sweeps.schema import SweepReport
from optin_deploy.sweeps.terminal import summary
from optin_deploy.sweeps.web_page import render
from optin_deploy.utils.atomic_files import link_or_copy
from profilers import Comparison, Measurement, RawSamples

pytestmark = pytest.mark.slow


BASE = ["--runtimes", "ort-cpu", "--batch-sizes", "1", "--threads", "1", "--calibration-samples", "8"]
VISION = ["sweep", "--model", "test_vit", "--weights", "random", "--image-size", "32", *BASE]


@dataclass(frozen=True)
class Outcome:
    code: int
    out: str
    err: str


def call(*arguments: object) -> int:
    """The command line, in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as caught:
        patch.setattr(sys, "argv", ["optin-deploy", *map(str, arguments)])
        main()
    return int(caught.value.code or 0)


@pytest.fixture
def told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Outcome]:
    """The command line in an empty working directory, and what it says."""
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def tell(*arguments: object) -> Outcome:
        code = call(*arguments)
        return Outcome(code, *capsys.readouterr())

    return tell


def measured(speedup: float, noise: float = 0.01) -> Measurement:
    """What profilers hands over for a pruned network that is so much faster."""
    wave, other = ([[1 + noise * math.sin(s * i + j) for j in range(3)] for i in range(40)] for s in (7, 5))
    samples = {
        "dense": [[10 * w for w in row] for row in wave],
        "dense_again": [[10 * w for w in reversed(row)] for row in wave],
        "pruned": [[10 * w / speedup for w in row] for row in other],
    }
    return Measurement.from_samples("ort-cpu", 1, RawSamples(samples, True, 100.0))


def unmeasured(patch: pytest.MonkeyPatch) -> None:
    """No latencies are measured: every pruned network counts as 1.25 times faster."""
    patch.setattr(measure_stages, "LAYER_RUNTIMES", ())
    patch.setattr(measure_stages, "compare", lambda *_: Comparison((measured(1.25),), {}, {}))


@dataclass(frozen=True)
class Swept:
    """A sweep of two budgets, interrupted between them and taken up again, then given a third one."""

    directory: Path
    scored: list[str]
    interrupted: int
    finished: int
    again: int
    times: tuple[dict[str, int], dict[str, int]]


def times(directory: Path) -> dict[str, int]:
    return {str(p.relative_to(directory)): p.stat().st_mtime_ns for p in directory.rglob("*") if p.is_file()}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Swept]:
    path = tmp_path_factory.mktemp("sweep")
    save_shallow(path / "shallow")
    arguments = ["sweep", "--model", path / "shallow", *BASE, "--output", path / "deep" / "sweep"]
    scored: list[str] = []
    score, run = prune_stage.score, sweep_run.prune_export

    def counted(*given: Any, **options: Any) -> Any:
        scored.append("score")
        return score(*given, **options)

    def only_first(recipe: Recipe, **options: Any) -> Any:
        if recipe.flops != 0.8:
            raise KeyboardInterrupt
        return run(recipe, **options)

    with pytest.MonkeyPatch.context() as patch:
        unmeasured(patch)
        patch.setattr(prune_stage, "score", counted)
        with pytest.MonkeyPatch.context() as inner:
            inner.setattr(sweep_run, "prune_export", only_first)
            interrupted = call(*arguments, "--flops", "0.8,0.6")
        first = path / "deep" / "sweep" / "flops-0.8"
        before = times(first)
        finished = call(*arguments, "--flops", "0.8,0.6")
        after = times(first)
        again = call(*arguments, "--flops", "0.7, 0.8,0.6,0.70")
    yield Swept(path / "deep" / "sweep", scored, interrupted, finished, again, (before, after))


@pytest.fixture
def report(swept: Swept) -> SweepReport:
    return SweepReport.model_validate_json((swept.directory / "sweep.json").read_text(encoding="utf-8"))


@pytest.fixture
def runs(swept: Swept) -> dict[str, Report]:
    """Three runs: one measured as fast as the next smaller one, but worse."""
    speeds = {"flops-0.8": (1.2, 90.0), "flops-0.7": (1.3, 80.0), "flops-0.6": (1.3, 85.0)}
    found = {}
    for name, (speedup, accuracy) in speeds.items():
        one = read_report(swept.directory / name / "report.json")
        labelled = Evaluation(metric="accuracy", dataset="dev.csv", samples=50, dense=90.0, pruned=accuracy)
        data = dict(one) | {"profile": [measured(speedup)], "evaluation": labelled.model_dump()}
        found[name] = Report.model_validate(data)
    return found


# A sweep from end to end


def test_exit_codes(swept: Swept) -> None:
    assert (swept.interrupted, swept.finished, swept.again) == (130, 0, 0)


def test_scores_and_the_dense_file_are_made_once(swept: Swept) -> None:
    assert swept.scored == ["score"]
    for shared in ("scores.safetensors", "dense.onnx"):
        files = [swept.directory / name / shared for name in ("flops-0.8", "flops-0.7", "flops-0.6")]
        assert len({file.stat().st_ino for file in files}) == 1
        assert files[0].stat().st_size > 0


def test_a_finished_budget_is_not_run_again(swept: Swept) -> None:
    before, after = swept.times
    assert "report.json" in before
    assert before == after


def test_a_shared_run_is_the_run_alone(swept: Swept, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pipeline, "export_and_measure", _stop)
    with pytest.raises(KeyboardInterrupt):
        recipe = yaml.safe_load((swept.directory / "flops-0.6" / "recipe.yaml").read_text())
        pipeline.prune_export(Recipe(**recipe), output=tmp_path / "run", quiet=True)
    for name in ("scores.safetensors", "plan.json", "checkpoint/model.safetensors"):
        assert (tmp_path / "run" / name).read_bytes() == (swept.directory / "flops-0.6" / name).read_bytes()


def _stop(*_: object) -> None:
    raise KeyboardInterrupt


def test_the_documents(swept: Swept, report: SweepReport) -> None:
    assert [run.name for run in report.runs] == ["flops-0.7", "flops-0.8", "flops-0.6"]
    assert [run.budget.flops for run in report.runs] == [0.7, 0.8, 0.6]
    assert all(run.budget.flops - 0.01 <= run.flops_ratio <= run.budget.flops for run in report.runs)
    assert [(f.cost, f.runtime, f.batch_size) for f in report.fronts] == [
        ("flops", None, None),
        ("latency", "ort-cpu", 1),
    ]
    assert (report.quality.kind, report.quality.source) == ("top1", "logits")
    assert SweepReport.model_validate_json(report.model_dump_json()) == report
    assert report.settings["flops"] is None
    assert all((swept.directory / run.name / "report.html").is_file() for run in report.runs)
    assert {path.name for path in swept.directory.rglob(".*")} <= {".lock"}


def test_the_saved_recipe_is_the_sweep(swept: Swept) -> None:
    recipe, budgets = read_sweep({}, swept.directory / "recipe.yaml")
    assert budgets == {"flops": [0.7, 0.8, 0.6]}
    assert [run.name for run in plan(recipe, budgets)] == ["flops-0.7", "flops-0.8", "flops-0.6"]


def test_json_and_progress_of_a_sweep_that_is_done(
    swept: Swept, told: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep_run, "prune_export", None)
    before = times(swept.directory)
    outcome = told("sweep", "--recipe", swept.directory / "recipe.yaml", "--output", swept.directory, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    assert json.loads(outcome.out) == json.loads((swept.directory / "sweep.json").read_text())
    rewritten = {"run.json", "recipe.yaml", "sweep.json", "sweep.html"}
    assert {name for name, at in times(swept.directory).items() if at != before[name]} == rewritten
    lines = Console(force_terminal=True, record=True, width=100, file=sys.stderr)
    recipe, budgets = read_sweep({}, swept.directory / "recipe.yaml")
    optin_deploy.sweep(recipe, budgets, output=swept.directory, console=lines)
    assert re.search(r"2 of 3.*flops-0\.8.*before", lines.export_text())


def test_a_failed_gate_of_one_run_is_shown_at_the_end(
    runs: dict[str, Report], told: Callable[..., Outcome], monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(name="parity", passed=False, detail="pruned logits is off by 1.0e-02")
    runs["flops-0.7"] = runs["flops-0.7"].model_copy(update={"gates": [gate]})
    done = sweep_run.SweepResult(build_sweep_report(runs, {}, "again"), Path("there"))
    monkeypatch.setattr(sweep_run, "sweep", lambda *_, **__: done)
    outcome = told(*VISION, "--flops", "0.8,0.7,0.6")
    assert outcome.code == 3
    assert re.fullmatch(r"gate failed: flops-0\.7[^\n]*parity[^\n]* 1\.0e-02\n", outcome.err)
    assert re.search(r"flops-0\.7 .* dominated, parity gate failed", outcome.out)


def test_a_module_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    unmeasured(monkeypatch)
    recipe = Recipe(model="mine", runtimes=("ort-cpu",), batch_sizes=(1,))
    network, calibration = own_network(), from_batches(own_batches())
    result = optin_deploy.sweep(
        recipe, {"flops": [0.6]}, output=tmp_path / "s", network=network, calibration=calibration, quiet=True
    )
    assert result.directory == tmp_path / "s"
    assert [p.network for p in result.report.fronts[0].points] == ["flops-0.6", "dense"]


# Bad inputs


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "--flops .*--latency, --latency-ms"),
        (["--flops", ","], "--flops .*--latency, --latency-ms"),
        (["--flops", "0.8,1.5"], r"--flops 1\.5.*above 0 and below 1"),
        (["--flops", "0.8,half"], "--flops half"),
        (["--flops", "0.8,0.01,0.7"], r"0\.01 of the FLOPs cannot be reached"),
        (["--latency", "0.8,0"], "--latency 0"),
        (["--latency-ms", "4,-1"], "--latency-ms -1"),
        (["--flops", "0.8", "--batch-size", "4"], "--batch-size 4.* only with"),
        (
            ["--flops", "0.8", "--runtimes", "ort-cpu,rtx"],
            "--runtime rtx.*no GPU",
        ),
        (["--flops", "0.8", "--latency", "0.8", "--rounds", "2"], "--rounds 2.*latency.*one round"),
        (["--flops", "0.8,0.7", "--evaluate", "none"], "evaluation .*none does not exist"),
        (["--flops", "0.8", "--recipe", "none.yaml"], r"none\.yaml cannot be read"),
        (["--flops", "0.8", "--batch-sizes", "1,a"], "--batch-sizes a"),
    ],
)
def test_wrong_budgets_are_found_before_anything_is_written(
    told: Callable[..., Outcome], tmp_path: Path, arguments: list[str], expected: str
) -> None:
    outcome = told(*VISION, *arguments)
    assert outcome.code == 2
    assert re.search(expected, outcome.err)
    assert re.fullmatch(r"error: [^\n]+\n", outcome.err)
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]


@pytest.mark.parametrize(
    ("budgets", "expected"),
    [
        (["--latency", "0.8,0.3"], r"0\.3 of the latency cannot be reached"),
        (["--latency-ms", "9,11"], "--latency-ms 11.* 10 ms"),
    ],
)
def test_a_latency_out_of_reach_is_found_before_anything_is_written(
    told: Callable[..., Outcome], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, budgets: list[str], expected: str
) -> None:
    tables = SimpleNamespace(costs=SimpleNamespace(total=10.0, floor=4.0))
    monkeypatch.setattr(sweep_run, "measure_tables", lambda *_: tables)
    outcome = told(*VISION, "--flops", "0.8", *budgets)
    assert (outcome.code, bool(re.search(expected, outcome.err))) == (2, True), outcome
    assert list(tmp_path.rglob("*")) == [tmp_path / "here"]


def test_a_directory_that_holds_something_else(swept: Swept, told: Callable[..., Outcome]) -> None:
    before = times(swept.directory)
    for output in (swept.directory, swept.directory / "flops-0.8"):
        outcome = told(*VISION, "--flops", "0.8", "--output", output)
        assert (outcome.code, "holds another run" in outcome.err) == (2, True)
    assert times(swept.directory) == before


# The plan


def test_every_budget_is_a_recipe() -> None:
    runs = plan(Recipe(model="m", seed=3), {"flops": ["0.80", 0.5], "latency": [0.8], "latency_ms": [4]})
    assert [(run.name, run.recipe.flops, run.recipe.latency, run.recipe.latency_ms) for run in runs] == [
        ("flops-0.8", 0.8, None, None),
        ("flops-0.5", 0.5, None, None),
        ("latency-0.8", None, 0.8, None),
        ("latency-ms-4", None, None, 4.0),
    ]
    assert all(run.recipe.seed == 3 for run in runs)


def test_all_runs_are_measured_where_a_latency_holds() -> None:
    recipe = Recipe(model="m", runtimes=("ort-cpu",), batch_sizes=(1,), runtime="torch", batch_size=4)
    flops, latency = plan(recipe, {"flops": [0.8], "latency": [0.8]})
    for run in (flops, latency):
        assert (set(run.recipe.measured_runtimes), run.recipe.measured_batch_sizes) == ({"ort-cpu", "torch"}, (1, 4))
    assert (latency.recipe.target_runtime, latency.recipe.target_batch_size) == ("torch", 4)
    assert flops.recipe.runtime is None


def test_a_sweep_is_read_from_options_and_a_file(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text("model: m\nflops: 0.5\nlatency: [0.8, 0.7]\nlatency_ms: null\n")
    assert read_sweep({}, file)[1] == {"flops": [0.5], "latency": [0.8, 0.7]}
    recipe, budgets = read_sweep({"flops": ["0.9"], "seed": 2}, file)
    assert budgets == {"flops": ["0.9"], "latency": [0.8, 0.7]}
    file.write_text(as_yaml(recipe, plan(recipe, budgets)))
    assert read_sweep({}, file) == (recipe, {"flops": [0.9], "latency": [0.8, 0.7]})


def test_budgets_of_another_kind_are_refused() -> None:
    with pytest.raises(UserError, match="budget 'flop'"):
        plan(Recipe(model="m"), {"flop": [0.5]})
    with pytest.raises(UserError, match=r"flops.* 0\.5"):
        plan(Recipe(model="m", flops=0.5), {"flops": [0.5]})


def test_both_commands_take_the_same_options(told: Callable[..., Outcome]) -> None:
    once, many = (set(re.findall(r"--[a-z-]+", told(command, "--help").out)) for command in ("prune-export", "sweep"))
    assert once == many
    assert len(once) > 30


# The front


def _beaten(point: tuple[float, float], other: tuple[float, float]) -> bool:
    return other[0] <= point[0] and other[1] >= point[1] and other != point


# Few values, so that many are equal.
SMALL = st.integers(0, 4).map(float)


@given(st.lists(st.tuples(SMALL, st.one_of(SMALL, st.floats(-2, 2)))))
def test_front_is_what_none_beats(points: list[tuple[float, float]]) -> None:
    expected = {i for i, point in enumerate(points) if not any(_beaten(point, other) for other in points)}
    found = pareto_front(points)
    assert set(found) == expected
    assert len(found) == len(expected)
    assert [points[i][0] for i in found] == sorted(points[i][0] for i in found)


def test_nothing_is_worth_less_than_nan() -> None:
    assert pareto_front([(0.5, math.nan), (0.4, 1.0), (0.6, 0.0)]) == [1]
    assert pareto_front([(0.3, math.nan), (0.4, 1.0)]) == [0, 1]


def test_dominated_points_are_marked(runs: dict[str, Report]) -> None:
    flops, latency = build_sweep_report(runs, {}, "again").fronts
    assert [(p.network, p.dominated) for p in flops.points] == [
        ("flops-0.6", False),
        ("flops-0.7", True),
        ("flops-0.8", False),
        ("dense", True),
    ]
    assert {p.network: p.dominated for p in latency.points} == {
        "flops-0.6": False,
        "flops-0.7": True,
        "flops-0.8": False,
        "dense": True,
    }
    for point in latency.points:
        up = 1.0 if point.network == "dense" else runs[point.network].profile[0].speedup.value
        assert point.cost.value == pytest.approx(1 / up)
        assert point.cost.low <= point.cost.value <= point.cost.high


# How it is shown


def test_the_terminal_text(runs: dict[str, Report]) -> None:
    console = Console(width=100, record=True, file=sys.stderr)
    console.print(summary(build_sweep_report(runs, {}, "again")))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 100
    assert re.search(r"flops-0\.7 +0\.69\d +80\.00 +dominated", text)
    fastest = min(1 / runs[name].profile[0].speedup.value for name in ("flops-0.6", "flops-0.7"))
    assert re.search(rf"ONNX Runtime, batch 1 +flops-0\.[67] +{fastest:.2f} \[0\.\d\d–0\.\d\d\]", text)
    assert re.search(r"accuracy.*dev\.csv", text)


def test_the_page(runs: dict[str, Report]) -> None:
    evil = "<script>alert(1)</script>"
    page = render(build_sweep_report(runs, {}, evil))
    assert evil not in page
    pictures = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(pictures) == 2
    for picture in pictures:
        ids = [element.get("id", "") for element in ET.fromstring(picture).iter()]
        assert sum(i.endswith("-dominated") for i in ids) == 2
        assert sum(i.endswith("-front") for i in ids) == 2
        assert "currentColor" in picture
        assert "<text" in picture
    every = re.findall(r'\bid="([^"]+)"', page)
    assert len(every) == len(set(every))
    assert not re.search(r'(src|href)="(?!#|flops-)', page)


def test_figures_that_are_not_numbers(runs: dict[str, Report]) -> None:
    unknown = runs["flops-0.7"].evaluation
    assert unknown is not None
    unknown = unknown.model_copy(update={"pruned": math.nan})
    runs["flops-0.7"] = runs["flops-0.7"].model_copy(update={"evaluation": unknown})
    found = build_sweep_report(runs, {}, "again")
    assert math.isnan(SweepReport.model_validate_json(found.model_dump_json()).runs[1].quality)
    assert "nan" in render(found)


def test_a_front_of_other_networks_is_refused(report: SweepReport) -> None:
    data = report.model_dump()
    data["fronts"][0]["points"].pop()
    with pytest.raises(ValueError, match=r"one point .*each run"):
        SweepReport.model_validate(data)


@pytest.mark.parametrize("linked", [True, False])
def test_link_or_copy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, linked: bool) -> None:
    source, target = tmp_path / "a", tmp_path / "b"
    source.write_text("one")
    if not linked:
        monkeypatch.setattr("os.link", lambda *_: (_ for _ in ()).throw(OSError("another file system")))
    link_or_copy(source, target)
    assert target.read_text() == "one"
    assert (target.stat().st_ino == source.stat().st_ino) == linked
    source.unlink()
    source.write_text("two")
    link_or_copy(source, target)
    assert target.read_text() == "one"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]
