"""Tracing: which dimensions stay dynamic, and what is said when they cannot."""

from __future__ import annotations

import inspect
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exporters import ExportError, onnx_from_program, save_program, trace

pytestmark = pytest.mark.slow


class FixedBatch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(4, 3) * 2


class TwiceAsLong(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + torch.cat([y, y])


class SameLength(nn.Module):
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


BATCH = {"x": {0: "batch"}}


def test_a_batch_of_one_is_doubled_and_stays_dynamic(vit: Any) -> None:
    program = trace(vit.module, vit.inputs, vit.dynamic_axes)
    assert vit.inputs["x"].shape[0] == 1
    assert program.module()(x=vit.batches[2]["x"]).shape == (8, 5)


def test_the_sequence_is_dynamic_up_to_the_position_table(bert: Any) -> None:
    program = trace(bert.module, bert.inputs, bert.dynamic_axes)
    assert program.module()(**bert.batches[2])[0].shape == (5, 3)


def test_the_module_is_traced_in_eval_mode() -> None:
    program = trace(nn.Dropout(0.9).train(), {"input": torch.ones(2, 50)}, {"input": {0: "batch"}})
    assert torch.equal(program.module()(input=torch.ones(3, 50)), torch.ones(3, 50))


def test_a_dimension_that_the_model_fixes_is_an_error_of_one_line() -> None:
    with pytest.raises(ExportError, match="cannot trace FixedBatch") as caught:
        trace(FixedBatch(), {"x": torch.zeros(4, 3)}, BATCH)
    assert "\n" not in str(caught.value)


def test_a_dimension_that_became_a_number_without_a_word_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    export = torch.export.export

    def specialising(*arguments: Any, dynamic_shapes: Any, **options: Any) -> Any:
        return export(*arguments, dynamic_shapes=None, **options)

    monkeypatch.setattr(torch.export, "export", specialising)
    with pytest.raises(ExportError, match=r"dimension 0 \(batch\) of input x .*to 4"):
        trace(FixedBatch(), {"x": torch.zeros(4, 3)}, BATCH)


def test_a_dimension_that_is_a_multiple_of_another_is_an_error() -> None:
    with pytest.raises(ExportError, match=r"dimension 0 \(batch\) of input x .*2\*"):
        trace(TwiceAsLong(), {"x": torch.zeros(4, 3), "y": torch.zeros(2, 3)}, BATCH | {"y": {0: "half"}})


def test_two_names_for_one_size_are_an_error() -> None:
    inputs = {"x": torch.zeros(4, 3), "y": torch.zeros(4, 3)}
    with pytest.raises(ExportError, match="one name"):
        trace(SameLength(), inputs, {"x": {0: "batch"}, "y": {0: "other"}})


@pytest.mark.parametrize(
    ("axes", "message"), [({"y": {0: "batch"}}, "not among the inputs x"), ({"x": {2: "batch"}}, "no dimension 2")]
)
def test_axes_that_do_not_exist_are_named(axes: dict[str, dict[int, str]], message: str) -> None:
    with pytest.raises(ExportError, match=message):
        trace(nn.Identity(), {"x": torch.zeros(4, 3)}, axes)


def test_a_saved_program_loads_and_gives_the_same(vit: Any, tmp_path: Path) -> None:
    program = trace(vit.module, vit.inputs, vit.dynamic_axes)
    save_program(program, tmp_path / "vit.pt2")
    batch = vit.batches[1]
    with torch.no_grad():
        assert torch.equal(torch.export.load(tmp_path / "vit.pt2").module()(**batch), vit.module(**batch))
    assert [file.name for file in tmp_path.iterdir()] == ["vit.pt2"]


def test_a_program_is_not_saved_under_another_suffix(vit: Any, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"\.pt2"):
        save_program(trace(vit.module, vit.inputs, vit.dynamic_axes), tmp_path / "vit.onnx")
    assert not list(tmp_path.iterdir())


class KeywordsOnly(nn.Module):
    """Takes its inputs as **kwargs and cuts a table to a dynamic length, so that the program has guards."""

    def forward(self, **inputs: Tensor) -> Tensor:
        return inputs["a"] + inputs["b"] + torch.ones(32)[: inputs["a"].shape[1]]


def test_a_forward_of_keywords_with_guards_is_lowered(tmp_path: Path) -> None:
    axes = {"a": {0: "batch", 1: "sequence"}, "b": {0: "batch", 1: "sequence"}}
    program = trace(KeywordsOnly(), {"a": torch.ones(2, 8), "b": torch.ones(2, 8)}, axes)
    onnx_from_program(program, tmp_path / "m.onnx", output_names=("y",), dynamic_axes=axes)
    assert (tmp_path / "m.onnx").is_file()


def test_a_forward_of_keywords_has_named_parameters_while_it_is_traced() -> None:
    seen: list[list[str]] = []

    class Keywords(nn.Module):
        def forward(self, **inputs: Tensor) -> Tensor:
            seen.append(list(inspect.signature(self.forward).parameters))
            return inputs["a"] + inputs["b"]

    module = Keywords()
    sample = {"a": torch.randn(2, 3), "b": torch.randn(2, 3)}
    program = trace(module, sample, {"a": {0: "batch"}, "b": {0: "batch"}})
    assert seen[0] == ["a", "b"] and "forward" not in vars(module)
    larger = {name: torch.randn(5, 3) for name in sample}
    torch.testing.assert_close(program.module()(**larger), larger["a"] + larger["b"])


_ON_A_FULL_DISK = """
import resource, sys, torch
from exporters import ExportError, save_program, trace

program = trace(torch.nn.Linear(64, 64), {"input": torch.zeros(4, 64)}, {"input": {0: "batch"}})
# Writing beyond these bytes fails as on a full disk.
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
try:
    save_program(program, sys.argv[1])
except ExportError as error:
    print(error)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="limits of processes are those of POSIX")
def test_where_a_program_cannot_be_written_the_process_goes_on(tmp_path: Path) -> None:
    """Torch's writer would end it."""
    command = [sys.executable, "-c", _ON_A_FULL_DISK, str(tmp_path / "net.pt2")]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (ended.returncode, ended.stdout) == (0, f"{tmp_path / 'net.pt2'} cannot be written: File too large\n")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("module", "inputs", "told"),
    [
        (torch.relu, {"x": torch.ones(2)}, "not a builtin_function_or_method"),
        (nn.Linear(2, 2), {}, "with one at least"),
        (nn.Linear(2, 2), torch.ones(2, 2), "argument names"),
        (nn.Linear(2, 2), {"input": None}, "input input is a NoneType"),
        (nn.Linear(2, 2), {"x": torch.ones(2, 2)}, "cannot trace Linear"),
        (nn.ModuleList(), {"x": torch.ones(2, 2)}, "cannot trace ModuleList"),
    ],
)
def test_what_cannot_be_traced_is_told_in_one_line(module: Any, inputs: Any, told: str) -> None:
    with pytest.raises(ExportError, match=told) as caught:
        trace(module, inputs, {})
    assert "\n" not in str(caught.value)


def test_an_exported_graph_is_told() -> None:
    module = torch.export.export(nn.Linear(2, 2), (torch.ones(2, 2),)).module()
    with pytest.raises(ExportError, match=r"cannot trace .*eval"):
        trace(module, {"input": torch.ones(2, 2)}, {})


def test_nothing_is_printed_of_a_graph_that_depends_on_values(capfd: pytest.CaptureFixture[str]) -> None:
    class Deciding(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x * 2 if x.sum().item() > 0 else x

    with pytest.raises(ExportError, match=r"cannot trace Deciding.*data-dependent"):
        trace(Deciding(), {"x": torch.ones(2)}, {})
    assert capfd.readouterr() == ("", "")
