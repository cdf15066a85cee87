from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx
import pytest
from google.protobuf import text_format
from onnx import TensorProto, helper

from exporters import ExportError
from exporters.triton_repository import Engine, model_file, triton_config

pytestmark = pytest.mark.slow


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


SAMPLE = {"ids": (2, 16), "x": (2, 3, 8), "n": (2,)}
ENGINE = Engine("10.15.1.29")


@pytest.mark.parametrize("engine", [None, ENGINE])
def test_tritons_own_schema_reads_the_configuration(tmp_path: Path, engine: Engine | None) -> None:
    config = parsed(triton_config("mine", saved(tmp_path), 8, SAMPLE, engine))
    backend = "tensorrt" if engine else "onnxruntime"
    assert (config.name, config.backend, config.max_batch_size) == ("mine", backend, 8)
    assert config.HasField("dynamic_batching") and not config.dynamic_batching.preferred_batch_size
    assert config.optimization.cuda.graphs == (engine is not None)
    for given, suffix in ((config.input, ""), (config.output, "_out")):
        assert [t.name for t in given] == [f"ids{suffix}", f"x{suffix}", f"n{suffix}"]
        assert [list(t.dims) for t in given] == [[-1], [3, 8], [1]]
        assert [t.data_type for t in given] == [model_config_pb2.TYPE_INT64, *[model_config_pb2.TYPE_FP32] * 2]
        assert given[2].HasField("reshape") and list(given[2].reshape.shape) == []


def test_the_smallest_and_the_largest_batch_are_warmed_up(tmp_path: Path) -> None:
    config = parsed(triton_config("mine", saved(tmp_path), 8, SAMPLE))
    assert [request.batch_size for request in config.model_warmup] == [1, 8]
    for request in config.model_warmup:
        assert {name: list(value.dims) for name, value in request.inputs.items()} == {
            "ids": [16],
            "x": [3, 8],
            "n": [1],
        }
        assert all(value.zero_data for value in request.inputs.values())
        assert request.inputs["ids"].data_type == model_config_pb2.TYPE_INT64


def test_comments_say_how_to_measure_and_serve(tmp_path: Path) -> None:
    text = triton_config("mine", saved(tmp_path), 8, SAMPLE, replace(ENGINE, version_compatible=True))
    assert "# Measure: perf_analyzer -m mine -b 1 --concurrency-range 1:16 --shape ids:16 --shape x:3,8\n" in text
    assert "# Built by TensorRT 10.15.1.29." in text
    assert "tritonserver --backend-config=tensorrt,version-compatible=true\n" in text
    assert "version-compatible" not in triton_config("mine", saved(tmp_path), 8, SAMPLE, ENGINE)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [("FLOAT16", "FP16"), ("BFLOAT16", "BF16"), ("DOUBLE", "FP64"), ("UINT8", "UINT8"), ("BOOL", "BOOL")],
)
def test_types_are_tritons(tmp_path: Path, kind: str, expected: str) -> None:
    config = parsed(triton_config("mine", saved(tmp_path, TensorProto.DataType.Value(kind)), 1, SAMPLE))
    assert config.input[1].data_type == model_config_pb2.DataType.Value(f"TYPE_{expected}")


def test_a_fixed_batch_cannot_be_served(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^ids .*dynamic batch"):
        triton_config("mine", saved(tmp_path, first=4), 1, SAMPLE)


def test_a_type_without_a_name_in_triton_is_told(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"^x .*COMPLEX64.*Triton"):
        triton_config("mine", saved(tmp_path, TensorProto.COMPLEX64), 1, SAMPLE)


def test_models_lie_where_triton_looks(tmp_path: Path) -> None:
    assert model_file(tmp_path, "onnxruntime") == tmp_path / "1" / "model.onnx"
    assert model_file(tmp_path, "tensorrt") == tmp_path / "1" / "model.plan"
