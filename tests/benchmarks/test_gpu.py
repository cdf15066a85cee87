import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

# The benchmarks are scripts: they import each other by name.
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from gpu import cases, main, networks, table, worker
from gpu.cases import FULL, TINY, Case

from exporters import onnx_from_program, trace
from profilers import GPU_RUNTIMES, RUNTIMES
from profilers import Case as MeasureCase
from profilers.measure import LatencySpec, NetworkFiles
from profilers.worker_process import SavedFeeds

pytestmark = pytest.mark.slow

SCRIPT = Path(main.__file__).parents[1] / "gpu.sh"
NEEDED = ["scoring/tiny_vit/trajectory-obs", "pruning/tiny_vit", "latency/tiny_vit/fp16/torch/1"]


def call(results: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """The shell script, as on a machine that has neither pydantic nor, on its path, this package."""
    absent = results / "absent"
    absent.mkdir(exist_ok=True)
    (absent / "pydantic.py").write_text("raise ModuleNotFoundError(\"No module named 'pydantic'\", name='pydantic')\n")
    return subprocess.run(
        ["sh", str(SCRIPT), "--results", str(results), *options],
        env={**os.environ, "PYTHON": sys.executable, "PYTHONPATH": str(absent), "OMP_NUM_THREADS": "1"},
        cwd=results,
        capture_output=True,
        text=True,
    )


def figures(results: Path) -> dict[str, Any]:
    (path,) = results.glob("*/gpu.json")
    return json.loads(path.read_text())["figures"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="it would be measured under the GPU's name")
def test_from_one_command_to_the_table_and_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--tiny", "--networks", "tiny_vit", "--precisions", "fp16"]
    first = call(tmp_path, *options, "--batch-sizes", "1")
    assert first.returncode == 0, first.stderr
    found = figures(tmp_path)
    assert (found["failed"], found["not_measured"], found["unavailable"]) == ({}, {}, {})
    assert set(NEEDED) < set(found["rows"])
    exact = found["rows"]["scoring/tiny_vit/trajectory-exact"]
    assert (exact["samples"], exact["measured_units"]) == (8, 4)
    assert 0.49 < found["rows"]["pruning/tiny_vit"]["flops"] <= 0.5
    for runtime in ("ort-cpu", "torch"):
        row = found["rows"][f"latency/tiny_vit/fp16/{runtime}/1"]
        assert row["summary"]["dense"]["p50_ms"] > 0 and "samples_ms" not in row
        assert row["realised"] == pytest.approx(row["speedup"]["value"] * row["flops"])
        assert row["noise"]["low"] <= row["noise"]["value"] <= row["noise"]["high"]
        assert f"| tiny_vit | fp16 | {runtime} | 1 |" in first.stdout

    assert main.main(["--results", str(tmp_path), *options, "--minutes", "0"]) == 0
    told = capsys.readouterr().out
    later = figures(tmp_path)
    assert later["rows"] == found["rows"]
    assert later["not_measured"] == {f"latency/tiny_vit/fp16/{r}/2": "out of time" for r in ("ort-cpu", "torch")}
    assert "Not measured, out of time: latency/tiny_vit/fp16/ort-cpu 2, latency/tiny_vit/fp16/torch 2" in told


def test_without_a_gpu_one_line_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit) as ended:
        main.main([])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "torch sees no CUDA device: run this on a machine with one, or --tiny for a trial on the CPU"
    ]


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--tiny"], "--tiny measures nothing that is worth keeping: give --results DIR"),
        (["--batch-sizes", "3"], "--batch-sizes 3: choose from 1, 2"),
        (["--networks", "bert"], "--networks bert: choose from tiny_vit, tiny_bert"),
    ],
)
def test_a_wrong_option_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], line: str
) -> None:
    with pytest.raises(SystemExit) as ended:
        main.main(options if options == ["--tiny"] else ["--tiny", "--results", str(tmp_path), *options])
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines() == [line]


def test_where_nothing_was_measured_the_call_fails(tmp_path: Path) -> None:
    assert main.main(["--tiny", "--results", str(tmp_path), "--minutes", "0"]) == 1
    assert list(figures(tmp_path)["not_measured"]) == cases.planned(TINY)


def test_without_results_the_table_is_a_sentence(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["--table", "--results", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip() == table.NOTHING


def test_what_matters_comes_first_and_nothing_twice() -> None:
    keys = cases.planned(FULL)
    assert len(set(keys)) == len(keys)
    assert keys[0].startswith("scoring/deit_small")
    assert {case.runtime for case in cases.cases(FULL)} == set(GPU_RUNTIMES)
    first, last = cases.cases(FULL)[0], cases.cases(FULL)[-1]
    assert (first.network, first.precision, first.batch_sizes[:3]) == ("deit_small", "fp16", (1, 32, 256))
    assert last.runtime == "torch-compile-cuda"
    assert {name for case in cases.cases(FULL) for name in [case.network]} <= set(networks.NETWORKS)


def test_runtimes_that_are_not_there_are_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    setup, lacking = cases.available(FULL)
    assert "tensorrt" in lacking and "ort-cuda" in lacking
    assert not {way.runtime for way in (*setup.ways, *setup.last)} & set(lacking)
    assert cases.available(TINY) == (TINY, {})


def test_every_unit_on_every_batch_is_not_extrapolated() -> None:
    row = networks.scoring_row("tiny_bert", "trajectory-exact", "cpu", 4, 4, 100)
    assert row["measured_units"] == row["units"] == 4 + 64
    assert table.in_a_line(row).endswith(" s")
    assert table.in_a_line({**row, "measured_units": 2}).endswith("(extrapolated)")


def test_a_text_network_is_pruned_to_half_on_random_words() -> None:
    network = networks.NETWORKS["tiny_bert"]()
    batches = networks.random_batches(network, 8, 4)
    assert [tuple(batch["input_ids"].shape) for batch in batches] == [(4, 16)] * 2
    assert len(batches[0]["input_ids"].unique()) > 10 and not torch.equal(*(b["input_ids"] for b in batches))
    assert all(bool(batch["attention_mask"].all()) for batch in batches)
    pair, row = networks.pruned_pair("tiny_bert", "cpu", 8, 4, 8)
    assert 0.49 < row["flops"] == pair.flops <= 0.5
    assert (row["samples"], pair.pruned.inputs.keys()) == (8, network.inputs.keys())


def spec(folder: Path, sizes: tuple[int, ...], stop_after_s: float = 60) -> worker.GpuSpec:
    """Of a linear layer in ONNX Runtime."""
    import numpy as np

    axes = {"input": {0: "batch"}}
    program = trace(torch.nn.Linear(8, 4), {"input": torch.zeros(2, 8)}, axes)
    onnx_from_program(program, folder / "net.onnx", output_names=("y",), dynamic_axes=axes)
    feeds = SavedFeeds.save(folder / "feeds.npz", {"input": np.zeros((1, 8), np.float32)})
    networks = dict.fromkeys(("dense", "dense_again", "pruned"), NetworkFiles((folder / "net.onnx",), feeds))
    pairs = (("dense", "pruned"), ("dense", "dense_again"))
    rounds = LatencySpec("measuring", 1, MeasureCase("ort-cpu", 1, threads=1, seconds=0.05), networks, pairs)
    return worker.GpuSpec("measuring", 1, rounds, sizes, stop_after_s)


def test_one_process_measures_all_sizes_and_outlives_one_that_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load = SavedFeeds.load

    def short_of_memory(self: SavedFeeds, size: int) -> Any:
        if size == 3:
            raise RuntimeError("CUDA out of memory\nsome advice")
        feeds = load(self, size)
        assert feeds["input"].shape == (size, 8)
        return feeds

    monkeypatch.setattr(SavedFeeds, "load", short_of_memory)
    result = worker.measure(spec(tmp_path, (2, 3, 1)))
    assert list(result.samples) == ["2", "1"]
    assert result.failed == {"3": "RuntimeError: CUDA out of memory"}
    assert set(result.samples["1"].samples_ms) == {"dense", "dense_again", "pruned"}
    assert len(result.samples["1"].samples_ms["dense"]) >= 5


def test_sizes_that_there_is_no_time_for_are_not_begun(tmp_path: Path) -> None:
    assert worker.measure(spec(tmp_path, (1, 2), stop_after_s=0)) == worker.GpuResult()


def test_a_case_names_its_measurements() -> None:
    case = Case("deit_small", "fp16", "ort-cuda", (1, 32))
    assert case.sizes == {"latency/deit_small/fp16/ort-cuda/1": 1, "latency/deit_small/fp16/ort-cuda/32": 32}
    assert case.runtime in RUNTIMES
    fewer = cases.narrowed(FULL, {"runtimes": "ort-cuda", "batch_sizes": "32,1", "precisions": "fp16"})
    assert [c for c in cases.cases(fewer) if c.network == "deit_small"] == [case]
