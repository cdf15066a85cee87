"""Several reports beside each other."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from optin_deploy.cli.main import main
from optin_deploy.report import Report, wording, write_report
from optin_deploy.report.comparison import HEADING, Line, as_markdown, lines, notes, view

Other = Callable[..., Report]


@pytest.fixture
def other(data: dict[str, Any]) -> Other:
    """A report in which some things are different."""
    return lambda **changes: Report.model_validate({**data, **changes})


def test_a_line_has_the_figures_of_the_headline(report: Report) -> None:
    (line,) = lines({"runs/a": report})
    headline = report.profile[1]
    assert line.speed is not None
    assert (line.run, line.speed.runtime, line.speed.batch_size) == ("runs/a", "ort-cpu", 8)
    assert line.speed.speedup == headline.speedup.value
    assert line.speed.realised_ratio == pytest.approx(headline.speedup.value / report.flops_reduction)
    assert line.outputs == "top-1 % 79.84 → 76.92"
    assert line.flops_ratio == report.flops_ratio
    assert line.failed_gates == ()
    assert len(line.cells) == len(HEADING)


def test_without_an_evaluation_agreement_is_shown_and_without_measurements_no_speed(other: Other) -> None:
    line = Line.of("a", other(evaluation=None, profile=[]))
    assert line.cells[3] == "not measured" and line.cells[4:7] == ("—", "—", "—")
    assert "logits" in line.cells[7] and "0.9731" in line.cells[7] and line.cells[8] == "passed"
    assert Line.of("a", other(evaluation=None, profile=[], agreement=[])).cells[-2] == "—"


def test_what_cannot_be_compared_is_said(report: Report, data: dict[str, Any], other: Other) -> None:
    assert notes(lines({"a": report, "b": report})) == [wording.SPEED_UP]
    elsewhere = other(environment={**data["environment"], "cpu": "another"}, profile=data["profile"][:1])
    found = notes(lines({"a": report, "b": elsewhere}))
    assert "device" in found[0] and "batch size" in found[1] and found[2:] == [wording.SPEED_UP]


def test_the_views_have_every_run(report: Report, other: Other) -> None:
    failed = other(gates=[{"name": "parity", "passed": False, "detail": "far off"}])
    compared = lines({"runs/a": report, "runs/b": failed})
    text = as_markdown(compared)
    assert text.splitlines()[4:] == ["", wording.SPEED_UP]
    assert "FAILED: parity" in text
    console = Console(width=200)
    with console.capture() as captured:
        console.print(view(compared))
    assert "runs/a" in captured.get()
    assert "FAILED: parity" in captured.get()


def test_p50s_that_contradict_the_speedup_are_explained(data: dict[str, Any], other: Other) -> None:
    profile = [{**item, "speedup": {"value": 3.0, "low": 2.9, "high": 3.1}} for item in data["profile"]]
    found = notes(lines({"runs/a": other(profile=profile)}))
    assert found[0] == wording.SPEED_UP
    assert "1.8" in found[1] and "outside" in found[1] and "runs/a" in found[1]


@pytest.fixture
def runs(report: Report, tmp_path: Path) -> list[str]:
    for name in ("a", "b"):
        write_report(report, tmp_path / name)
    return [str(tmp_path / "a"), str(tmp_path / "b" / "report.json")]


def run(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr("sys.argv", ["optin-deploy", "report", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    return int(ended.value.code or 0)


@pytest.mark.slow
def test_the_command_shows_one_and_compares_several(
    runs: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert run(runs[:1], monkeypatch) == 0
    assert "throughput" in capsys.readouterr().out
    assert run([*runs[:1], "--markdown"], monkeypatch) == 0
    assert capsys.readouterr().out == (tmp_path / "a" / "report.md").read_text(encoding="utf-8")
    assert run(runs, monkeypatch) == 0
    table = capsys.readouterr().out
    assert "FLOPs" in table and table.count("passed") == len(runs)
    assert run([*runs, "--json"], monkeypatch) == 0
    assert [line["run"] for line in json.loads(capsys.readouterr().out)] == runs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["nowhere"], "nowhere"), (["nowhere", "--json", "--markdown"], "--markdown and --json")],
)
def test_what_is_wrong_is_one_line(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(arguments, monkeypatch) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
