import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Self

import numpy as np
import pytest

from profilers import Case
from profilers.measure import LatencySpec, NetworkFiles
from profilers.plain import to_json
from profilers.runners.base import Feeds, Run
from profilers.worker_process import SavedFeeds
from profilers.workers import latency

CASE = Case("ort-cpu", batch_size=2, threads=1, seconds=0.2, loads=2)


def arguments(folder: Path, model: Path, sample: Feeds, case: Case = CASE) -> list[str]:
    """Write a spec and return the worker's arguments."""
    network = NetworkFiles((model,), SavedFeeds.save(folder / "feeds.npz", sample))
    spec = LatencySpec("measuring", 1, case, dict.fromkeys(("dense", "pruned"), network), (("dense", "pruned"),))
    (folder / "spec.json").write_text(to_json(spec))
    return [str(folder / "spec.json"), str(folder / "result.json")]


def test_result_and_progress(
    tmp_path: Path, mlp_onnx: Callable[[int], Path], sample: Feeds, capsys: pytest.CaptureFixture[str]
) -> None:
    assert latency.main(arguments(tmp_path, mlp_onnx(32), sample)) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert set(result) == {"samples_ms", "converged", "peak_rss_mib", "loads", "device_ms", "cuda_graph", "gpu"}
    assert result["device_ms"] is result["cuda_graph"] is result["gpu"] is None
    assert list(result["samples_ms"]) == ["dense", "pruned"]
    assert result["peak_rss_mib"] > 10
    fractions = [json.loads(line)["progress"] for line in capsys.readouterr().out.splitlines()]
    assert fractions == sorted(fractions)
    assert not list(tmp_path.glob("*.tmp"))


@pytest.mark.parametrize(("available", "loads"), [(2**40, 3), (0, 1)])
def test_networks_are_loaded_again_while_there_is_memory(
    available: int,
    loads: int,
    tmp_path: Path,
    mlp_onnx: Callable[[int], Path],
    sample: Feeds,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(latency.psutil, "virtual_memory", lambda: SimpleNamespace(available=available))
    held = iter(range(0, 2**30, 2**20))
    monkeypatch.setattr(
        latency.psutil, "Process", lambda: SimpleNamespace(memory_info=lambda: SimpleNamespace(rss=next(held)))
    )
    assert latency.main(arguments(tmp_path, mlp_onnx(32), sample, replace(CASE, loads=3))) == 0
    assert json.loads((tmp_path / "result.json").read_text())["loads"] == loads


class OnDevice:
    """A pretended runner on a GPU; from the one numbered `uncapturable` on, none can be captured in a graph."""

    opened: ClassVar[list[bool]] = []
    uncapturable: ClassVar[int] = 2

    def __init__(self, runtime: str, path: Path, threads: int, *, tf32: bool, cuda_graphs: bool) -> None:
        self.opened.append(tf32)
        self.cuda_graph = cuda_graphs and len(self.opened) < self.uncapturable

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def prepare(self, feeds: Feeds) -> Run:
        device_ms = 0.5 if self.cuda_graph else 0.75
        return lambda: device_ms


@pytest.mark.parametrize(("uncapturable", "opened", "device_ms"), [(2, 4, 0.75), (3, 2, 0.5)])
def test_variants_are_measured_with_graphs_or_all_without(
    tmp_path: Path,
    mlp_onnx: Callable[[int], Path],
    sample: Feeds,
    monkeypatch: pytest.MonkeyPatch,
    uncapturable: int,
    opened: int,
    device_ms: float,
) -> None:
    monkeypatch.setattr(latency, "open_runner", OnDevice)
    monkeypatch.setattr(OnDevice, "opened", [])
    monkeypatch.setattr(OnDevice, "uncapturable", uncapturable)
    case = replace(CASE, runtime="tensorrt", loads=1, tf32=True)
    assert latency.main(arguments(tmp_path, mlp_onnx(32), sample, case)) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["device_ms"] == {"dense": device_ms, "pruned": device_ms}
    assert result["cuda_graph"] == dict.fromkeys(("dense", "pruned"), device_ms == 0.5)
    assert result["gpu"]["watched"] is False
    assert OnDevice.opened == [True] * opened


def test_an_unforeseen_error_ends_in_one_line(
    tmp_path: Path, mlp_onnx: Callable[[int], Path], sample: Feeds, capsys: pytest.CaptureFixture[str]
) -> None:
    wrong_dtype = {"x": sample["x"].astype(np.int64)}
    assert latency.main(arguments(tmp_path, mlp_onnx(32), wrong_dtype)) == 1
    assert "float" in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "result.json").exists()


def test_the_sample_is_repeated_to_the_batch(tmp_path: Path) -> None:
    # "file" is also the name of a parameter of numpy's.
    feeds = SavedFeeds.save(tmp_path / "feeds.npz", {"file": np.array([[1, 2]]), "b": np.array([[3.0]])}).load(3)
    assert feeds["file"].tolist() == [[1, 2]] * 3
    assert feeds["b"].tolist() == [[3.0]] * 3


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_peak_memory_is_not_inherited_from_the_parent() -> None:
    ballast = np.ones(2**26)  # 512 MiB
    code = "from profilers.workers.latency import peak_rss_mib; print(peak_rss_mib())"
    root = Path(__file__).parents[3]
    child = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert 10 < float(child.stdout) < ballast.nbytes / 2**20
