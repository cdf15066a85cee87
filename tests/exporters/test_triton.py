from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper

from exporters import ExportError
from exporters.triton import Backend, model_file, triton_config

model_config_pb2 = pytest.importorskip("tritonclient.grpc.model_config_pb2")


def saved(folder: Path, kind: int = TensorProto.FLOAT, first: str | int = "batch") -> Path:
    """An ONNX file that gives its inputs back: tokens, a picture of that type, and one number a sample."""
    shapes = {"ids": (TensorProto.INT64, [first, "sequence"]), "x": (kind, [first, 3, 8]), "n": (kind, [first])}
    inputs = [helper.make_tensor_value_info(name, *told) for name, told in shapes.items()]
    outputs = [helper.make_tensor_value_info(f"{name}_out", *told) for name, told in shapes.items()]
    nodes = [helper.make_node("Identity", [name], [f"{name}_out"]) for name in shapes]
    graph = helper.make_graph(nodes, "same", inputs, outputs)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), folder / "m.onnx")
    return folder / "m.onnx"


def parsed(text: str) -> Any:
    return text_format.Parse(text, model_config_pb2.ModelConfig())


@pytest.mark.parametrize("backend", ["onnxruntime", "tensorrt"])
def test_tritons_own_schema_reads_the_configuration(tmp_path: Path, backend: Backend) -> None:
    config = parsed(triton_config("mine", backend, saved(tmp_path), [8, 1, 8]))
    assert (config.name, config.backend, config.max_batch_size) == ("mine", backend, 8)
    assert list(config.dynamic_batching.preferred_batch_size) == [1, 8]
    for given, suffix in ((config.input, ""), (config.output, "_out")):
        assert [t.name for t in given] == [f"ids{suffix}", f"x{suffix}", f"n{suffix}"]
        assert [list(t.dims) for t in given] == [[-1], [3, 8], [1]]
        assert [t.data_type for t in given] == [model_config_pb2.TYPE_INT64, *[model_config_pb2.TYPE_FP32] * 2]
        assert given[2].HasField("reshape") and list(given[2].reshape.shape) == []


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("FLOAT16", "FP16"), ("BFLOAT16", "BF16"), ("DOUBLE", "FP64"), ("UINT8", "UINT8"), ("BOOL", "BOOL")],
)
def test_types_are_tritons(tmp_path: Path, kind: str, expected: str) -> None:
    config = parsed(triton_config("mine", "onnxruntime", saved(tmp_path, TensorProto.DataType.Value(kind)), [1]))
    assert config.input[1].data_type == model_config_pb2.DataType.Value(f"TYPE_{expected}")


def test_a_fixed_batch_cannot_be_served(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^ids has no dynamic batch as its first dimension"):
        triton_config("mine", "onnxruntime", saved(tmp_path, first=4), [1])


def test_a_type_without_a_name_in_triton_is_told(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^x is of type COMPLEX64, which Triton does not have$"):
        triton_config("mine", "onnxruntime", saved(tmp_path, TensorProto.COMPLEX64), [1])


def test_models_lie_where_triton_looks(tmp_path: Path) -> None:
    assert model_file(tmp_path, "onnxruntime") == tmp_path / "1" / "model.onnx"
    assert model_file(tmp_path, "tensorrt") == tmp_path / "1" / "model.plan"
