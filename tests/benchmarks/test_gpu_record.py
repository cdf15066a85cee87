import sys
import time
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import pytest

# The benchmarks are scripts: they import each other by name.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from gpu import table
from gpu.record import Record, attempt, opened

BASIS = {"device": "cpu", "torch": "2", "tiny": True}
KEYS = ["scoring/a/trajectory", "latency/a/fp16/torch/1", "latency/a/fp16/torch/2"]


def record(folder: Path, planned: Sequence[str] = KEYS, seconds: float = 60, **basis: Any) -> Record:
    facts = {"unavailable": {"rtx": "it is not installed"}}
    return opened(folder, {**BASIS, **basis}, facts, planned, perf_counter() + seconds)


def test_the_next_call_goes_on_and_tries_again_what_failed(tmp_path: Path) -> None:
    first = record(tmp_path)
    attempt(first, KEYS[:1], 10, lambda _: {KEYS[0]: {"seconds": 1.0}})
    attempt(first, KEYS[1:2], 10, lambda _: {KEYS[1]: "no luck"})
    assert (first.failed, first.not_measured) == ({KEYS[1]: "no luck"}, {KEYS[2]: "out of time"})
    assert first.open(KEYS) == KEYS[2:]
    assert record(tmp_path).open(KEYS) == KEYS[1:]
    # Another call that plans less keeps what it does not plan.
    fewer = record(tmp_path, KEYS[:1])
    assert (list(fewer.rows), fewer.failed, list(fewer.not_measured)) == (KEYS[:1], {KEYS[1]: "no luck"}, KEYS[2:])


@pytest.mark.parametrize("basis", [{"device": "h100"}, {"torch": "3"}, {"tiny": False}])
def test_figures_of_another_device_or_torch_are_not_mixed(tmp_path: Path, basis: dict[str, Any]) -> None:
    attempt(record(tmp_path), KEYS[:1], 10, lambda _: {KEYS[0]: {"seconds": 1.0}})
    assert record(tmp_path, **basis).open(KEYS) == KEYS


def test_a_case_that_raises_or_takes_too_long_has_failed_and_the_next_one_runs(tmp_path: Path) -> None:
    kept = record(tmp_path)

    def broken(_: float) -> dict[str, Any]:
        raise RuntimeError("first line\nsecond line")

    def stubborn(_: float) -> dict[str, Any]:
        try:
            time.sleep(30)
        except Exception:
            pytest.fail("time being up was taken for an error")
        return {}

    attempt(kept, KEYS[:1], 10, broken)
    attempt(kept, KEYS[1:2], 0.05, stubborn)
    attempt(kept, KEYS[2:], 10, lambda seconds: {KEYS[2]: {"seconds": seconds}})
    assert kept.failed == {KEYS[0]: "first line", KEYS[1]: "took longer than 0 s"}
    assert kept.rows == {KEYS[2]: {"seconds": 10}}
    # A kill after this loses nothing.
    assert record(tmp_path, []).rows == kept.rows


def test_a_case_cut_short_by_the_end_of_the_run_was_not_measured(tmp_path: Path) -> None:
    kept = record(tmp_path, seconds=0.05)
    attempt(kept, KEYS[:1], 10, lambda _: time.sleep(30) or {})
    attempt(kept, KEYS[1:2], 10, lambda _: pytest.fail("begun after the end"))
    assert (kept.rows, kept.failed, list(kept.not_measured)) == ({}, {}, KEYS)


def test_the_table_lists_what_is_missing(tmp_path: Path) -> None:
    kept = record(tmp_path, device="h100", tiny=False)
    scored = {"network": "a", "method": "trajectory-exact", "units": 1000, "samples": 128, "seconds": 12.345}
    attempt(kept, KEYS[:1], 10, lambda _: {KEYS[0]: {**scored, "measured_units": 20}})
    path = kept.save().rename(tmp_path / "gpu.json")
    (tmp_path / "h100").mkdir()
    path.rename(tmp_path / "h100" / "gpu.json")
    lines = table.of_folder(tmp_path).splitlines()
    assert lines[0].startswith("h100, torch 2")
    assert "| a | trajectory, exact | 1,000 | 128 | 12.3 | 20 units on one batch |" in lines
    assert "- Not available, it is not installed: rtx" in lines
    assert lines[-1] == "- Not measured, out of time: latency/a/fp16/torch 1·2"
