"""How often files are loaded. What measures them is tested with `compare`."""

from pathlib import Path

import pytest

from profilers import isolated, loads_for


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
