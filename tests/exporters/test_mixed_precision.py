import copy
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto
from torch import Tensor, nn

from exporters import (
    PARITY_TOLERANCES,
    OnnxModule,
    Precision,
    check_parity,
    in_precision,
    onnx_from_program,
    runnable_on_cpu,
    trace,
)

pytestmark = pytest.mark.slow


LOW = {"fp16": (torch.float16, TensorProto.FLOAT16), "bf16": (torch.bfloat16, TensorProto.BFLOAT16)}
AXES = {"x": {0: "batch"}}


class Net(nn.Module):
    """A convolution, norms, an attention and an FFN; gives a map and logits."""

    def __init__(self) -> None:
        super().__init__()
        self.patch, self.norm, self.qkv = nn.Conv2d(3, 16, 4, stride=4), nn.LayerNorm(16), nn.Linear(16, 48)
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 5)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.patch(x).flatten(2).transpose(1, 2)
        q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + self.down(nn.functional.gelu(self.up(x)))
        return x, self.head(x.mean(1))


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return Net().eval()


def batch(size: int = 3) -> dict[str, Tensor]:
    return {"x": torch.randn(size, 3, 16, 16, generator=torch.Generator().manual_seed(size))}


def exported(module: nn.Module, precision: Precision, folder: Path, opset: int = 20) -> Path:
    path = folder / f"net.{precision}.onnx"
    program = in_precision(trace(module, batch(), AXES), precision, opset)
    onnx_from_program(program, path, output_names=("map", "logits"), dynamic_axes=AXES, opset=opset)
    return path


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_file_of_low_precision_is_near_float32(
    net: nn.Module, tmp_path: Path, precision: Precision, opset: int
) -> None:
    path = exported(net, precision, tmp_path, opset)
    with runnable_on_cpu(path, precision) as file:
        rows = check_parity(net, file, [batch(1), batch(4)], ("map", "logits"), PARITY_TOLERANCES[precision], threads=1)
    assert all(row.passed for row in rows)
    # Of float32 it would be a thousand times nearer.
    assert all(row.max_abs_error > 1e-5 for row in rows)


@pytest.mark.parametrize(("precision", "opset"), [("fp16", 20), ("bf16", 20), ("bf16", 23)])
def test_the_graph_says_what_is_computed_how(net: nn.Module, tmp_path: Path, precision: Precision, opset: int) -> None:
    model = onnx.load(exported(net, precision, tmp_path, opset))
    kinds = {v.name: v.type.tensor_type.elem_type for v in (*model.graph.value_info, *model.graph.output)}
    low = LOW[precision][1]
    assert {v.type.tensor_type.elem_type for v in (*model.graph.input, *model.graph.output)} == {TensorProto.FLOAT}
    assert all(t.data_type == low for t in model.graph.initializer if t.dims and t.dims[0] in (32, 48))
    of_type = {node.op_type: kinds[node.output[0]] for node in model.graph.node}
    # ONNX computes a layer norm of any type in float32.
    assert of_type["MatMul"] == of_type["Gelu"] == of_type["LayerNormalization"] == low
    # There is no bfloat16 convolution before opset 22.
    assert of_type["Conv"] == (TensorProto.FLOAT if (precision, opset) == ("bf16", 20) else low)


def test_float32_is_the_program_itself_and_others_leave_the_module_alone(net: nn.Module) -> None:
    before = copy.deepcopy(net.state_dict())
    program = trace(net, batch(), AXES)
    assert in_precision(program, "fp32", 20) is program
    low = in_precision(program, "bf16", 20)
    assert {t.dtype for n, t in low.state_dict.items() if "patch" not in n} == {torch.bfloat16}
    assert all(torch.equal(t, before[n]) and t.dtype == torch.float32 for n, t in net.state_dict().items())
    assert {t.dtype for t in low.module()(**batch())} == {torch.float32}


class Steps(nn.Module):
    """Three operators, one behind the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = (nn.Parameter(torch.randn(8, 8)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x @ self.first) @ self.second


def test_emulation_rounds_after_every_operator(tmp_path: Path) -> None:
    torch.manual_seed(1)
    module, x = Steps(), torch.randn(4, 8)
    path = tmp_path / "steps.onnx"
    program = in_precision(trace(module, {"x": x}, AXES), "bf16", 20)
    onnx_from_program(program, path, output_names=("y",), dynamic_axes=AXES)
    with runnable_on_cpu(path, "bf16") as file:
        assert file != path
        given = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"]).run(None, {"x": x.numpy()})[0]
    assert not file.exists()

    def rounded(t: Tensor) -> Tensor:
        return t.to(torch.bfloat16).float()

    with torch.no_grad():
        first = rounded(rounded(x) @ rounded(module.first))
        expected = rounded(rounded(first.relu()) @ rounded(module.second))
    np.testing.assert_allclose(given, expected.numpy(), rtol=2**-7)
    assert (given == expected.numpy()).mean() > 0.9


def test_a_file_takes_a_modules_place(net: nn.Module, tmp_path: Path) -> None:
    module = OnnxModule(exported(net, "fp32", tmp_path), {"map": "output_0", "logits": "output_1"}, threads=1)
    given = module(**batch(5))
    with torch.no_grad():
        for ours, theirs in zip(net(**batch(5)), (given["output_0"], given["output_1"]), strict=True):
            torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)
