"""Profiles by layer: whose operator is whose, and that the rows add up to a run."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tiny_models import bert_config, classifier
from transformers import BertModel

from exporters import onnx_from_program, save_program, trace
from optin_deploy.models.custom import custom_network
from optin_deploy.network import Network, TensorOutputs
from profilers import Case, ProfilingError
from profilers.layer_profilers import Operator
from profilers.layer_profilers.ort import node_paths, node_times
from profilers.layer_profilers.scopes import module_path
from profilers.layer_times import OTHER, LayerProfile, LayerRow, layer_profile
from profilers.plain import from_plain, to_json
from profilers.runners.base import Feeds
from profilers.workers.layers import innermost, sum_by_module, typical

pytestmark = pytest.mark.slow

CASE = Case("ort-cpu", 1, threads=1, seconds=5.0)
VIT = ("patch_embed", "blocks.0", "blocks.0.attn", "blocks.0.mlp", "norm", "head")
BERT = ("embeddings", *(f"encoder.layer.0{name}" for name in ("", ".attention.self", ".intermediate", ".output.dense")))


def exported(network: Network, folder: Path) -> tuple[Path, Path, Feeds]:
    """The ONNX file, the exported program, and a sample."""
    traced = trace(TensorOutputs(network.module, network.outputs), network.inputs, network.dynamic_axes)
    save_program(traced, folder / "net.pt2")
    names = tuple(network.outputs)
    onnx_from_program(traced, folder / "net.onnx", output_names=names, dynamic_axes=network.dynamic_axes)
    return folder / "net.onnx", folder / "net.pt2", network.sample_arrays()


@pytest.fixture(scope="module")
def vit(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Feeds]:
    return exported(classifier(10, depth=1), tmp_path_factory.mktemp("vit"))


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Feeds]:
    torch.manual_seed(0)
    module = BertModel(bert_config(num_hidden_layers=1), add_pooling_layer=False).eval()
    tokens = torch.randint(5, 40, (2, 12))
    network = custom_network(module, {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)})
    return exported(network, tmp_path_factory.mktemp("bert"))


def profile(runtime: str, files: tuple[Path, Path, Feeds], modules: tuple[str, ...]) -> LayerProfile:
    path = files[0] if runtime.startswith("ort") else files[1]
    return layer_profile(Case(runtime, 2, threads=1, seconds=0.2), path, files[2], modules)


def operators(found: LayerProfile, module: str) -> dict[str, int]:
    return {row.operator: row.calls for row in found.rows if row.module == module}


def products(calls: dict[str, int]) -> int:
    words = ("MatMul", "Gemm", "linear", "Conv", "conv2d")
    return sum(count for operator, count in calls.items() if any(word in operator for word in words))


@pytest.mark.parametrize("runtime", ["ort-cpu", "torch"])
def test_every_operator_of_a_vision_transformer_finds_its_module(runtime: str, vit: tuple[Path, Path, Feeds]) -> None:
    found = profile(runtime, vit, VIT)
    calls = {module: operators(found, module) for module in VIT}
    # Scores and weighted values are two products more, unless attention is one operator.
    fused = "scaled_dot_product_attention" in calls["blocks.0.attn"]
    expected = {"patch_embed": 1, "blocks.0": 0, "blocks.0.attn": 2 if fused else 4, "blocks.0.mlp": 2, "head": 1}
    assert {module: products(calls[module]) for module in expected} == expected
    assert fused or calls["blocks.0.attn"]["Softmax"] == 1
    assert any("norm" in operator.lower() for operator in calls["blocks.0"])
    assert products(operators(found, OTHER)) == 0
    assert found.rows[-1].module in ("head", OTHER)


@pytest.mark.parametrize("runtime", ["ort-cpu", "torch"])
def test_every_operator_of_a_text_encoder_finds_its_module(runtime: str, bert: tuple[Path, Path, Feeds]) -> None:
    found = profile(runtime, bert, BERT)
    calls = {module: operators(found, module) for module in BERT}
    fused = "scaled_dot_product_attention" in calls["encoder.layer.0.attention.self"]
    assert products(calls["encoder.layer.0.attention.self"]) == (3 if fused else 5)
    # The attention's own output projection was not asked for, so it is the layer's.
    assert [products(calls[f"encoder.layer.0{name}"]) for name in ("", ".intermediate", ".output.dense")] == [1, 1, 1]
    assert "embedding" in calls["embeddings"] or "Gather" in calls["embeddings"]
    assert products(operators(found, OTHER)) == 0


def test_the_rows_add_up_and_come_back_from_json(vit: tuple[Path, Path, Feeds]) -> None:
    found = profile("ort-cpu", vit, VIT)
    assert found.operators_ms == pytest.approx(sum(row.ms for row in found.rows))
    assert 0 <= found.overhead_ms <= found.total_ms
    # Operators that run one after the other in one run cannot take longer than it, but for rounding.
    assert found.operators_ms < 1.05 * found.profiled_ms
    assert from_plain(LayerProfile, json.loads(to_json(found))) == found


def test_overhead_is_at_most_what_a_profiled_run_has() -> None:
    rows = (LayerRow("a", "MatMul", 1, 6.0), LayerRow("b", "Add", 2, 2.0))
    assert LayerProfile("ort-cpu", 1, rows, total_ms=9.0, profiled_ms=11.0).overhead_ms == pytest.approx(1.0)
    assert LayerProfile("ort-cpu", 1, rows, total_ms=15.0, profiled_ms=11.0).overhead_ms == pytest.approx(3.0)
    assert LayerProfile("ort-cpu", 1, rows, total_ms=7.0, profiled_ms=11.0).overhead_ms == 0


def test_the_innermost_module_owns_and_a_wrapper_is_allowed_for() -> None:
    modules = ["blocks.1", "blocks.1.attn", "head"]
    assert innermost("blocks.1.attn.qkv", modules) == "blocks.1.attn"
    assert innermost("module.blocks.1.norm1", modules) == "blocks.1"
    assert innermost("module.module.blocks.1.attn.module", modules) == "blocks.1.attn"
    assert innermost("blocks.11.attn", modules) == OTHER
    assert innermost("module.tower.head", modules) == OTHER
    assert innermost("header", modules) == innermost("", modules) == OTHER


def test_sums_keep_the_order_of_the_operators() -> None:
    graph = [Operator("MatMul", "b.x"), Operator("Add", "a"), Operator("MatMul", "b.y"), Operator("Shape", "")]
    assert sum_by_module(graph, [1.0, 2.0, 3.0, 4.0], ["a", "b"]) == (
        LayerRow("b", "MatMul", 2, 4.0),
        LayerRow("a", "Add", 1, 2.0),
        LayerRow(OTHER, "Shape", 1, 4.0),
    )


def test_warm_up_and_runs_that_were_interrupted_do_not_count() -> None:
    runs = [[9.0], [1.0], [2.0], [50.0], [3.0], [0.5]]
    assert sorted(typical(runs, skip=1)) == [1, 2, 4]
    assert typical([[1.0]], skip=0) == [0]


def test_events_are_sorted_into_their_runs() -> None:
    def event(name: str, start: int, duration: int) -> dict[str, object]:
        kind = "Node" if name.endswith("time") else "Session"
        return {"cat": kind, "name": name, "ts": start, "dur": duration, "args": {"op_name": "X"}}

    events = [
        event("a_kernel_time", 12, 3),
        event("a_kernel_time", 22, 4),
        event("b_kernel_time", 16, 1),
        event("model_run", 10, 9),
        event("model_run", 20, 8),
        event("session_initialization", 0, 9),
    ]
    assert node_times(events) == [({"a": 0.003, "b": 0.001}, 0.009), ({"a": 0.004}, 0.008)]


def test_inserted_nodes_take_the_module_of_their_neighbours() -> None:
    from onnx import TensorProto, helper

    nodes = [
        helper.make_node("Conv", ["x"], ["blocked"], name="inserted"),
        helper.make_node("ReorderOutput", ["blocked"], ["conv"], name="kept"),
        helper.make_node("Gelu", ["conv"], ["gelu"], name="fused"),
        helper.make_node("Cast", ["gelu"], ["cast"], name="last"),
    ]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    graph = helper.make_graph(nodes, "g", [value], [])
    assert node_paths(graph, {"conv": "stem", "gelu": "act"}) == {
        "inserted": "stem",
        "kept": "stem",
        "fused": "act",
        "last": "act",
    }


@pytest.mark.parametrize(
    ("scopes", "path"),
    [
        ("['', 'm', 'm.a', 'linear']", "m.a"),
        ("['_empty_nn_module_stack_from_metadata_hook', 'size']", ""),
        ("['linear']", ""),
        ("[]", ""),
        ("not a list", ""),
    ],
)
def test_scopes_end_with_the_operation(scopes: str, path: str) -> None:
    assert module_path(scopes) == path


def test_a_file_without_scopes_is_all_other(mlp_onnx: Callable[[int], Path], sample: Feeds) -> None:
    found = layer_profile(Case("ort-cpu", 1, threads=1, seconds=0.1), mlp_onnx(32), sample, ["up"])
    assert {row.module for row in found.rows} == {OTHER}


@pytest.mark.parametrize("runtime", ["torch-compile", "torch-compile-cuda", "nonsense"])
def test_runtimes_without_a_profile_are_refused(runtime: str, sample: Feeds, tmp_path: Path) -> None:
    with pytest.raises(ProfilingError, match=f"{runtime}.*choose from ort-cpu"):
        layer_profile(Case(runtime, 1, 1, 1), tmp_path / "x", sample, [])


def test_what_cannot_be_profiled_is_one_line(mlp_onnx: Callable[[int], Path], sample: Feeds, tmp_path: Path) -> None:
    with pytest.raises(ProfilingError, match="does not exist"):
        layer_profile(CASE, tmp_path / "none.onnx", sample, [])
    with pytest.raises(ProfilingError, match="leading dimension"):
        layer_profile(CASE, mlp_onnx(32), {"x": np.zeros((2, 3), np.float32)}, [])
    with pytest.raises(ProfilingError, match="inputs are") as caught:
        layer_profile(CASE, mlp_onnx(32), {"y": sample["x"]}, [])
    assert "\n" not in str(caught.value)
