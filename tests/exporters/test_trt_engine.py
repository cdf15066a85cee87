import importlib.util
import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_runtimes import needs_device
from torch import nn

from exporters import EngineConfig, ExportError, build_engine, check_builder, check_engine, input_ranges, trace
from exporters import onnx_from_program as write_onnx
from exporters.shapes import Range
from exporters.trt_engine import EngineInfo, _sha256, check_opset

pytestmark = pytest.mark.slow


SHAPES = {"ids": (2, 12), "image": (2, 3, 8, 8)}
AXES = {"ids": {0: "batch", 1: "sequence"}, "image": {0: "batch"}}
RTX = EngineConfig("rtx")


def test_an_engine_takes_all_batch_sizes_and_shorter_sequences() -> None:
    assert input_ranges(SHAPES, AXES, (4, 1, 8), 4, static=False) == {
        "ids": Range((1, 1), (4, 12), (8, 12)),
        "image": Range((1, 3, 8, 8), (4, 3, 8, 8), (8, 3, 8, 8)),
    }


def test_a_static_engine_takes_one_shape() -> None:
    one = (4, 12), (4, 3, 8, 8)
    assert input_ranges(SHAPES, AXES, (4,), 4, static=True) == {
        "ids": Range(one[0], one[0], one[0]),
        "image": Range(one[1], one[1], one[1]),
    }


def without(monkeypatch: pytest.MonkeyPatch, *packages: str) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in packages else object())
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.parametrize(
    ("config", "absent", "told"),
    [
        (EngineConfig("tensorrt"), "tensorrt", r"^tensorrt is not installed: pip install 'optin-deploy\[tensorrt\]'$"),
        (RTX, "tensorrt_rtx", r"^tensorrt_rtx is not installed: pip install 'optin-deploy\[rtx\]'$"),
        (RTX, "polygraphy", r"^polygraphy is not installed: pip install 'optin-deploy\[rtx\]'$"),
        (EngineConfig("tensorrt"), "", "^TensorRT builds engines on a GPU only, and none is present$"),
        (replace(RTX, refittable=True), "", "^TensorRT for RTX builds refittable engines on a GPU only"),
        (replace(RTX, weight_stripped=True), "", "^TensorRT for RTX builds refittable engines on a GPU only"),
        (EngineConfig("tensorrt", weight_stripped=True), "", "^TensorRT .*GPU"),
        (replace(RTX, version_compatible=True), "", "^TensorRT for RTX .*version-compatible"),
    ],
)
def test_what_a_builder_lacks_is_told(
    monkeypatch: pytest.MonkeyPatch, config: EngineConfig, absent: str, told: str
) -> None:
    without(monkeypatch, absent)
    with pytest.raises(ExportError, match=told):
        check_builder(config)


def test_rtx_builds_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """No error is raised."""
    without(monkeypatch)
    check_builder(RTX)


class Net(nn.Module):
    """An attention and an FFN on sequences of any length."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.qkv = nn.Embedding(20, 16), nn.Linear(16, 48)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.table(ids)
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        attended = nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.down(nn.functional.gelu(self.up(x + attended)))


def onnx_file(folder: Path, opset: int = 20, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    axes = {"ids": {0: "batch", 1: "sequence"}}
    program = trace(Net(), {"ids": torch.randint(0, 20, SHAPES["ids"])}, axes)
    path = folder / f"net{seed}.onnx"
    write_onnx(program, path, output_names=("y",), dynamic_axes=axes, opset=opset)
    return path


def ranges(sizes: tuple[int, ...] = (1, 4)) -> dict[str, Range]:
    return input_ranges({"ids": SHAPES["ids"]}, AXES, sizes, max(sizes), static=False)


Built = tuple[Path, Path, EngineInfo]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    pytest.importorskip("tensorrt_rtx")
    folder = tmp_path_factory.mktemp("engine")
    onnx, engine = onnx_file(folder), folder / "net.rtx.engine"
    return onnx, engine, build_engine(onnx, engine, ranges(), RTX, folder / "cache" / "timing.cache")


def test_an_engine_comes_with_what_it_needs(built: Built) -> None:
    onnx, engine, info = built
    assert engine.stat().st_size > 1000
    beside = {f"{engine.name}.json"} | ({f"{engine.name}.layers.json"} if torch.cuda.is_available() else set())
    assert {p.name for p in engine.parent.iterdir()} == {"cache", onnx.name, engine.name, *beside}
    assert check_engine(engine, onnx) == check_engine(engine) == info
    assert info.config == RTX and info.inputs == ranges()
    assert (info.device is None) == (not torch.cuda.is_available())


@pytest.mark.parametrize(("opset", "static"), [(23, False), (20, True)])
def test_engines_of_both_attentions_are_built(tmp_path: Path, opset: int, static: bool) -> None:
    pytest.importorskip("tensorrt_rtx")
    shapes = input_ranges({"ids": SHAPES["ids"]}, AXES, (2,), 2, static=static)
    config = EngineConfig("rtx", optimization_level=1, workspace_mib=64, sparse_weights=True)
    build_engine(onnx_file(tmp_path, opset), tmp_path / "net.engine", shapes, config)
    assert check_engine(tmp_path / "net.engine").config == config


@pytest.mark.parametrize("precise", [{"tf32": True}, {"sparse_weights": True}, {}])
def test_the_flags_that_were_set_are_told(tmp_path: Path, precise: dict[str, bool]) -> None:
    pytest.importorskip("tensorrt_rtx")
    engine = tmp_path / "net.engine"
    info = build_engine(onnx_file(tmp_path), engine, ranges(), replace(RTX, optimization_level=0, **precise))
    wanted = {"tf32": "TF32", "sparse_weights": "SPARSE_WEIGHTS"}
    assert {flag for name, flag in wanted.items() if precise.get(name)} == set(info.flags) & set(wanted.values())
    assert check_engine(engine).flags == info.flags
    assert "REFIT" not in info.flags and not list(tmp_path.glob("*.flags.json"))


@pytest.mark.parametrize(
    ("here", "compatible", "refused"),
    [
        ("10.15.1", False, False),
        ("10.16.0", False, True),
        ("10.16.0", True, False),
        ("11.4.0.9", True, False),
        ("10.9.9", True, True),
        ("10.15", True, True),
    ],
)
def test_a_version_compatible_engine_runs_on_later_versions_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, here: str, compatible: bool, refused: bool
) -> None:
    engine = tmp_path / "net.engine"
    engine.write_bytes(b"engine")
    config = EngineConfig("tensorrt", version_compatible=compatible)
    info = EngineInfo("tensorrt", "10.15.1", "", _sha256(engine), None, "", config, {})
    engine.with_name("net.engine.json").write_text(json.dumps(asdict(info)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: object())
    monkeypatch.setattr("exporters.trt_engine.builder_version", lambda _: here)
    if refused:
        with pytest.raises(ExportError, match=f"TensorRT 10\\.15\\.1.*{here}.*build it again"):
            check_engine(engine)
    else:
        assert check_engine(engine).config.version_compatible == compatible


@pytest.mark.parametrize(
    ("version", "opset", "reads"), [("10.12.0", 20, True), ("10.14.1", 23, False), ("10.15.1", 23, True)]
)
def test_an_opset_that_the_parser_does_not_read_is_told(
    monkeypatch: pytest.MonkeyPatch, version: str, opset: int, reads: bool
) -> None:
    monkeypatch.setattr("exporters.trt_engine.builder_version", lambda _: version)
    check_opset("rtx", opset)
    if reads:
        check_opset("tensorrt", opset)
    else:
        with pytest.raises(ExportError, match=rf"^TensorRT {version} .*opset 23.* 10\.15"):
            check_opset("tensorrt", opset)


def edited(built: Built, folder: Path, **changes: Any) -> Path:
    """A copy of the engine whose description says something else."""
    _, engine, _ = built
    copy = folder / engine.name
    copy.write_bytes(engine.read_bytes())
    told = json.loads(engine.with_name(f"{engine.name}.json").read_text())
    copy.with_name(f"{engine.name}.json").write_text(json.dumps({**told, **changes}))
    return copy


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"builder_version": "0.9"}, r"TensorRT for RTX 0\.9, .* \d"),
        ({"device": "NVIDIA X (compute capability 1.0)"}, r"NVIDIA X .*, .* (no GPU|NVIDIA)"),
        ({"engine_sha256": "0"}, "changed.*build it again"),
        ({"builder": "other"}, "was built by 'other', not by one of tensorrt, rtx"),
    ],
)
def test_what_differs_from_here_is_told(built: Built, tmp_path: Path, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ExportError, match=told) as caught:
        check_engine(edited(built, tmp_path, **changes))
    assert "\n" not in str(caught.value)


def test_an_engine_of_another_onnx_file_is_told(built: Built, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"another ONNX file.*build it again"):
        check_engine(built[1], onnx_file(tmp_path, seed=1))


def test_a_missing_or_foreign_description_is_told(built: Built, tmp_path: Path) -> None:
    copy = edited(built, tmp_path)
    beside = copy.with_name(f"{copy.name}.json")
    for text in ("[]", "{}", "no JSON"):
        beside.write_text(text)
        with pytest.raises(ExportError, match="does not describe an engine"):
            check_engine(copy)
    beside.unlink()
    with pytest.raises(ExportError, match="No such file"):
        check_engine(copy)


def test_a_missing_engine_is_told(built: Built, tmp_path: Path) -> None:
    copy = edited(built, tmp_path)
    copy.unlink()
    with pytest.raises(ExportError, match=r"does not exist.*build it again"):
        check_engine(copy)


def test_what_cannot_be_built_leaves_nothing_and_says_why(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    broken = tmp_path / "broken.onnx"
    broken.write_text("no model")
    with pytest.raises(ExportError, match=r"TensorRT for RTX .*broken\.onnx") as caught:
        build_engine(broken, tmp_path / "x.engine", ranges(), RTX)
    assert "\n" not in str(caught.value)
    assert [p.name for p in tmp_path.iterdir()] == ["broken.onnx"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_an_engine_tells_of_its_layers(built: Built) -> None:
    needs_device("rtx")
    _, engine, _ = built
    assert json.loads(engine.with_name(f"{engine.name}.layers.json").read_text())["Layers"]
