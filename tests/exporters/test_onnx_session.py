from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from exporters import ExportError, OnnxModule, OnnxSpec, run_onnx, trace
from exporters.onnx_writer import write_onnx

AXES = {"x": {0: "batch"}}


class Doubled(nn.Module):
    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        inner = x.relu()
        return inner.sum(-1), inner


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("session") / "net.onnx"
    write_onnx(
        trace(Doubled(), {"x": torch.randn(2, 3)}, AXES), path, OnnxSpec(("total",), AXES, inner_names=("seen",))
    )
    return path


def test_values_inside_of_a_file_are_returned_next_to_its_outputs(file: Path) -> None:
    batches = [{"x": torch.randn(size, 3)} for size in (1, 4)]
    for batch, values in zip(batches, run_onnx(file, batches, ("total",), ("seen",), threads=1), strict=True):
        total, inner = Doubled()(**batch)
        torch.testing.assert_close(torch.from_numpy(values["total"]), total)
        torch.testing.assert_close(torch.from_numpy(values["seen"]), inner)
    assert list(run_onnx(file, batches, ("total",))[0]) == ["total"]


def test_a_value_that_is_not_in_the_file_is_named(file: Path) -> None:
    with pytest.raises(ExportError, match=r"net\.onnx .*absent"):
        run_onnx(file, [{"x": torch.randn(1, 3)}], ("total",), ("absent",))


def test_a_file_takes_the_place_of_a_module(file: Path) -> None:
    x = torch.randn(2, 3)
    torch.testing.assert_close(OnnxModule(file, {"total": "sum"}, threads=1)(x=x)["sum"], Doubled()(x)[0])
