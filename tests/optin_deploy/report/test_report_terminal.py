"""The terminal's table, and how figures are written."""

from __future__ import annotations

from io import StringIO
from typing import Any

import pytest
from rich.console import Console

from optin_deploy.report import Report
from optin_deploy.report.terminal import summary
from optin_deploy.utils import formatting
from profilers import Interval


def shown(report: Report) -> str:
    console = Console(file=StringIO(), width=200)
    console.print(summary(report))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_it_fits_100_columns_and_has_every_figure(data: dict[str, Any]) -> None:
    data["profile"][3] |= {"runtime": "torch-cuda", "significant": False}
    data["profile"][1]["batch_size"] = 1024
    data["profile"][3]["device_ms"] = {"dense": 12.34, "dense_again": 12.3, "pruned": 7.89}
    data["profile"][3]["gpu"] = {"watched": False, "unwatched_because": "NVML says: " + "no driver, " * 10}
    data["calibration"]["builtin"] = True
    data["agreement"][0]["output"] = "last_hidden_state"
    report = Report.model_validate(data)
    text = shown(report)
    table = text[: text.rindex("faster at batch")].splitlines()[:-1]
    assert max(len(line.rstrip()) for line in table) <= 100
    for figure in (
        "9.20 G",
        "−50.2 %",
        "10.9 M",
        "41.7 MiB",
        "p99 ms",
        "samples/s",
        f"{report.profile[0].speedup.value:.2f}×",
        "~noise",
        "cosine 0.9731",
        "12.3 → 7.89 ms",
        "NVML says: no driver",
    ):
        assert figure in text
    assert all(fact in text for fact in ("79.84 → 76.92", "ImageNet-1k val"))
    assert text.lower().index("built-in") < text.index("FLOPs")


def test_sparsity_alone_has_a_dash_for_the_realised_ratio(data: dict[str, Any]) -> None:
    found = {"pattern": "2:4", "maps": 36, "zeros": 0.5, "flops_share": 0.891, "left_dense": []}
    text = shown(Report.model_validate(data | {"sparsity": found, "pruned": data["dense"]}))
    assert "2:4" in text and "36" in text
    assert all(
        line.rstrip().endswith("—") for line in text.splitlines() if line.strip().startswith("pruned") and "×" in line
    )


def test_markup_in_names_is_shown_and_not_obeyed(data: dict[str, Any]) -> None:
    data["model"]["name"] = "net[bold]x[/nonsense]"
    data["agreement"][0]["output"] = data["profile"][0]["runtime"] = "[red]y[/nonsense]"
    text = shown(Report.model_validate(data))
    assert "net[bold]x[/nonsense]" in text
    assert text.count("[red]y[/nonsense]") >= 2


@pytest.mark.parametrize(
    ("value", "text"), [(9.2e9, "9.20 G"), (22_050_664, "22.1 M"), (999, "999"), (0, "0"), (1.5e12, "1.50 T")]
)
def test_counts(value: float, text: str) -> None:
    assert formatting.scaled(value) == text


@pytest.mark.parametrize(
    ("value", "text"), [(0.012345, "0.0123"), (1.2345, "1.23"), (123.45, "123"), (12345.6, "12346"), (0, "0")]
)
def test_significant_digits(value: float, text: str) -> None:
    assert formatting.significant(value) == text


def test_infinite_figures_are_written_as_such() -> None:
    assert formatting.significant(float("inf")) == formatting.scientific(float("inf")) == "inf"


def test_changes_and_noise_have_their_sign() -> None:
    assert formatting.change(2, 1) == "−50.0 %"
    assert formatting.change(1, 1.5) == "+50.0 %"
    assert formatting.noise(Interval(value=1.0, low=0.96, high=1.03)) == "±4.0 %"


def test_what_was_left_dense_is_named_with_its_share(data: dict[str, Any]) -> None:
    known = {"module": "blocks.*.mixer", "reason": "a Mixer, which no adapter knows", "flops_share": 0.3, "count": 12}
    small = [{"module": f"m{i}", "reason": "a Conv2d in no prunable group", "flops_share": 0.01} for i in range(6)]
    text = shown(Report.model_validate(data | {"left_dense": [known, *small]}))
    assert "36.0 %" in text
    assert "blocks.*.mixer (12)" in text and "30.0 %" in text and "a Mixer, which no adapter knows" in text
    assert "2 more" in text and "2.0 %" in text
