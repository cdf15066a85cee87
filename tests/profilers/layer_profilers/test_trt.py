import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from engine_runtimes import needs_device
from tiny_models import classifier

from exporters import EngineConfig, build_engine, input_ranges, onnx_from_program, trace
from optin_deploy.network import Network, TensorOutputs
from profilers import SPECS, Case, ProfilingError, layer_profile
from profilers.layer_profilers import Operator, ProfileInputs
from profilers.layer_profilers import trt as engines
from profilers.layer_profilers.trt import Node, ProfiledEngine, layer_nodes, layer_operators
from profilers.layer_times import OTHER
from profilers.runners.base import RunSettings
from profilers.runners.trt import TensorRTRunner
from profilers.workers.layers import innermost

pytestmark = pytest.mark.slow


MODULES = ("stem", "blocks.0", "blocks.0.attn", "blocks.0.mlp")
OWNER = partial(innermost, modules=MODULES)
NODES = {
    "conv": Node("Conv", "m.stem.proj"),
    "norm": Node("LayerNormalization", "m.blocks.0.norm"),
    "q": Node("MatMul", "m.blocks.0.attn.q"),
    "q_bias": Node("Add", "m.blocks.0.attn.q"),
    "k": Node("MatMul", "m.blocks.0.attn.k"),
    "fc1": Node("MatMul", "m.blocks.0.mlp.fc1"),
    "gelu": Node("Gelu", "m.blocks.0.mlp.act"),
    "residual": Node("Add", "m.blocks.0"),
    "lost": Node("Shape", ""),
}


def layer(name: str, kind: str, *nodes: str, separator: str = "\x1e") -> dict[str, Any]:
    return {"Name": name, "LayerType": kind, "Metadata": separator.join(f"[ONNX Layer: {node}]" for node in nodes)}


def told(*layers: Any, names: list[str] | None = None) -> list[Operator]:
    names = names or [each["Name"] for each in layers]
    return layer_operators(names, json.dumps({"Layers": layers, "Bindings": []}), NODES, OWNER)


@pytest.mark.parametrize("separator", ["\x1e", "\x1f", ""])
def test_a_layer_names_its_nodes(separator: str) -> None:
    assert layer_nodes(layer("x", "gemm", "a/b", "node_linear", "a/b", separator=separator)) == ["a/b", "node_linear"]
    assert layer_nodes({"Name": "x"}) == []


@pytest.mark.parametrize(
    ("nodes", "module"),
    [
        (("conv",), "stem"),
        (("norm", "residual", "gelu"), "blocks.0"),
        (("gelu", "norm"), "blocks.0.mlp"),
        (("norm", "gelu"), "blocks.0"),
        # The products count, however many other nodes there are; each is counted to its module, not to its own part.
        (("residual", "norm", "gelu", "fc1"), "blocks.0.mlp"),
        (("fc1", "q", "k"), "blocks.0.attn"),
        (("fc1", "q", "q_bias"), "blocks.0.mlp"),
        (("lost", "gelu"), "blocks.0.mlp"),
    ],
)
def test_a_fused_layer_belongs_to_one_module(nodes: tuple[str, ...], module: str) -> None:
    (operator,) = told(layer("x", "kgen", *nodes))
    assert (operator.type, OWNER(operator.path)) == ("kgen", module)


def test_layers_of_no_node_take_the_module_of_the_next_and_the_last_that_of_the_one_before() -> None:
    found = told(
        layer("in", "Reformat"),
        layer("a", "CaskConvolution", "conv"),
        layer("b", "Reformat", "not in the file"),
        layer("c", "gemm", "fc1"),
        layer("out", "Reformat"),
    )
    assert [OWNER(each.path) for each in found] == ["stem", "stem", "blocks.0.mlp", "blocks.0.mlp", "blocks.0.mlp"]


def test_an_engine_without_details_has_neither_types_nor_modules() -> None:
    assert told("a", "b", names=["a", "b"]) == [Operator("layer", ""), Operator("layer", "")]
    assert told(layer("a", "gemm", "fc1"), names=["a", "unknown"])[1].type == "layer"


class FakeContext:
    """Tells the profiler its layers, one of them in two pieces, when it is asked to."""

    def __init__(self, layers: list[tuple[str, float]]) -> None:
        self.layers, self.profiler, self.enqueue_emits_profile, self.runs = layers, SimpleNamespace(), True, 0

    def execute_async_v3(self, stream: int) -> bool:
        assert not self.enqueue_emits_profile and stream == 7
        self.runs += 1
        return True

    def report_to_profiler(self) -> bool:
        for name, ms in self.layers:
            self.profiler.report_layer_time(name, ms * self.runs)
        return True


def engine(monkeypatch: pytest.MonkeyPatch, layers: list[tuple[str, float]], onnx: Path | None) -> ProfiledEngine:
    information = json.dumps({"Layers": [layer("stem + x", "Reformat"), layer("fc", "gemm", "fc1")]})

    def open_fake(self: Any, *_: object) -> None:
        self._trt = SimpleNamespace(
            IProfiler=type("IProfiler", (), {"__init__": lambda _: None}),
            LayerInformationFormat=SimpleNamespace(JSON=1),
        )
        inspector = SimpleNamespace(get_engine_information=lambda form: information)
        self._engine = SimpleNamespace(create_engine_inspector=lambda: inspector)
        self._context, self._stream = FakeContext(layers), SimpleNamespace(cuda_stream=7, synchronize=lambda: None)

    monkeypatch.setattr(TensorRTRunner, "__init__", open_fake)
    monkeypatch.setattr(TensorRTRunner, "prepare", lambda self, feeds: None)
    monkeypatch.setattr(engines, "_nodes", lambda path: NODES)
    inputs = ProfileInputs({"x": np.zeros(1)}, Path(), onnx, OWNER)
    return ProfiledEngine(Path("net.engine"), SPECS["rtx"], RunSettings(1), inputs)


def test_runs_are_kept_apart_and_a_layers_pieces_summed(monkeypatch: pytest.MonkeyPatch) -> None:
    profiled = engine(monkeypatch, [("stem + x", 0.5), ("fc", 1.0), ("fc", 2.0)], Path("net.onnx"))
    profiled.run()
    profiled.run()
    record = profiled.finish()
    assert [(each.type, OWNER(each.path)) for each in record.operators] == [
        ("Reformat", "blocks.0.mlp"),
        ("gemm", "blocks.0.mlp"),
    ]
    assert record.times_ms == [[0.5, 3.0], [1.0, 6.0]]
    assert len(record.whole_ms) == 2 and min(record.whole_ms) > 0


def test_without_the_onnx_file_all_is_other(monkeypatch: pytest.MonkeyPatch) -> None:
    profiled = engine(monkeypatch, [("fc", 1.0)], None)
    profiled.run()
    assert [(each.type, OWNER(each.path)) for each in profiled.finish().operators] == [("gemm", OTHER)]


def test_an_engine_that_tells_nothing_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    profiled = engine(monkeypatch, [], None)
    profiled.run()
    with pytest.raises(ProfilingError, match="does not report"):
        profiled.finish()


def exported(network: Network, path: Path) -> Path:
    program = trace(TensorOutputs(network.module, network.outputs), network.inputs, network.dynamic_axes)
    onnx_from_program(program, path, output_names=tuple(network.outputs), dynamic_axes=network.dynamic_axes)
    return path


def test_nodes_of_a_real_file_have_their_modules(tmp_path: Path) -> None:
    nodes = engines._nodes(exported(classifier(10, depth=1), tmp_path / "net.onnx"))
    own: Callable[[str], str] = partial(innermost, modules=["patch_embed", "blocks.0.attn", "blocks.0.mlp", "head"])
    products = [own(node.path) for node in nodes.values() if node.operator in engines._PRODUCTS]
    assert products == ["patch_embed", *["blocks.0.attn"] * 4, *["blocks.0.mlp"] * 2, "head"]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("runtime", ["rtx", "tensorrt"])
def test_the_layers_of_a_real_engine_add_up(tmp_path: Path, runtime: str) -> None:
    needs_device(runtime)
    network = classifier(10, depth=1)
    onnx, path = exported(network, tmp_path / "net.onnx"), tmp_path / "net.engine"
    shapes = {name: tuple(t.shape) for name, t in network.inputs.items()}
    inputs = input_ranges(shapes, network.dynamic_axes, (2,), 2, static=True)
    build_engine(onnx, path, inputs, EngineConfig(runtime))
    sample = network.sample_arrays()
    modules = ("patch_embed", "blocks.0.attn", "blocks.0.mlp", "head")
    found = layer_profile(Case(runtime, 2, threads=1, seconds=0.5), path, sample, modules, onnx=onnx)
    assert {"blocks.0.attn", "blocks.0.mlp"} <= {row.module for row in found.rows}
    assert 0 < found.operators_ms < 1.1 * found.profiled_ms
