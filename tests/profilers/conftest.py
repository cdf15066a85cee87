"""Tiny networks as files: an MLP of some width as ONNX, and a torch one with its exported program."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

FEATURES = 64


@pytest.fixture(scope="session")
def mlp_onnx(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Writes x → relu(x·W1) · W2 · W3 of a hidden width, with a dynamic batch."""

    def write(width: int) -> Path:
        rng = np.random.default_rng(width)
        shapes = {"w1": (FEATURES, width), "w2": (width, width), "w3": (width, FEATURES)}
        weights = {name: rng.normal(size=shape).astype(np.float32) * 0.02 for name, shape in shapes.items()}
        nodes = [
            helper.make_node("MatMul", ["x", "w1"], ["h1"]),
            helper.make_node("Relu", ["h1"], ["r1"]),
            helper.make_node("MatMul", ["r1", "w2"], ["h2"]),
            helper.make_node("MatMul", ["h2", "w3"], ["y"]),
        ]
        graph = helper.make_graph(
            nodes,
            "mlp",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", FEATURES])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", FEATURES])],
            [numpy_helper.from_array(array, name) for name, array in weights.items()],
        )
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        path = tmp_path_factory.mktemp("onnx") / f"mlp{width}.onnx"
        onnx.save(model, path)
        return path

    return write


class Mlp(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = torch.nn.Linear(FEATURES, width)
        self.down = torch.nn.Linear(width, FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.relu(self.up(x)))


@pytest.fixture(scope="session")
def mlp_program(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], tuple[torch.nn.Module, Path]]:
    """Exports an MLP of a hidden width with a dynamic batch; the module and its `.pt2` file."""

    def write(width: int) -> tuple[torch.nn.Module, Path]:
        torch.manual_seed(width)
        module = Mlp(width).eval()
        batch = torch.export.Dim("batch", min=1)
        program = torch.export.export(module, (torch.randn(2, FEATURES),), dynamic_shapes=({0: batch},))
        path = tmp_path_factory.mktemp("program") / f"mlp{width}.pt2"
        torch.export.save(program, path)
        return module, path

    return write


@pytest.fixture
def sample() -> dict[str, NDArray[np.float32]]:
    return {"x": np.random.default_rng(0).normal(size=(1, FEATURES)).astype(np.float32)}
