"""The page: complete, self-contained, escaped, and with pictures that are valid inside it."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections import Counter
from html.parser import HTMLParser
from typing import Any

import pytest
from pydantic import ValidationError

from optin_deploy.report import Report, plots
from optin_deploy.report.web_page import render

VOID = {"meta", "br", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Collects what the tests ask about, and checks that every element is closed in its place."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: Counter[str] = Counter()
        self.references: list[str] = []
        self.tags: Counter[str] = Counter()
        self.headings: list[str] = []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in VOID:
            self.open.append(tag)
        self.handle_startendtag(tag, attrs)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags[tag] += 1
        for name, value in attrs:
            if name == "id":
                self.ids[value or ""] += 1
            if name.split(":")[-1] in ("href", "src", "srcset", "data", "action"):
                self.references.append(value or "")
            assert not name.startswith("on")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings.append(data)


def test_every_section_is_there(report: Report) -> None:
    text = render(report)
    page = Page(text)
    assert page.headings == [
        "deit_small_patch16_224",
        "Size",
        "Speed",
        "Latency of every run",
        "Throughput over batch size",
        "Architecture",
        "Left dense",
        "Outputs",
        "Evaluation",
        "Gates",
        "Parity of the exported files with torch",
        "Environment",
        "How it was measured",
        "How it was made",
        "Model",
        "Calibration",
        "Time taken",
        "Settings",
    ]
    assert page.tags["svg"] == 4 + 2 + 2
    for expected in ("prune-export", "batch 8", "A/A noise", "Realised ratio", "1.32.0", "batch × 3 × 224"):
        assert expected in text


def test_lists_are_no_shapes_and_settings_promise_nothing(data: dict[str, Any]) -> None:
    data["settings"] = {"batch_sizes": [1, 8], "runtimes": ["ort-cpu", "torch"], "opset": 20, "threads": None}
    text = render(Report.model_validate(data))
    assert "<td>1, 8</td>" in text and "<td>ort-cpu, torch</td>" in text and "<td>batch × 3 × 224 × 224</td>" in text
    assert ">threads</th><td>—" not in text


def test_the_page_asks_for_nothing_outside_itself(report: Report) -> None:
    text = render(report)
    page = Page(text)
    assert page.tags["script"] == page.tags["link"] == page.tags["img"] == page.tags["iframe"] == 0
    assert all(reference.startswith("#") for reference in page.references)
    assert set(re.findall(r"url\((.)", text)) <= {"#"}
    assert "@import" not in text


def test_ids_are_unique_and_references_lead_somewhere(report: Report) -> None:
    text = render(report)
    page = Page(text)
    assert max(page.ids.values()) == 1
    targets = [reference[1:] for reference in page.references] + re.findall(r"url\(#([^)]+)\)", text)
    assert targets and set(targets) <= set(page.ids)


def test_every_text_of_the_report_is_escaped(data: dict[str, Any]) -> None:
    evil = "<script>alert(1)</script>\"'<img src=x onerror=alert(1)>"
    data["model"] |= {"name": evil, "library": evil, "weights": evil, "inputs": {evil: [evil, 1]}}
    data["command"] = data["calibration"]["source"] = data["environment"]["cpu"] = evil
    data["settings"] = {evil: {evil: [evil]}}
    data["warnings"] = [evil]
    data["left_dense"][0] |= {"module": evil, "reason": evil}
    data["agreement"][0]["output"] = data["parity"][0]["output"] = data["gates"][0]["detail"] = evil
    data["evaluation"] |= {"metric": evil, "dataset": evil}
    data["stage_seconds"] = {evil: 1.0}
    for item in data["profile"][:2]:
        item["runtime"] = evil
    page = Page(render(Report.model_validate(data)))
    assert page.tags["script"] == page.tags["img"] == 0


def test_an_empty_run_still_makes_a_page(data: dict[str, Any]) -> None:
    for key in ("plan", "left_dense", "agreement", "parity", "profile", "gates"):
        data[key] = []
    data |= {"evaluation": None, "protocol": {}, "environment": {}, "settings": {}, "stage_seconds": {}}
    text = render(Report.model_validate(data))
    assert Page(text).tags["svg"] == 0
    assert "not measured" in text.lower()


def test_modules_left_dense_for_one_reason_share_a_row(data: dict[str, Any]) -> None:
    data["left_dense"] = [{"module": "blocks.*.mixer", "reason": "unknown", "flops_share": 0.312, "count": 12}]
    text = render(Report.model_validate(data))
    assert "blocks.*.mixer (12)" in text and "31.2 %" in text


def test_lower_precision_has_its_evaluation_beside(data: dict[str, Any]) -> None:
    data["precision"] = "bf16"
    data["evaluation"]["deployed"] = 76.41
    page = render(Report.model_validate(data))
    assert "<th>Pruned, bf16</th>" in page and "<td>76.41</td>" in page
    assert re.search(r"bf16[^<]*fp32", page)


def test_figures_of_a_gpu_have_a_list(data: dict[str, Any]) -> None:
    assert "On the GPU" not in render(Report.model_validate(data))
    data["profile"][0]["device_ms"] = {"dense": 12.34, "dense_again": 12.3, "pruned": 7.89}
    data["profile"][0]["gpu"] = {"watched": True, "mean_power_w": 312.4, "max_power_w": 402.0, "reasons": ["<b>"]}
    page = render(Report.model_validate(data))
    assert "On the GPU" in Page(page).headings
    assert "on the device 12.3 → 7.89 ms, 312 W (at most 402), clocks limited by: &lt;b&gt;</li>" in page


def test_sparsity_without_fewer_flops_has_no_realised_ratio(data: dict[str, Any]) -> None:
    found = {"pattern": "2:4", "maps": 36, "zeros": 0.5, "flops_share": 0.891, "left_dense": []}
    data |= {"sparsity": found, "pruned": data["dense"]}
    text = render(Report.model_validate(data))
    Page(text)
    assert "2:4 in 36 linear" in text and "unchanged, weights 2:4 sparse" in text
    assert "ealised ratio is" not in text and "speed-up ÷ FLOP reduction" not in text


def test_random_weights_hide_the_agreement_from_the_tiles(data: dict[str, Any]) -> None:
    data["model"]["weights"] = "random"
    text = render(Report.model_validate(data))
    assert "banner alarm" in text
    tiles = text[text.index('class="verdict"') : text.index("<h2>Size")]
    assert "cosine" not in tiles.lower() and "top-1" not in tiles
    assert text.lower().index("random weights") < text.index('class="verdict"')


def test_pictures_are_valid_and_the_same_every_time(report: Report) -> None:
    for draw in (
        lambda: plots.latency(report.profile[0]),
        lambda: plots.throughput(report.profile[:2]),
        lambda: plots.architecture(report.plan[:12], "Heads"),
    ):
        picture = draw()
        root = ET.fromstring(picture)
        ids = Counter(element.get("id") for element in root.iter() if element.get("id"))
        assert max(ids.values()) == 1
        assert draw() == picture
        assert "currentColor" in picture
        assert "<text" in picture and "#000000" not in picture


@pytest.mark.parametrize("layers", [1, 12, 48])
def test_the_architecture_has_two_bars_a_layer(layers: int, report: Report) -> None:
    entries = [report.plan[0].model_copy(update={"layer": i}) for i in range(layers)]
    assert plots.architecture(entries, "Heads").count("clip-path=") == 2 * layers


def test_the_width_of_heads_has_a_picture_of_its_own(data: dict[str, Any]) -> None:
    data["plan"] += [
        {"group": f"blocks.{i}.attn.width", "kind": "width", "layer": i, "units": 64, "kept": 8 * (i + 1)}
        for i in range(3)
    ]
    page = render(Report.model_validate(data))
    assert "Head width kept: 48 of 192" in page
    assert page.index("Attention heads kept") < page.index("Head width kept") < page.index("FFN neurons kept")
    assert 'aria-label="Kept layer by layer; Head width kept: 48 of 192"' in page


def test_channels_have_a_picture_of_their_own(data: dict[str, Any]) -> None:
    data["plan"] = [
        {"group": f"layer1.{i}.conv1", "kind": "channel", "layer": i, "units": 16, "kept": 4 * i} for i in range(3)
    ]
    page = render(Report.model_validate(data))
    assert "Channels kept: 12 of 48" in page
    assert Page(page).tags["svg"] == 4 + 2 + 1


def test_one_sample_is_enough_to_draw(data: dict[str, Any]) -> None:
    item = data["profile"][0]
    item["samples_ms"] = {key: [[5.0]] for key in ("dense", "dense_again", "pruned")}
    same = {"p50_ms": 5.0, "p90_ms": 5.0, "p99_ms": 5.0, "mean_ms": 5.0, "min_ms": 5.0, "count": 1}
    item["summary"] = dict.fromkeys(("dense", "dense_again", "pruned"), same)
    picture = plots.latency(Report.model_validate(data).profile[0])
    assert ET.fromstring(picture).tag.endswith("svg") and "nan" not in picture


def test_parity_tells_what_ran_the_file(data: dict[str, Any]) -> None:
    # Of reports written before engines were checked.
    assert "runtime" not in data["parity"][0]
    data["parity"][1]["runtime"] = "rtx"
    page = render(Report.model_validate(data))
    rows = page[page.index("Parity of the exported files") :].split("</table>")[0]
    assert rows.count("ONNX Runtime") == 1 and rows.count("TensorRT for RTX") == 1


def test_pictures_stand_in_the_page_and_nothing_else_can(data: dict[str, Any]) -> None:
    png = "iVBORw0KGgoAAAANSUhEUg=="
    data["pictures"] = [{"output": "<map>", "image": None, "dense": png, "pruned": png}]
    page = render(Report.model_validate(data))
    assert page.count(f'src="data:image/png;base64,{png}"') == 2
    assert "<map>" not in page
    data["pictures"][0]["dense"] = 'iVBORw0KGgo" onerror="alert(1)'
    with pytest.raises(ValidationError):
        Report.model_validate(data)


def test_parity_tells_in_how_many_samples_rounding_decided(data: dict[str, Any]) -> None:
    assert "Decided by rounding" not in render(Report.model_validate(data))
    data["parity"][1] |= {"samples": 12, "near_ties": 2}
    page = render(Report.model_validate(data))
    rows = page[page.index("Parity of the exported files") :].split("</table>")[0]
    assert "<th>Decided by rounding</th>" in rows and "<td>2 of 12</td>" in rows and "<td>0 of 0</td>" in rows
