"""How often files are loaded, in which order builds run, and what the specs of workers hold.

The measurement itself is tested with `compare`.
"""

from collections.abc import Callable
from pathlib import Path

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

pytestmark = pytest.mark.slow


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
    """In which order is tested in test_worker.py, by a clock of its own."""
    first, second = mlp_onnx(32), mlp_onnx(48)
    case = Case("ort-cpu", 4, 1, seconds=0.1, loads=loads)
    found = measure_files({"one": first, "several": (second, first)}, sample, case, ())
    assert found.loads == loads
    assert len(found.samples_ms["several"]) == len(found.samples_ms["one"]) >= 2 * loads
    assert len(Builds.from_turns(found.samples_ms["several"], 2).p50_ms) == 2


def test_a_build_that_is_not_there_is_told(mlp_onnx: Callable[[int], Path], sample: Feeds, tmp_path: Path) -> None:
    with pytest.raises(ProfilingError, match=r"several.*none\.onnx does not exist"):
        measure_files({"several": (mlp_onnx(32), tmp_path / "none.onnx")}, sample, Case("ort-cpu", 1, 1, 0.1), ())
