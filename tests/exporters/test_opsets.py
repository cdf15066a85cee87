"""Opsets from 17 on, and the version of the format that goes with each."""

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

from exporters import (
    PARITY_TOLERANCES,
    ExportError,
    OnnxSpec,
    Precision,
    check_parity,
    in_precision,
    is_quantized,
    onnx_from_program,
    onnx_in_precision,
    runnable_on_cpu,
    trace,
)
from exporters.onnx_writer import save_model

pytestmark = pytest.mark.slow


VERSIONS = {17: 8, 18: 8, 19: 9, 20: 9, 21: 10, 22: 10, 23: 11}
AXES = {"x": {0: "batch"}}


def written(case: Any, path: Path, precision: Precision, opset: int) -> onnx.ModelProto:
    program = in_precision(trace(case.module, case.inputs, case.dynamic_axes), precision, opset)
    batches = case.batches[:1] if is_quantized(precision) else ()
    onnx_in_precision(program, path, OnnxSpec(case.outputs, case.dynamic_axes, opset), precision, batches)
    onnx.checker.check_model(str(path), full_check=True)
    return onnx.load(path)


@pytest.mark.parametrize(
    ("precision", "opset"),
    [("fp32", 17), ("fp16", 17), ("bf16", 17), ("int8", 17), ("fp32", 18), ("fp16", 19), ("int8", 21), ("bf16", 23)],
)
def test_every_precision_in_old_and_new_opsets(vit: Any, tmp_path: Path, precision: Precision, opset: int) -> None:
    path = tmp_path / "vit.onnx"
    model = written(vit, path, precision, opset)
    assert [(i.domain, i.version) for i in model.opset_import if not i.domain] == [("", opset)]
    assert model.ir_version == VERSIONS[opset]
    with runnable_on_cpu(path, precision) as file:
        rows = check_parity(vit.module, file, vit.batches[1:], vit.outputs, PARITY_TOLERANCES[precision], threads=1)
    assert all(row.passed for row in rows)


def test_texts_in_opset_17(bert: Any, tmp_path: Path) -> None:
    path = tmp_path / "bert.onnx"
    assert written(bert, path, "fp32", 17).ir_version == 8
    assert all(row.passed for row in check_parity(bert.module, path, bert.batches, bert.outputs, threads=1))


class Of(nn.Module):
    """A function as a module."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def several(x: Tensor) -> Tensor:
    """What opset 18 writes otherwise."""
    a, b = x.split(4, -1)
    wide = nn.functional.pad(a + b, (1, 1))
    pooled = torch.stack([wide.mean(-1), wide.amax(-1), wide.amin(-1), wide.sum(-1), wide.logsumexp(-1)], -1)
    large = nn.functional.interpolate(x[:, None], scale_factor=2.0, mode="nearest")
    return torch.cat([pooled, wide, large[:, 0, ::2], (x[..., :3] ** 2).prod(-1, keepdim=True)], -1)


def test_operators_that_opset_18_changed(tmp_path: Path) -> None:
    path, x = tmp_path / "net.onnx", torch.randn(2, 5, 8)
    onnx_from_program(trace(Of(several), {"x": x}, AXES), path, output_names=("y",), dynamic_axes=AXES, opset=17)
    assert onnx.load(path).ir_version == 8
    (row,) = check_parity(Of(several), path, [{"x": x}, {"x": torch.randn(3, 5, 8)}], ("y",), threads=1)
    assert row.passed


def test_what_opset_17_cannot_express_is_named(tmp_path: Path) -> None:
    module = Of(lambda x: nn.functional.interpolate(x, scale_factor=0.5, mode="bilinear", antialias=True))
    program = trace(module, {"x": torch.randn(2, 3, 8, 8)}, AXES)
    with pytest.raises(ExportError, match=r"opset 17.*Resize.*--opset 18"):
        onnx_from_program(program, tmp_path / "net.onnx", output_names=("y",), dynamic_axes=AXES, opset=17)
    assert not list(tmp_path.iterdir())


def test_weights_beside_the_file(vit_onnx: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnx_ir as ir

    monkeypatch.setattr("exporters.onnx_writer._SINGLE_FILE_BYTES", 100)
    path = tmp_path / "large.onnx"
    save_model(ir.load(vit_onnx), path)
    assert (tmp_path / "large.onnx.data").is_file()
    assert onnx.load(path, load_external_data=False).ir_version == 9
    onnx.checker.check_model(str(path))


@pytest.mark.parametrize(
    ("names", "message"),
    [(("x",), "an input and an output are both called x"), (("y", "y"), "two outputs are both called y")],
)
def test_values_have_names_of_their_own(names: tuple[str, ...], message: str, tmp_path: Path) -> None:
    module = Of(lambda x: tuple(x * (i + 2) for i in range(len(names))))
    program = trace(module, {"x": torch.ones(2, 3)}, AXES)
    with pytest.raises(ExportError, match=message):
        onnx_from_program(program, tmp_path / "a.onnx", output_names=names, dynamic_axes=AXES)


def test_an_output_may_be_called_like_a_value_inside(tmp_path: Path) -> None:
    module, path = Of(lambda x: (x.relu() + 1).relu()), tmp_path / "a.onnx"
    program = trace(module, {"x": torch.ones(2, 3)}, AXES)
    onnx_from_program(program, path, output_names=("relu",), dynamic_axes=AXES)
    assert check_parity(module, path, [{"x": torch.randn(2, 3)}], ("relu",), threads=1)[0].passed


def test_outputs_need_not_be_float(tmp_path: Path) -> None:
    module = Of(lambda x: (x.argmax(-1), x > 0, x.double()))
    names = ("place", "sign", "double")
    for precision in ("fp32", "fp16"):
        path = tmp_path / f"{precision}.onnx"
        program = in_precision(trace(module, {"x": torch.randn(2, 3)}, AXES), precision, 20)
        onnx_from_program(program, path, output_names=names, dynamic_axes=AXES)
        rows = check_parity(module, path, [{"x": torch.randn(4, 3)}], names, threads=1)
        assert all(row.passed for row in rows)


def test_control_flow_by_data_is_one_line() -> None:
    module = Of(lambda x: x * 2 if x.sum() > 0 else x)
    with pytest.raises(ExportError) as error:
        trace(module, {"x": torch.ones(2, 3)}, AXES)
    assert "\n" not in str(error.value) and "torch.export cannot trace Of" in str(error.value)
