"""Layers of an engine, timed by the profiler of TensorRT or TensorRT for RTX."""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from profilers.errors import ProfilingError
from profilers.layer_profilers import Operator, ProfiledRuns, ProfileInputs, Record
from profilers.layer_profilers.scopes import node_module, read_graph
from profilers.runners.base import RunSettings
from profilers.runners.registry import RuntimeSpec
from profilers.runners.trt import TensorRTRunner

if TYPE_CHECKING:
    import tensorrt

# How a layer lists the nodes it was made of, separated by control characters.
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "Einsum")
_UNKNOWN = "layer"
_NOTHING_REPORTED = "the engine does not report the times of its layers"


class Node(NamedTuple):
    """A node of the ONNX file: its operator, and the path of the module it was traced in ("" if unknown)."""

    operator: str
    path: str


class ProfiledEngine(TensorRTRunner, ProfiledRuns):
    """An engine whose runs report the time of each layer.

    Raises:
        ProfilingError: see `TensorRTRunner`, or the engine reports nothing about its layers.
    """

    def __init__(self, path: Path, spec: RuntimeSpec, settings: RunSettings, inputs: ProfileInputs) -> None:
        super().__init__(path, spec, settings)
        self._owner, self._nodes = inputs.owner, _nodes(inputs.onnx) if inputs.onnx else {}
        self._layers_ms: list[dict[str, float]] = []
        self._whole_ms: list[float] = []
        # Keeps the tensors whose addresses the context now has. Prepare before the profiler is set: with a profiler no
        # run can be captured in a graph.
        self._prepared_run = self.prepare(inputs.feeds)
        self._context.profiler = self._profiler = _profiler(self._trt, self._layers_ms)
        # Report layers on request after the run, so that reporting takes no time of the run.
        self._context.enqueue_emits_profile = False

    def run(self) -> None:
        """See `ProfiledRuns`."""
        self._layers_ms.append({})
        start_ns = time.perf_counter_ns()
        if not self._context.execute_async_v3(self._stream.cuda_stream):
            raise ProfilingError("the engine did not run")
        self._stream.synchronize()
        self._whole_ms.append((time.perf_counter_ns() - start_ns) / 1e6)
        if not self._context.report_to_profiler():
            raise ProfilingError(_NOTHING_REPORTED)

    def finish(self) -> Record:
        """See `ProfiledRuns`."""
        names = list(dict.fromkeys(name for run in self._layers_ms for name in run))
        if not names:
            raise ProfilingError(_NOTHING_REPORTED)
        inspector = self._engine.create_engine_inspector()
        information = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        times_ms = [[run.get(name, 0.0) for name in names] for run in self._layers_ms]
        return Record(layer_operators(names, information, self._nodes, self._owner), times_ms, self._whole_ms)


def layer_operators(
    names: Sequence[str], information: str, nodes: Mapping[str, Node], owner: Callable[[str], str]
) -> list[Operator]:
    """Return the type of each layer in the builder's words ("gemm", "kgen"), and the module it belongs to.

    The builder fuses nodes of several modules into one layer. The layer belongs to the module of most of its nodes, on
    a tie to the first. If some nodes are matrix products or convolutions, which take the time, only those count. A
    layer without known nodes, such as a change of layout, belongs to the module of the next layer, or else of the one
    before it.

    Args:
        names: of the layers, in the order in which they run.
        information: the engine inspector's JSON.
        nodes: of the ONNX file, by name.
        owner: see `ProfileInputs`.
    """
    # Without details, the layers are names only.
    layers = {layer["Name"]: layer for layer in json.loads(information).get("Layers", []) if isinstance(layer, Mapping)}
    details = [layers.get(name, {}) for name in names]
    paths = [_path([nodes[n] for n in layer_nodes(layer) if n in nodes], owner) for layer in details]
    types = [str(layer.get("LayerType", _UNKNOWN)) for layer in details]
    return [Operator(*pair) for pair in zip(types, _fill_gaps(paths), strict=True)]


def layer_nodes(layer: Mapping[str, Any]) -> list[str]:
    """Return the names of the ONNX nodes that a layer of the inspector was made of, each once."""
    return list(dict.fromkeys(_NODE.findall(str(layer.get("Metadata", "")))))


def _path(nodes: Iterable[Node], owner: Callable[[str], str]) -> str:
    known = [node for node in nodes if node.path]
    voters = [node.path for node in known if node.operator in _PRODUCTS] or [node.path for node in known]
    if not voters:
        return ""
    # A counter keeps its keys in the order of their first occurrence, which decides ties.
    winner = Counter(map(owner, voters)).most_common(1)[0][0]
    return next(path for path in voters if owner(path) == winner)


def _fill_gaps(paths: Sequence[str]) -> list[str]:
    """Replace each "" by the next path that is not "", or else by the one before."""
    filled = list(paths)
    for order in (range(len(paths) - 2, -1, -1), range(1, len(paths))):
        for index in order:
            filled[index] = filled[index] or filled[index - order.step]
    return filled


def _nodes(onnx: Path) -> dict[str, Node]:
    return {node.name: Node(node.op_type, node_module(node)) for node in read_graph(onnx).node if node.name}


def _profiler(trt: Any, runs_ms: list[dict[str, float]]) -> "tensorrt.IProfiler":
    """Return a profiler that adds the time of each layer to the last of ``runs_ms``."""

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            runs_ms[-1][layer_name] = runs_ms[-1].get(layer_name, 0.0) + ms

    return Profiler()
