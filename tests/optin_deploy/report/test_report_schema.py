"""report.json: what it accepts, that it comes back the same, and that it appears whole or not at all."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

import optin_deploy.report.web_page
from optin_deploy.errors import UserError
from optin_deploy.report import Report, read_report, write_report


def test_a_report_comes_back_the_same(report: Report, tmp_path: Path) -> None:
    document, page = write_report(report, tmp_path / "run")
    assert sorted(file.name for file in (tmp_path / "run").iterdir()) == ["report.html", "report.json", "report.md"]
    assert read_report(document) == report
    assert page.read_text().startswith("<!DOCTYPE html>")


def test_the_headline_stands_in_the_document(report: Report, tmp_path: Path) -> None:
    document = json.loads(write_report(report, tmp_path)[0].read_text())
    assert document["flops_ratio"] == pytest.approx(4_583_219_712 / 9_203_613_696)
    assert [(item["runtime"], item["batch_size"]) for item in document["realised"]] == [
        ("ort-cpu", 1),
        ("ort-cpu", 8),
        ("torch", 1),
        ("torch", 8),
    ]
    speedup, ratio = document["profile"][1]["speedup"], document["realised"][1]["ratio"]
    for key in ("value", "low", "high"):
        assert ratio[key] == pytest.approx(speedup[key] / document["flops_reduction"])


def test_infinite_errors_are_valid_json_and_come_back(data: dict[str, Any], tmp_path: Path) -> None:
    data["parity"][0] |= {"max_abs_error": float("inf"), "passed": False}
    path, _ = write_report(Report.model_validate(data), tmp_path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    assert read_report(path).parity[0].max_abs_error == float("inf")


@pytest.mark.parametrize("change", [{"schema_version": 3}, {"unknown": 1}, {"created": "2026-03-02T14:05:09"}])
def test_another_layout_is_refused(change: dict[str, Any], data: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ValidationError):
        Report.model_validate(data | change)
    (tmp_path / "report.json").write_text(json.dumps(data | change))
    with pytest.raises(UserError, match=next(iter(change))) as caught:
        read_report(tmp_path / "report.json")
    assert "\n" not in str(caught.value)


def test_version_1_is_read_with_throughput_by_the_mean(data: dict[str, Any], report: Report, tmp_path: Path) -> None:
    for item in data["profile"]:
        medians = {name: item["batch_size"] * 1e3 / item["summary"][name]["p50_ms"] for name in item["summary"]}
        item["throughput_per_s"] = medians
    (tmp_path / "report.json").write_text(json.dumps(data | {"schema_version": 1}))
    assert read_report(tmp_path) == report
    item = read_report(tmp_path).profile[1]
    assert item.throughput_per_s.pruned == pytest.approx(8e3 / item.summary.pruned.mean_ms)


@pytest.mark.parametrize("change", [{"summary": None}, {"batch_size": "x"}, {"throughput_per_s": []}])
def test_damaged_reports_of_version_1_are_user_errors(
    change: dict[str, Any], data: dict[str, Any], tmp_path: Path
) -> None:
    data["profile"][0] |= change
    (tmp_path / "report.json").write_text(json.dumps(data | {"schema_version": 1}))
    with pytest.raises(UserError, match="profile"):
        read_report(tmp_path)


def test_files_that_are_no_report_are_user_errors(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="No such file"):
        read_report(tmp_path / "none.json")
    (tmp_path / "report.json").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="not a report"):
        read_report(tmp_path / "report.json")


def test_a_failure_leaves_what_was_there(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report.json").write_text("earlier")

    def fails(report: Report) -> str:
        raise RuntimeError

    monkeypatch.setattr(optin_deploy.report.web_page, "render", fails)
    with pytest.raises(RuntimeError):
        write_report(report, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["report.json"]
    assert (tmp_path / "report.json").read_text() == "earlier"
