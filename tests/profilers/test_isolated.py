"""How often files are loaded, and what workers are told. What measures is tested with `compare`."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from profilers import ProfileConfig, Variant, compare, isolated, layer_profile, layers, loads_for


@pytest.mark.parametrize(
    ("runtime", "sizes", "loads"),
    [
        ("ort-cpu", (10, 10, 5), 3),
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
    monkeypatch.setattr(isolated, "_LOADED_BYTES", 100)
    files = [tmp_path / str(i) for i in range(len(sizes))]
    for file, size in zip(files, sizes, strict=True):
        file.write_bytes(bytes(size))
    assert loads_for(runtime, files) == loads


@pytest.mark.parametrize("tf32", [False, True])
def test_tf32_reaches_the_workers(tf32: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, sample = tmp_path / "net.onnx", {"x": np.zeros((1, 2), np.float32)}
    file.touch()
    specs: list[dict[str, Any]] = []

    def run_worker(module: str, spec: dict[str, Any], *_: object) -> dict[str, Any]:
        specs.append(spec)
        if module == "profilers.layer_worker":
            return {"rows": [], "total_ms": 1.0, "profiled_ms": 1.0}
        turns = {name: [[1.0, 1.1], [1.0, 1.2]] for name in spec["variants"]}
        return {"samples_ms": turns, "converged": True, "peak_rss_mib": 1.0, "loads": 1}

    monkeypatch.setattr(isolated, "run_worker", run_worker)
    monkeypatch.setattr(layers, "run_worker", run_worker)
    config = ProfileConfig(runtimes=("ort-cuda",), batch_sizes=(1,), tf32=tf32)
    found = compare(Variant(file), Variant(file), sample, config)
    layer_profile("ort-cuda", file, sample, [], batch_size=1, tf32=tf32)
    assert [spec["tf32"] for spec in specs] == [tf32, tf32]
    assert found.protocol["tf32"] is tf32
