"""Parity: real exports pass, broken ones do not."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper

from exporters import ExportError, check_parity, compare_outputs


def changed(path: Path, target: Path, value: float) -> Path:
    """A copy of `path` with one number of its classifier's weight replaced."""
    model = onnx.load(path)
    tensor = next(tensor for tensor in model.graph.initializer if tensor.name.endswith("head.weight"))
    weight = numpy_helper.to_array(tensor).copy()
    weight.flat[3] = value
    tensor.CopyFrom(numpy_helper.from_array(weight, tensor.name))
    onnx.save(model, target)
    return target


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_exports_agree_at_other_batch_sizes_and_lengths(name: str, request: pytest.FixtureRequest) -> None:
    case: Any = request.getfixturevalue(name)
    (parity,) = check_parity(
        case.module, request.getfixturevalue(f"{name}_onnx"), case.batches, case.outputs, threads=1
    )
    assert parity.passed
    assert 0 <= parity.mean_abs_error <= parity.max_abs_error < 1e-4
    assert parity.max_abs_reference > 0
    assert parity.output == "logits"
    assert parity.shape[0] in (1, 3, 5, 8)


@pytest.mark.parametrize("value", [3.0, float("nan"), float("inf")])
def test_a_corrupted_weight_fails(value: float, vit: Any, vit_onnx: Path, tmp_path: Path) -> None:
    path = changed(vit_onnx, tmp_path / "broken.onnx", value)
    (parity,) = check_parity(vit.module, path, vit.batches, vit.outputs)
    assert not parity.passed
    assert parity.max_abs_error > 1e-3
    assert np.isfinite(parity.max_abs_error) == np.isfinite(value)


def test_nan_on_both_sides_fails_all_the_same(vit: Any, vit_onnx: Path) -> None:
    batch = {"x": torch.full((2, 3, 32, 32), float("nan"))}
    (parity,) = check_parity(vit.module, vit_onnx, [vit.batches[0], batch], vit.outputs)
    assert not parity.passed


def test_a_different_shape_fails(vit: Any, vit_onnx: Path) -> None:
    class Fewer(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(x), 4)

    (parity,) = check_parity(Fewer(), vit_onnx, vit.batches[:1], vit.outputs)
    assert not parity.passed
    assert parity.shape == (1, 4)


def test_the_tolerance_grows_with_the_reference_and_decides(vit: Any, vit_onnx: Path, tmp_path: Path) -> None:
    path = changed(vit_onnx, tmp_path / "off.onnx", 0.5)
    strict, loose = (check_parity(vit.module, path, vit.batches, vit.outputs, tolerance=t)[0] for t in (1e-4, 1e4))
    assert not strict.passed
    assert loose.passed


@pytest.mark.parametrize(
    ("batches", "outputs", "message"),
    [
        ([], ["logits"], "at least one batch"),
        ([{"x": torch.zeros(1, 3, 32, 32)}], ["logits", "more"], "returns 1 tensors, but 2"),
        ([{"x": torch.zeros(1, 3, 32, 32)}], ["other"], "cannot run the file on x"),
    ],
)
def test_wrong_use_is_an_error(batches: list[Any], outputs: list[str], message: str, vit: Any, vit_onnx: Path) -> None:
    with pytest.raises(ExportError, match=message):
        check_parity(vit.module, vit_onnx, batches, outputs)


def test_a_file_that_is_no_onnx_is_an_error(vit: Any, tmp_path: Path) -> None:
    (tmp_path / "bad.onnx").write_bytes(b"no graph")
    with pytest.raises(ExportError, match=r"cannot load bad\.onnx"):
        check_parity(vit.module, tmp_path / "bad.onnx", vit.batches, vit.outputs)


def test_a_missing_runtime_names_the_extra(vit: Any, vit_onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(ExportError, match=r"pip install 'optin-deploy\[cpu\]'"):
        check_parity(vit.module, vit_onnx, vit.batches, vit.outputs)


def test_outputs_computed_elsewhere_are_compared_alike(bert: Any, bert_onnx: Path) -> None:
    session = onnxruntime.InferenceSession(bert_onnx, providers=["CPUExecutionProvider"])
    outputs = [
        dict(zip(bert.outputs, session.run(bert.outputs, {n: t.numpy() for n, t in batch.items()}), strict=True))
        for batch in bert.batches
    ]
    there = check_parity(bert.module, bert_onnx, bert.batches, bert.outputs)
    assert compare_outputs(bert.module, outputs, bert.batches, bert.outputs) == there
    outputs[1]["logits"] = outputs[1]["logits"] + 0.5
    (off,) = compare_outputs(bert.module, outputs, bert.batches, bert.outputs)
    assert not off.passed and off.max_abs_error == pytest.approx(0.5, abs=1e-3)
    with pytest.raises(ExportError, match="there is no output other among logits"):
        compare_outputs(bert.module, outputs, bert.batches, ["other"])
