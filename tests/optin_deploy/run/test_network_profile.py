"""`optin-deploy profile`: one small network measured for real, and how it is told."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console, RenderableType

from optin_deploy.analysis.module_roles import ATTENTION, FFN, PARTS
from optin_deploy.cli.main import main
from optin_deploy.config.recipe import Recipe
from optin_deploy.report.profile_tables import LatencyTables, NetworkProfile, render_latency_tables, render_profile
from optin_deploy.run import network_profile
from optin_deploy.run.network_profile import run_profile, run_tables
from profilers.table_cache import cache_folder, cached_settings

QUICK: dict[str, Any] = {"batch_size": 2, "threads": 1, "profile_seconds": 0.5, "table_seconds": 0.3}
pytestmark = [pytest.mark.usefixtures("quick_tables"), pytest.mark.slow]
Told = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def profiled(shallow: str) -> NetworkProfile:
    return run_profile(Recipe(model=shallow, **QUICK), quiet=True)


@pytest.fixture(scope="module")
def tables(shallow: str) -> LatencyTables:
    return run_tables(Recipe(model=shallow, **QUICK), quiet=True)


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Told:
    """The command line: exit code, output and errors."""

    def tell(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["optin-deploy", *arguments])
        with pytest.raises(SystemExit) as stopped:
            main()
        return int(stopped.value.code or 0), *capsys.readouterr()

    return tell


def shown(view: RenderableType) -> str:
    stream = StringIO()
    Console(file=stream, width=200).print(view)
    return stream.getvalue()


# One network as it is


def test_parts_sum_to_the_median(profiled: NetworkProfile) -> None:
    assert (profiled.runtime, profiled.batch_size, profiled.threads) == ("ort-cpu", 2, 1)
    assert sum(part.ms for part in profiled.parts) == pytest.approx(profiled.summary.p50_ms)
    names = [part.name for part in profiled.parts]
    assert {ATTENTION, FFN} < set(names)
    assert len(set(names)) == len(names)
    assert names[-1] == "between operators"
    assert names[:-1] == [name for name in PARTS if name in names]
    assert all(part.ms >= 0 for part in profiled.parts)
    assert profiled.throughput_per_s == pytest.approx(2000 / profiled.summary.mean_ms)


def test_a_profile_as_text(profiled: NetworkProfile) -> None:
    text = shown(render_profile("shallow", profiled))
    assert max(map(len, map(str.rstrip, text.splitlines()))) <= 100
    assert all(fact in text for fact in ("shallow", "ONNX Runtime", "batch 2", "1 thread"))
    for part in profiled.parts:
        assert part.name in text


def test_a_runtime_without_layers_says_so(shallow: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(network_profile, "LAYER_RUNTIMES", ())
    found = run_profile(Recipe(model=shallow, **QUICK), quiet=True)
    assert found.parts == ()
    assert "no profile" in shown(render_profile("shallow", found))


def test_a_profile_as_json(shallow: str, told: Told) -> None:
    options = ("--batch-size", "2", "--threads", "1", "--profile-seconds", "0.3", "--json", "--quiet")
    code, output, _ = told("profile", "--model", shallow, *options)
    assert code == 0
    found = json.loads(output)
    assert set(found) == {"runtime", "batch_size", "threads", "summary", "parts", "throughput_per_s"}
    assert found["summary"]["p50_ms"] > 0


# Its tables


def test_tables_of_every_part(tables: LatencyTables) -> None:
    assert tables.cached == 0
    assert 0 < tables.floor_ms < tables.dense_ms
    assert [part.blocks for part in tables.parts] == [1, 1]
    for part in tables.parts:
        dense = part.rows[-1]
        assert [row.units for row in part.rows] == sorted(row.units for row in part.rows)
        assert dense.block_ms == pytest.approx(part.dense_block_ms * dense.of_dense)
        assert all(row.spread >= 0 for row in part.rows)


def test_tables_are_kept_and_listed(tables: LatencyTables, shallow: str, told: Told) -> None:
    again = run_tables(Recipe(model=shallow, **QUICK), quiet=True)
    assert again.cached == len(cached_settings()) == 1
    assert [[row.units for row in part.rows] for part in again.parts] == [
        [row.units for row in part.rows] for part in tables.parts
    ]
    code, output, _ = told("profile", "--table")
    assert code == 0
    assert str(cache_folder()) in "".join(output.split())
    assert "ort-cpu" in output
    code, output, _ = told("profile", "--table", "--json")
    assert json.loads(output) == cached_settings()


def test_tables_as_text_and_json(tables: LatencyTables) -> None:
    text = shown(render_latency_tables("shallow", tables))
    assert max(map(len, map(str.rstrip, text.splitlines()))) <= 100
    assert "prunable" in text
    assert text.count("edge") == sum(row.edge for part in tables.parts for row in part.rows)
    assert json.loads(json.dumps(tables.to_dict()))["parts"][0]["rows"]


def test_an_empty_cache_says_how_to_fill_it(told: Told, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    code, output, _ = told("profile", "--table")
    assert code == 0
    assert "no latency tables" in output
    assert "--model" in output


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model"),
        (["--table", "--batch-size", "8"], "--batch-size .*--model"),
        (["--model", "deit_tiny", "--table-seconds", "5"], "--table-seconds 5.* with --table"),
        (["--model", "x", "--table", "--profile-seconds", "5"], "--profile-seconds 5.* without"),
        (["--model", "deit_tiny", "--runtime", "abacus"], "abacus"),
        (["--model", "deit_tiny", "--runtime", "tensorrt"], "tensorrt"),
        (["--model", "deit_tiny", "--batch-size", "0"], "--batch-size 0"),
        (["--model", "no_such_network"], "no_such_network"),
    ],
)
def test_bad_options_end_with_2(told: Told, arguments: list[str], message: str) -> None:
    code, output, errors = told("profile", *arguments, "--quiet")
    assert (code, output) == (2, "")
    assert len(errors.strip().splitlines()) == 1
    assert re.search(message, errors)
