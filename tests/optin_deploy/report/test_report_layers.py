"""Where the time goes: in the document, on the page, and its causes in the terminal."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from optin_deploy.report import Report, markdown, plots, read_report, write_report
from optin_deploy.report.terminal import summary
from optin_deploy.report.web_page import render
from optin_deploy.report.wording import headline_layers, profiled_share


def row(name: str, dense_ms: float, pruned_ms: float, dense: int = 0, pruned: int = 0) -> dict[str, Any]:
    return {"name": name, "dense_ms": dense_ms, "pruned_ms": pruned_ms, "dense_flops": dense, "pruned_flops": pruned}


def entry(runtime: str, batch: int, causes: int = 4) -> dict[str, Any]:
    sentences = [
        f"Cause {i} takes {i} of 21.5 ms, which is told at some length, past a hundred columns, to see it wrap."
        for i in range(causes)
    ]
    parts = [row("attention", 15.0, 9.5, 3000, 1500), row("FFN", 20.0, 10.0, 6000, 3000), row("embedding", 1.5, 1.5)]
    return {
        "runtime": runtime,
        "batch_size": batch,
        "parts": parts,
        "blocks": [row("blocks.0", 35.0, 19.5, 9000, 4500), row("", 1.5, 1.5)],
        "kinds": [row("matrix products", 30.0, 17.0), row("softmax", 6.5, 4.0)],
        "between": row("between operators", 0.5, 0.5),
        "measured": row("measured", 37.0, 21.5, 9000, 4500),
        "profiled": row("profiled", 38.0, 21.0, 9000, 4500),
        "lost_ms": 3.0,
        "causes": [{"lost_ms": 3.0 - i / 2, "sentence": sentence} for i, sentence in enumerate(sentences)],
    }


@pytest.fixture
def told(data: dict[str, Any]) -> dict[str, Any]:
    return data | {"layers": [entry("ort-cpu", 1), entry("ort-cpu", 8), entry("torch", 8, causes=0)]}


def shown(report: Report) -> str:
    stream = StringIO()
    Console(file=stream, width=200).print(summary(report))
    return stream.getvalue()


def test_it_comes_back_and_reports_without_it_still_read(told: dict[str, Any], tmp_path: Path) -> None:
    report = Report.model_validate(told)
    path, _ = write_report(report, tmp_path)
    assert read_report(path) == report
    document = json.loads(path.read_text())
    del document["layers"]
    path.write_text(json.dumps(document))
    assert read_report(path).layers == []


def test_the_page_has_tables_pictures_and_sentences(told: dict[str, Any], data: dict[str, Any]) -> None:
    plain, page = render(Report.model_validate(data)), render(Report.model_validate(told))
    assert "Where the time goes" not in plain and "Why not faster" not in plain
    assert page.count("<svg") == plain.count("<svg") + 3
    assert page.count("Why not faster") == 3
    for text in ("Cause 0 takes", "between operators", "outside the blocks", "102.7 %", "97.7 %"):
        assert text in page
    assert "<td>15.0</td><td>9.50</td><td>0.63</td><td>0.50</td>" in page
    assert "<td>1.50</td><td>1.50</td><td>1.00</td><td>—</td>" in page
    assert re.search(r"no single cause[^<]*2 %", page)


def test_names_of_blocks_break_behind_dots_and_are_escaped(told: dict[str, Any]) -> None:
    told["layers"][0]["blocks"] = [row("a.<b>.0", 35.0, 19.5, 9000, 4500)]
    assert '<th scope="row">a.<wbr>&lt;b&gt;.<wbr>0</th>' in render(Report.model_validate(told))


def test_several_blocks_have_a_picture_of_their_own(told: dict[str, Any]) -> None:
    assert plots.blocks(Report.model_validate(told).layers[0]) == ""
    blocks = [row(f"blocks.{i}", 3.0, 1.5 + 0.1 * i) for i in range(30)]
    told["layers"] = [told["layers"][0] | {"blocks": [*blocks, row("", 1.5, 1.5)]}]
    picture = plots.blocks(Report.model_validate(told).layers[0])
    ET.fromstring(picture)
    assert picture.count("clip-path=") >= 2 * 31 and ">other<" in picture
    assert "By block" in render(Report.model_validate(told))


def test_a_time_that_fell_by_more_than_the_flops_is_told_as_such(told: dict[str, Any]) -> None:
    told["layers"] = [told["layers"][0] | {"lost_ms": -1.5}]
    page = render(Report.model_validate(told))
    assert "more than the FLOPs" in page and "-1.5" not in page and "−1.5" not in page


def test_its_texts_are_escaped(told: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script>"
    told["layers"][0]["causes"][0]["sentence"] = told["layers"][0]["parts"][0]["name"] = evil
    told["layers"][0]["blocks"][0]["name"] = told["layers"][1]["runtime"] = evil
    assert "<script" not in render(Report.model_validate(told))


def test_the_picture_is_valid_and_the_same_every_time(told: dict[str, Any]) -> None:
    breakdown = Report.model_validate(told).layers[0]
    picture = plots.parts(breakdown)
    ET.fromstring(picture)
    assert picture == plots.parts(breakdown)
    assert "embedding" in picture and "between operators" in picture


def test_the_terminal_tells_the_three_most_costly_causes(told: dict[str, Any], data: dict[str, Any]) -> None:
    text = shown(Report.model_validate(told))
    assert re.search(r"why not faster.*ONNX Runtime.*batch 8", text)
    assert [f"- Cause {i}" in text for i in range(4)] == [True, True, True, False]
    told_lines = [line for line in text.splitlines() if "Cause" in line or "wrap" in line]
    assert max(len(line.rstrip()) for line in told_lines) <= 100
    assert "why not faster" not in shown(Report.model_validate(data))


def test_an_account_in_doubt_is_shown_with_the_doubt_and_without_causes(told: dict[str, Any]) -> None:
    doubt = "The machine was too busy for the account of where the time goes to be trusted: it took 2 ms."
    told["layers"] = [entry("ort-cpu", 8, causes=0) | {"doubt": doubt}]
    report = Report.model_validate(told)
    for text in (render(report), markdown.render(report), shown(report)):
        assert doubt in text and "Cause 0" not in text
    page = render(report)
    assert "ms lost" not in page and "<td>15.0</td><td>9.50</td>" in page


def test_the_account_told_is_that_of_the_headline(told: dict[str, Any]) -> None:
    found = headline_layers(Report.model_validate(told))
    assert found is not None and (found.runtime, found.batch_size) == ("ort-cpu", 8)
    told["layers"] = [entry("ort-cpu", 1), entry("torch", 8)]
    found = headline_layers(Report.model_validate(told))
    assert found is not None and (found.runtime, found.batch_size) == ("ort-cpu", 1)
    assert headline_layers(Report.model_validate(told | {"layers": []})) is None


def test_the_profile_is_held_against_the_measurement(told: dict[str, Any]) -> None:
    shares = profiled_share(Report.model_validate(told).layers[0])
    assert re.findall(r"[\d.]+ %", shares) == ["102.7 %", "97.7 %"]
