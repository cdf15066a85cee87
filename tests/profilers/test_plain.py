import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from profilers.plain import from_plain, to_json


@dataclass(frozen=True)
class Inner:
    name: str
    file: Path


@dataclass(frozen=True)
class Outer:
    inner: Inner
    rows: tuple[Inner, ...]
    by_name: dict[str, Inner]
    pair: tuple[float, float]
    samples: dict[str, list[list[float]]]
    absent: Inner | None = None
    default: int = 3


def test_json_comes_back_the_same() -> None:
    inner = Inner("a", Path("/a"))
    value = Outer(inner, (inner, inner), {"x": inner}, (1.5, 2.0), {"s": [[1.0], [2.0, 3.0]]})
    assert from_plain(Outer, json.loads(to_json(value))) == value


def test_paths_are_made_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert json.loads(to_json(Inner("a", Path("net.onnx"))))["file"] == str(tmp_path / "net.onnx")


@pytest.mark.parametrize("data", [{}, {"name": "a"}, {"name": "a", "file": "b", "more": 1}, [], "a", None])
def test_other_data_is_an_error(data: object) -> None:
    with pytest.raises(TypeError):
        from_plain(Inner, data)
