from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from exporters import (
    BUILDERS,
    PARITY_TOLERANCES,
    EngineConfig,
    ExportError,
    OnnxModule,
    OnnxSpec,
    build_engine,
    check_parity,
    input_ranges,
    onnx_from_program,
    onnx_in_precision,
    trace,
)
from exporters.onnx_writer import save_model
from exporters.quantization import Quantized, quantize
from exporters.smoothquant import equalise

from .test_mixed_precision import AXES, Net, batch

pytestmark = pytest.mark.slow


KINDS = {"int8": TensorProto.INT8, "fp8": TensorProto.FLOAT8E4M3FN}
MOST = {"int8": 127.0, "fp8": 448.0}


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    module = Net().eval()
    with torch.no_grad():
        # A channel that would take the whole range, as transformers have some.
        module.norm.weight[3] = 40.0
    return module


def written(module: nn.Module, path: Path, precision: Any, names: tuple[str, ...] = ("map", "logits")) -> Path:
    onnx_in_precision(trace(module, batch(), AXES), path, OnnxSpec(names, AXES), precision, [batch(8)])
    return path


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_a_quantized_file_is_near_float32(net: nn.Module, tmp_path: Path, precision: Quantized) -> None:
    path = written(net, tmp_path / "net.onnx", precision)
    rows = check_parity(net, path, [batch(1), batch(4)], ("map", "logits"), PARITY_TOLERANCES[precision], threads=1)
    assert all(row.passed for row in rows)
    assert all(row.max_abs_error > 1e-4 for row in rows)


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_linear_maps_are_quantized_and_nothing_else(net: nn.Module, tmp_path: Path, precision: Quantized) -> None:
    graph = onnx.load(written(net, tmp_path / "net.onnx", precision)).graph
    weights = {t.name: t for t in graph.initializer}
    made = {name: node for node in graph.node for name in node.output}

    def quantized(node: Any) -> bool:
        return [made[name].op_type for name in node.input[:2] if name in made] == ["DequantizeLinear"] * 2

    maps = [node for node in graph.node if node.op_type in ("MatMul", "Gemm")]
    # Queries, keys and values at once, the FFN's two and the head; attention's own two products are float32.
    assert sorted(map(quantized, maps)) == [False] * 2 + [True] * (len(maps) - 2)
    assert any(quantized(node) for node in graph.node if node.op_type == "Conv") == (precision == "int8")
    for node in graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero = weights[node.input[2]]
            assert zero.data_type == KINDS[precision]
            assert not numpy_helper.to_array(zero).astype(np.float32).any()
        if node.op_type == "DequantizeLinear" and node.input[0] in weights:
            # A scale for every output of the map.
            axis = next(a.i for a in node.attribute if a.name == "axis")
            assert weights[node.input[1]].dims == [weights[node.input[0]].dims[axis]]
    assert {v.type.tensor_type.elem_type for v in (*graph.input, *graph.output)} == {TensorProto.FLOAT}


class Map(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 5))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_one_map_is_what_its_formula_says(tmp_path: Path, precision: Quantized) -> None:
    torch.manual_seed(1)
    module, x = Map(), torch.randn(7, 6) * torch.tensor([1.0, 1, 30, 1, 0.1, 1])
    path = tmp_path / "map.onnx"
    onnx_in_precision(trace(module, {"x": x}, AXES), path, OnnxSpec(("y",), AXES), precision, [{"x": x}])
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    given = session.run(None, {"x": x.numpy()})[0]

    weight, values = module.weight.detach().double().numpy(), x.double().numpy()
    factors = np.abs(values).max(0) ** 0.8 / np.abs(weight).max(1) ** 0.2
    factors /= np.exp(np.log(factors).mean())

    def rounded(array: np.ndarray, scale: np.ndarray) -> np.ndarray:
        if precision == "int8":
            return np.clip(np.round(array / scale), -127, 127) * scale
        return (array / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float64) * scale

    equal, rows = values / factors, weight * factors[:, None]
    expected = rounded(equal, np.abs(equal).max() / MOST[precision]) @ rounded(
        rows, np.abs(rows).max(0) / MOST[precision]
    )
    # Some values lie so near the middle of two steps that float32 and float64 round them apart.
    assert np.mean(np.abs(given - expected) < 1e-4 * np.abs(expected).max()) > 0.8
    np.testing.assert_allclose(given, expected, atol=0.05 * np.abs(expected).max())


def test_equal_channels_leave_float32_as_it_was(net: nn.Module, tmp_path: Path) -> None:
    import onnx_ir as ir

    exact, equal = tmp_path / "exact.onnx", tmp_path / "equal.onnx"
    names = ("map", "logits")
    onnx_from_program(trace(net, batch(), AXES), exact, output_names=names, dynamic_axes=AXES)
    model = ir.load(exact)
    equalise(model, exact, [batch(8)])
    save_model(model, equal)
    rows = check_parity(net, equal, [batch(1), batch(4)], names, 1e-5, threads=1)
    assert all(row.passed for row in rows)
    operators = [node.op_type for node in onnx.load(equal).graph.node]
    before = [node.op_type for node in onnx.load(exact).graph.node]
    # The norm takes its map's factors over; the FFN's inputs, the residual stream and GELU's outputs, cannot.
    assert operators.count("Mul") - before.count("Mul") == 2


def test_outliers_cost_less_where_channels_are_made_equal(
    net: nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def error(path: Path) -> float:
        module = OnnxModule(written(net, path, "int8"), {"map": "map"}, threads=1)
        with torch.no_grad():
            return float((net(**batch(8))[0] - module(**batch(8))["map"]).square().mean())

    equal = error(tmp_path / "equal.onnx")
    monkeypatch.setattr("exporters.quantization.equalise", lambda *_: None)
    assert equal < 0.5 * error(tmp_path / "plain.onnx")


def test_the_module_of_every_operator_is_still_known(net: nn.Module, tmp_path: Path) -> None:
    graph = onnx.load(written(net, tmp_path / "net.onnx", "int8")).graph
    kinds = ("MatMul", "QuantizeLinear", "DequantizeLinear")
    maps = [node for node in graph.node if node.op_type in kinds]
    assert {node.op_type for node in maps} == set(kinds)
    assert all(any(p.key == "pkg.torch.onnx.name_scopes" for p in node.metadata_props) for node in maps)


def test_without_calibration_data_nothing_is_written(net: nn.Module, tmp_path: Path) -> None:
    exact = written(net, tmp_path / "exact.onnx", "fp32")
    with pytest.raises(ExportError, match=r"int8.*calibration"):
        quantize(exact, tmp_path / "net.onnx", [], "int8")
    assert list(tmp_path.iterdir()) == [exact]


def test_an_opset_without_fp8_is_refused(net: nn.Module, tmp_path: Path) -> None:
    exact = tmp_path / "exact.onnx"
    program = trace(net, batch(), AXES)
    onnx_from_program(program, exact, output_names=("map", "logits"), dynamic_axes=AXES, opset=18)
    with pytest.raises(ExportError, match=r"fp8.*opset 19.*opset 18"):
        quantize(exact, tmp_path / "net.onnx", [batch(8)], "fp8")
    assert list(tmp_path.iterdir()) == [exact]


@pytest.mark.parametrize("precision", ["int8", "fp8"])
def test_engines_are_built_of_it(net: nn.Module, tmp_path: Path, precision: Quantized) -> None:
    for package in (BUILDERS["rtx"].package, "polygraphy"):
        pytest.importorskip(package)
    path, engine = written(net, tmp_path / "net.onnx", precision), tmp_path / "net.engine"
    ranges = input_ranges({"x": (1, 3, 16, 16)}, AXES, (1, 4), 4, static=False)
    assert build_engine(path, engine, ranges, EngineConfig("rtx")).builder == "rtx"
