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

from exporters import ExportError, check_parity, compare_outputs, onnx_from_program, trace

pytestmark = pytest.mark.slow


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
    with pytest.raises(ExportError, match=r"no output other .*logits"):
        compare_outputs(bert.module, outputs, bert.batches, ["other"])


class Decides(torch.nn.Module):
    """Gives the sign of the sum of a sample, and what is half of it; which sign 0 has is open."""

    def __init__(self, of_zero: float = 1.0) -> None:
        super().__init__()
        self.of_zero = of_zero

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        total = x.sum(1, keepdim=True)
        sign = torch.where(total == 0, self.of_zero, total.sign())
        return sign, sign / 2


def either(sample: Any, decided: Any = None) -> tuple[torch.Tensor, ...]:
    """What `Decides` may give for one sample."""
    assert sample["x"].shape[0] == 1
    pairs = [Decides(of_zero)(**sample) for of_zero in (1.0, -1.0)]
    return tuple(torch.cat(outputs) for outputs in zip(*pairs, strict=True))


UNDECIDED = [{"x": torch.tensor([[1.0, 2.0], [1.0, -1.0], [-3.0, 1.0]])}, {"x": torch.tensor([[0.0, 0.0]])}]


def given(of_zero: float = -1.0) -> list[dict[str, Any]]:
    """What another runtime gives for `UNDECIDED`."""
    return [dict(zip("ab", (t.numpy() for t in Decides(of_zero)(**batch)), strict=True)) for batch in UNDECIDED]


def test_a_sample_that_rounding_decides_is_compared_with_the_same_decision() -> None:
    without = compare_outputs(Decides(), given(), UNDECIDED, ("a", "b"))
    assert [(p.passed, p.max_abs_error, p.near_ties) for p in without] == [(False, 2.0, 0), (False, 1.0, 0)]
    found = compare_outputs(Decides(), given(), UNDECIDED, ("a", "b"), alternatives=either)
    assert [(p.passed, p.max_abs_error, p.near_ties, p.samples) for p in found] == [(True, 0.0, 2, 4)] * 2
    # What agrees as it is needs no alternative.
    agree = compare_outputs(Decides(), given(1.0), UNDECIDED, ("a", "b"), alternatives=either)
    assert [(p.passed, p.near_ties) for p in agree] == [(True, 0)] * 2


def test_no_alternative_excuses_another_error() -> None:
    def failing(outputs: list[dict[str, Any]]) -> list[tuple[float, int]]:
        found = compare_outputs(Decides(), outputs, UNDECIDED, ("a", "b"), alternatives=either)
        assert not all(p.passed for p in found)
        return [(p.max_abs_error, p.near_ties) for p in found]

    # An undecided sample that is neither the one nor the other, a decided one, and what is not finite.
    for batch, row, value in ((0, 1, -1.001), (0, 0, -1.0), (1, 0, float("nan"))):
        outputs = given()
        outputs[batch]["a"] = outputs[batch]["a"].copy()
        outputs[batch]["a"][row] = value
        (error, near_ties), _ = failing(outputs)
        assert near_ties == 1 + (row == 0 and batch == 0)
        assert error > 5e-4
    # Outputs that were decided differently.
    outputs = given()
    outputs[1]["b"] = -outputs[1]["b"]
    assert failing(outputs) == [(2.0, 1), (0.0, 1)]
    outputs = given()
    outputs[1]["a"] = outputs[1]["a"][:, :0]
    assert failing(outputs)[0][0] == float("inf")


def test_outputs_without_a_batch_have_no_alternatives() -> None:
    class Total(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.sum()

    batch = {"x": torch.ones(2, 3)}
    given = [{"total": torch.tensor(7.0).numpy()}]
    (parity,) = compare_outputs(Total(), given, [batch], ["total"], alternatives=either)
    assert (parity.passed, parity.max_abs_error, parity.near_ties) == (False, 1.0, 0)


class Answering(torch.nn.Module):
    """Gives a class number for each token, and whether it is sure; ``shifted`` of the numbers are one off."""

    def __init__(self, shifted: int = 0) -> None:
        super().__init__()
        self.shifted = shifted

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        answers = (x * 1000).long()
        return answers + (torch.arange(x.shape[1]) < self.shifted), x > 0.5


def test_answers_differ_or_do_not_however_far_they_are_apart(tmp_path: Path) -> None:
    batch = {"x": torch.rand(2, 100, generator=torch.Generator().manual_seed(0)) + 30}
    axes, names = {"x": {0: "batch"}}, ("answers", "sure")
    onnx_from_program(trace(Answering(), batch, axes), tmp_path / "x.onnx", output_names=names, dynamic_axes=axes)
    answers, sure = check_parity(Answering(), tmp_path / "x.onnx", [batch], names, threads=1)
    assert (answers.max_abs_error, answers.max_abs_reference, answers.passed) == (0.0, 1.0, True)
    assert sure.passed
    # One off in thirty thousand is less than the tolerance of numbers.
    answers, sure = check_parity(Answering(3), tmp_path / "x.onnx", [batch], names, threads=1)
    assert answers.max_abs_error == pytest.approx(0.03)
    assert not answers.passed
    (answers, _) = check_parity(Answering(3), tmp_path / "x.onnx", [batch], names, tolerance=0.05, threads=1)
    assert answers.passed


@pytest.mark.parametrize(
    ("forward", "told"),
    [
        (lambda x: {"y": x}, "Linear .* dict"),
        (lambda x: (x, None), "Linear .* tuple"),
        (lambda x: x.view(7, -1), r"fails on x \(2, 4\): shape"),
    ],
)
def test_modules_that_cannot_be_compared_are_told(forward: Any, told: str, tmp_path: Path) -> None:
    module = torch.nn.Linear(4, 4)
    batch, axes = {"input": torch.ones(2, 4)}, {"input": {0: "batch"}}
    onnx_from_program(trace(module, batch, axes), tmp_path / "x.onnx", output_names=["y"], dynamic_axes=axes)
    module.forward = forward  # type: ignore[method-assign]
    with pytest.raises(ExportError, match=told):
        check_parity(module, tmp_path / "x.onnx", [{"x": torch.ones(2, 4)}], ["y"])


def test_a_module_that_changes_its_input_is_compared_on_the_same(tmp_path: Path) -> None:
    class Doubling(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2)

    batch, axes = {"x": torch.ones(2, 4)}, {"x": {0: "batch"}}
    program = trace(Doubling(), {"x": torch.ones(2, 4)}, axes)
    onnx_from_program(program, tmp_path / "x.onnx", output_names=["y"], dynamic_axes=axes)
    (parity,) = check_parity(Doubling(), tmp_path / "x.onnx", [batch], ["y"])
    assert parity.passed
    assert bool((batch["x"] == 1).all())
