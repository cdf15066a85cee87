"""report.md: what stands in it, and that no text of a run is taken for markup."""

from __future__ import annotations

import re
from typing import Any

import pytest

from optin_deploy.report import Report, markdown, wording
from optin_deploy.report.markdown import escaped, fenced, render, table
from optin_deploy.utils.display import Table


def cells(text: str) -> list[list[str]]:
    """The cells of all lines of tables."""
    return [[c.strip() for c in line[1:-1].split(" | ")] for line in text.splitlines() if line.startswith("|")]


def test_the_verdict_comes_first_and_every_figure_is_that_of_the_report(report: Report) -> None:
    text = render(report)
    lines = text.splitlines()
    assert lines[0].startswith("## deit\\_small\\_patch16\\_224") and "−50.2 %" in lines[0]
    assert lines[2] == f"**{escaped(wording.verdict(report))}**"
    found = cells(text)
    assert ["dense", "9.20 G", "22.1 M", "84.2 MiB"] in found
    for item, ratio in zip(report.profile, report.realised, strict=True):
        speed = f"{item.speedup.value:.2f}× \\[{item.speedup.low:.2f}–{item.speedup.high:.2f}\\]"
        assert any(row[-2:] == [speed, f"{ratio.ratio.value:.2f}"] for row in found)
    (evaluation,) = (row for row in found if row[0] == "top-1 %")
    assert all(fact in evaluation[1] for fact in ("79.84 → 76.92", "ImageNet-1k val", "5000"))
    assert any(row[:2] == ["parity", "passed"] for row in found)
    assert any(row[0] == "patch\\_embed.proj" for row in found)
    assert text.endswith(f"{fenced(report.command)}\n")


def test_failed_gates_stand_out(data: dict[str, Any]) -> None:
    data["gates"][0]["passed"] = False
    text = render(Report.model_validate(data))
    assert re.search(r"^> \*\*alarm:\*\* .*parity", text, re.MULTILINE)
    assert any(row[:2] == ["parity", "FAILED"] for row in cells(text))


def test_without_measurements(data: dict[str, Any]) -> None:
    text = render(Report.model_validate({**data, "profile": [], "evaluation": None, "agreement": [], "left_dense": []}))
    assert "not measured" in text and "faster" not in text
    assert "left dense" not in text.lower()


@pytest.mark.parametrize(
    "name", ["a|b", "<script>alert(1)</script>", "x\n\n# heading", "[link](http://x.example)", "@someone", "`code`"]
)
def test_nothing_of_a_run_is_markup(data: dict[str, Any], name: str) -> None:
    data["agreement"][0]["output"] = name
    data["model"]["name"] = name
    text = render(Report.model_validate(data))
    assert name not in text
    assert len({len(row) for row in cells(table(Table(["a"], [[name]])))}) == 1
    assert len(markdown.table(Table(["a"], [[name]])).splitlines()) == 3


def test_a_fence_is_longer_than_what_it_holds() -> None:
    assert fenced("a ```` b").splitlines() == ["`````", "a ```` b", "`````"]
