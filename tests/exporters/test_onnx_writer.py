"""The ONNX file: names, dynamic axes, the shape of the graph, and that nothing half-written is left."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

import exporters.onnx_writer
from exporters import ExportError, check_parity, onnx_from_program, trace

pytestmark = pytest.mark.slow


class Causal(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


class Masked(nn.Module):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask, scale=0.7)


class TwoOutputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 4)

    def forward(self, second: Tensor, first: Tensor) -> tuple[Tensor, Tensor]:
        hidden = self.a(first)
        return hidden + second, hidden


def operators(path: Path) -> Counter[str]:
    return Counter(node.op_type for node in onnx.load(path).graph.node)


def axes(value: Any) -> list[str | int]:
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


def test_bert_has_readable_names_everywhere(bert_onnx: Path) -> None:
    graph = onnx.load(bert_onnx).graph
    assert {value.name: axes(value) for value in graph.input} == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
    }
    assert {value.name: axes(value) for value in graph.output} == {"logits": ["batch", 3]}
    assert {axis for value in graph.value_info for axis in axes(value) if isinstance(axis, str)} <= {
        "batch",
        "sequence",
    }


def test_the_images_batch_is_dynamic_and_the_rest_is_not(vit_onnx: Path) -> None:
    graph = onnx.load(vit_onnx).graph
    assert axes(graph.input[0]) == ["batch", 3, 32, 32]
    assert axes(graph.output[0]) == ["batch", 5]


def test_the_file_says_who_made_it_and_not_where(vit_onnx: Path) -> None:
    model = onnx.load(vit_onnx)
    assert {entry.key: entry.value for entry in model.metadata_props}["producer"] == "optin-deploy"
    assert model.opset_import[0].version == 20
    assert b"site-packages" not in vit_onnx.read_bytes()


@pytest.mark.parametrize("name", ["vit_onnx", "bert_onnx"])
def test_the_graph_holds_what_each_layer_needs_and_no_more(name: str, request: pytest.FixtureRequest) -> None:
    path: Path = request.getfixturevalue(name)
    count = operators(path)
    assert (count["LayerNormalization"], count["Gelu"], count["Softmax"]) == (5, 2, 2)
    assert count["Erf"] == count["IsNaN"] == count["Sqrt"] == 0
    assert count["Where"] == (name == "bert_onnx"), "the mask is made once, not in every layer"
    assert count["Cast"] <= 1
    # In each of the two layers: split and join the heads, and turn the keys (timm turns all three at once).
    assert count["Transpose"] <= 2 * 4 + 1
    initialisers = [
        (tensor.data_type, tuple(tensor.dims), tensor.raw_data) for tensor in onnx.load(path).graph.initializer
    ]
    large = [entry for entry in initialisers if len(entry[2]) > 64]
    assert len(set(large)) == len(large)


def test_padding_is_respected(bert: Any, bert_onnx: Path) -> None:
    session = onnxruntime.InferenceSession(bert_onnx, providers=["CPUExecutionProvider"])
    batch = {name: tensor.numpy().copy() for name, tensor in bert.batches[1].items()}
    (before,) = session.run(None, batch)
    batch["input_ids"][1:, -3:] = 7  # only where the mask is 0
    (after,) = session.run(None, batch)
    batch["attention_mask"][:] = 1
    (unmasked,) = session.run(None, batch)
    assert np.array_equal(before, after)
    assert not np.allclose(before[1:], unmasked[1:], atol=1e-6)


def test_opset_23_uses_the_fused_attention(vit: Any, tmp_path: Path) -> None:
    path = vit.export(tmp_path / "vit.onnx", 23)
    assert operators(path)["Attention"] == 2
    assert all(parity.passed for parity in check_parity(vit.module, path, vit.batches, vit.outputs))


def test_causal_attention_is_left_to_torchs_own_translation(tmp_path: Path) -> None:
    batches = [{"x": torch.randn(n, 2, 5, 4)} for n in (2, 3)]
    program = trace(Causal(), batches[0], {"x": {0: "batch"}})
    onnx_from_program(program, tmp_path / "causal.onnx", output_names=["y"], dynamic_axes={"x": {0: "batch"}})
    assert check_parity(Causal(), tmp_path / "causal.onnx", batches, ["y"])[0].passed


@pytest.mark.parametrize("boolean", [True, False])
def test_attention_masks_and_scales_agree_with_torch(boolean: bool, tmp_path: Path) -> None:
    dynamic = {"x": {0: "batch"}, "mask": {0: "batch"}}
    batches = []
    for batch in (2, 5):
        mask = torch.randn(batch, 1, 6, 6)
        batches.append(
            {
                "x": 3 * torch.randn(batch, 2, 6, 4),
                "mask": (mask > -0.5) | torch.eye(6, dtype=torch.bool) if boolean else mask,
            }
        )
    onnx_from_program(
        trace(Masked(), batches[0], dynamic), tmp_path / "m.onnx", output_names=["y"], dynamic_axes=dynamic
    )
    assert check_parity(Masked(), tmp_path / "m.onnx", batches, ["y"], tolerance=1e-5)[0].passed


def test_inputs_and_outputs_keep_their_order_and_names(tmp_path: Path) -> None:
    module, dynamic = TwoOutputs(), {"first": {0: "batch"}, "second": {0: "batch"}}
    inputs = {"second": torch.randn(2, 4), "first": torch.randn(2, 3)}
    program = trace(module, inputs, dynamic)
    onnx_from_program(program, tmp_path / "two.onnx", output_names=["sum", "hidden"], dynamic_axes=dynamic)
    graph = onnx.load(tmp_path / "two.onnx").graph
    assert [value.name for value in graph.input] == ["second", "first"]
    assert [value.name for value in graph.output] == ["sum", "hidden"]
    assert all(parity.passed for parity in check_parity(module, tmp_path / "two.onnx", [inputs], ["sum", "hidden"]))


@pytest.mark.parametrize("names", [["one"], ["one", "two", "three"]])
def test_a_wrong_number_of_output_names_leaves_no_file(names: list[str], tmp_path: Path) -> None:
    inputs = {"second": torch.randn(2, 4), "first": torch.randn(2, 3)}
    with pytest.raises(ExportError):
        onnx_from_program(trace(TwoOutputs(), inputs, {}), tmp_path / "two.onnx", output_names=names, dynamic_axes={})
    assert not list(tmp_path.iterdir())


def export_linear(path: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    module, inputs, dynamic = nn.Linear(30, 30), {"input": torch.randn(3, 30)}, {"input": {0: "batch"}}
    onnx_from_program(trace(module, inputs, dynamic), path, output_names=["y"], dynamic_axes=dynamic)
    return module, inputs


def test_a_file_that_fails_the_checker_never_appears(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*arguments: Any, **options: Any) -> None:
        raise onnx.checker.ValidationError("not a graph\nand more")

    monkeypatch.setattr(onnx.checker, "check_model", fails)
    target = tmp_path / "linear.onnx"
    target.write_bytes(b"the previous export")
    with pytest.raises(ExportError, match=r"invalid: not a graph$"):
        export_linear(target)
    assert [file.name for file in tmp_path.iterdir()] == ["linear.onnx"]
    assert target.read_bytes() == b"the previous export"


def test_large_weights_go_beside_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exporters.onnx_writer, "_SINGLE_FILE_BYTES", 1000)
    path = tmp_path / "linear.onnx"
    module, inputs = export_linear(path)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["linear.onnx", "linear.onnx.data"]
    assert check_parity(module, path, [inputs], ["y"])[0].passed


def test_nothing_is_printed(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    export_linear(tmp_path / "linear.onnx")
    assert capfd.readouterr() == ("", "")


def test_importing_the_package_loads_neither_runtime_nor_exporter() -> None:
    code = "import sys, exporters; print({'onnxruntime', 'onnx', 'onnxscript', 'optin_deploy'} & set(sys.modules))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"
