"""ONNX files whose weights are elsewhere are opened by nobody."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, external_data_helper, helper

from exporters import EngineConfig, ExportError, build_engine, check_parity
from exporters.trt_engine import check_engine
from profilers import Case, ProfilingError, infer_file, layer_profile, measure_files, open_runner
from profilers.external_data import reading_elsewhere

pytestmark = pytest.mark.slow


INSIDE = ("w.data", "sub/w.data", "./w.data")
OUTSIDE = ("../secret", "sub/../../secret", "..\\secret", "C:\\secret", "link", "sub-link/secret", "missing", ".", "")


@pytest.fixture
def model(mlp_onnx: Callable[[int], Path], tmp_path: Path) -> Callable[[str], Path]:
    """Writes an MLP into ``models``, one of its weights at a location, and files beside it and outside."""
    content = np.ones((64, 8), np.float32).tobytes()
    folder = tmp_path / "models"
    (folder / "sub").mkdir(parents=True)
    for place in (tmp_path / "secret", folder / "w.data", folder / "sub" / "w.data"):
        place.write_bytes(content)
    (folder / "link").symlink_to(tmp_path / "secret")
    (folder / "sub-link").symlink_to(tmp_path)

    def write(location: str) -> Path:
        made = onnx.load(mlp_onnx(8))
        _move(made.graph.initializer[0], location)
        (folder / "m.onnx").write_bytes(made.SerializeToString())
        return folder / "m.onnx"

    return write


def _move(tensor: Any, location: str) -> None:
    external_data_helper.set_external_data(tensor, location)
    tensor.ClearField("raw_data")


@pytest.mark.parametrize("location", INSIDE)
def test_data_beside_the_file_are_fine(model: Callable[[str], Path], location: str) -> None:
    assert reading_elsewhere(model(location)) == ""


@pytest.mark.parametrize("location", OUTSIDE)
def test_data_elsewhere_are_told(model: Callable[[str], Path], location: str) -> None:
    path = model(location)
    assert reading_elsewhere(path).startswith(f"{path} has weights in {location!r}")


def test_absolute_locations_and_addresses_are_told(model: Callable[[str], Path], tmp_path: Path) -> None:
    for location in (str(tmp_path / "secret"), str(tmp_path / "models" / "w.data"), "*/_ORT_MEM_ADDR_/*", "a\0b"):
        assert "own directory" in reading_elsewhere(model(location))


def test_tensors_are_found_in_constants_subgraphs_and_functions(tmp_path: Path) -> None:
    def constant() -> Any:
        tensor = helper.make_tensor("t", TensorProto.FLOAT, [1], b"\0" * 4, raw=True)
        _move(tensor, "../secret")
        return helper.make_node("Constant", [], ["c"], value=tensor)

    opset = [helper.make_opsetid("", 20)]
    inner = helper.make_graph([constant()], "inner", [], [])
    for number, (nodes, functions) in enumerate(
        [
            ([constant()], []),
            ([helper.make_node("If", ["x"], ["y"], then_branch=inner, else_branch=inner)], []),
            ([], [helper.make_function("own", "f", [], ["c"], [constant()], opset)]),
        ]
    ):
        model = helper.make_model(helper.make_graph(nodes, "g", [], []), functions=functions)
        path = tmp_path / f"{number}.onnx"
        path.write_bytes(model.SerializeToString())
        assert "'../secret'" in reading_elsewhere(path)


def test_a_file_without_external_data_is_not_even_parsed(
    mlp_onnx: Callable[[int], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = mlp_onnx(16)
    monkeypatch.setattr(onnx, "load", None)
    assert reading_elsewhere(path) == ""
    assert reading_elsewhere(tmp_path / "gone.onnx") == ""
    (tmp_path / "empty.onnx").touch()
    assert reading_elsewhere(tmp_path / "empty.onnx") == ""


def test_what_is_no_onnx_file_is_told(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"location, location, location")
    assert reading_elsewhere(path).startswith(f"{path} is not")


def test_exporters_refuse_it(model: Callable[[str], Path], tmp_path: Path) -> None:
    path = model("../secret")
    for use in (
        lambda: check_parity(torch.nn.Identity(), path, [{"input": torch.ones(1)}], ["y"]),
        lambda: build_engine(path, tmp_path / "e.engine", {}, EngineConfig("rtx")),
        lambda: check_engine(tmp_path / "e.engine", path),
    ):
        with pytest.raises(ExportError, match=r"has weights in '\.\./secret'"):
            use()
    assert not (tmp_path / "e.engine").exists()


def test_profilers_refuse_it(model: Callable[[str], Path], sample: dict[str, NDArray[np.float32]]) -> None:
    path = model("../secret")
    case = Case("ort-cpu", 1, 1, 0.1)
    for use in (
        lambda: measure_files({"a": path}, sample, case, []),
        lambda: infer_file("ort-cpu", path, [sample], threads=1),
        lambda: layer_profile(Case("ort-cpu", 1, threads=1, seconds=0.1), path, sample, []),
    ):
        with pytest.raises(ProfilingError, match=r"has weights in '\.\./secret'"):
            use()


@pytest.mark.parametrize("location", ["../secret", "link"])
def test_a_runner_opened_here_refuses_it_too(model: Callable[[str], Path], location: str) -> None:
    with pytest.raises(ProfilingError):
        open_runner("ort-cpu", model(location), 1)
