"""How often files are loaded, in which order builds run, and what the specs of workers hold.

The measurement itself is tested with `compare`.
"""

from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np
import pytest

from profilers import (
    Case,
    ProfileConfig,
    ProfilingError,
    RawSamples,
    Variant,
    compare,
    layer_profile,
    layer_times,
    loads_for,
    measure,
    measure_files,
)
from profilers.layer_times import LayerProfile, LayerSpec
from profilers.measure import LatencySpec
from profilers.results import Builds
from profilers.runners.base import Feeds


@pytest.mark.parametrize(
    ("runtime", "sizes", "loads"),
    [
        ("ort-cpu", (5, 5, 2), 6),
        ("ort-cpu", (10, 10, 5), 4),
        ("ort-cuda", (10, 10, 5), 1),
        ("ort-cpu", (20, 20, 10), 2),
        ("ort-cpu", (50, 50, 20), 1),
        ("ort-cpu", (1000,), 1),
        ("ort-cpu", (), 1),
        ("torch", (1,), 1),
    ],
)
def test_files_are_loaded_as_often_as_memory_allows(
    runtime: str, sizes: tuple[int, ...], loads: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_LOADED_BYTES", 100)
    files = [tmp_path / str(i) for i in range(len(sizes))]
    for file, size in zip(files, sizes, strict=True):
        file.write_bytes(bytes(size))
    assert loads_for(runtime, files) == loads


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_reaches_the_workers(tf32: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, sample = tmp_path / "net.onnx", {"x": np.zeros((1, 2), np.float32)}
    file.touch()
    specs: list[LatencySpec | LayerSpec] = []

    def run_worker(module: str, spec: LatencySpec | LayerSpec, *_: object) -> RawSamples | LayerProfile:
        specs.append(spec)
        if isinstance(spec, LayerSpec):
            return LayerProfile("ort-cuda", 1, (), 1.0, 1.0)
        return RawSamples({name: [[1.0, 1.1], [1.0, 1.2]] for name in spec.networks}, True, 1.0)

    monkeypatch.setattr(measure, "run_worker", run_worker)
    monkeypatch.setattr(layer_times, "run_worker", run_worker)
    config = ProfileConfig(runtimes=("ort-cuda",), batch_sizes=(1,), tf32=tf32)
    found = compare(Variant(file), Variant(file), sample, config)
    layer_profile(Case("ort-cuda", 1, 1, 1.0, tf32=tf32), file, sample, [])
    assert [spec.case.tf32 for spec in specs] == [tf32, tf32]
    assert found.protocol["tf32"] is tf32


@pytest.mark.parametrize("loads", [1, 2])
def test_builds_take_turns_round_by_round(loads: int, mlp_onnx: Callable[[int], Path], sample: Feeds) -> None:
    # Of one network they could not be told apart here: a small and a large one stand for a fast and a slow build.
    fast, slow = mlp_onnx(32), mlp_onnx(2048)
    case = Case("ort-cpu", 4, 1, seconds=0.5, loads=loads)
    found = measure_files({"one": fast, "several": (slow, fast)}, sample, case, ())
    assert found.loads == loads
    rounds = np.array([median(turn) for turn in found.samples_ms["several"]])
    assert np.median(rounds[::2]) > 3 * np.median(rounds[1::2])
    builds = Builds.from_turns(found.samples_ms["several"], 2)
    assert builds.p50_ms[0] > 3 * builds.p50_ms[1] and builds.spread > 2


def test_a_build_that_is_not_there_is_told(mlp_onnx: Callable[[int], Path], sample: Feeds, tmp_path: Path) -> None:
    with pytest.raises(ProfilingError, match=r"the several network's file .*none\.onnx does not exist"):
        measure_files({"several": (mlp_onnx(32), tmp_path / "none.onnx")}, sample, Case("ort-cpu", 1, 1, 0.1), ())
