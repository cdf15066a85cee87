"""Layers of an engine as the profiler of the product that built it times them."""

import json
import re
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from profilers.errors import ProfilingError
from profilers.layer_profilers import Operator, Record
from profilers.layer_profilers.scopes import node_module, read_graph
from profilers.runners.base import Feeds
from profilers.runners.trt import TensorRTRunner

# A layer names the nodes that it was made of so, separated by control characters.
_NODE = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
_PRODUCTS = ("MatMul", "Gemm", "Conv", "ConvTranspose", "Attention", "Einsum")
_UNKNOWN = "layer"


class Node(NamedTuple):
    """A node of the ONNX file: its operator, and the path of the module that it was traced in ("" where unknown)."""

    operator: str
    path: str


class ProfiledEngine(TensorRTRunner):
    """An engine whose runs tell what each of its layers took.

    Args:
        path: the engine.
        runtime: `tensorrt` or `rtx`.
        feeds: the inputs of all runs.
        onnx: the file that it was built of; without it no layer has a module.
        owner: a module's path to the module that its time is counted to.

    Raises:
        ProfilingError: see `TensorRTRunner`; or the engine tells nothing of its layers.
    """

    def __init__(self, path: Path, runtime: str, feeds: Feeds, onnx: Path | None, owner: Callable[[str], str]) -> None:
        super().__init__(path, runtime)
        self._owner, self._nodes = owner, _nodes(onnx) if onnx else {}
        self._layers_ms: list[dict[str, float]] = []
        self._whole_ms: list[float] = []
        # Holds the tensors whose addresses the context now has. The profiler comes after it: while it is there, no run
        # can be captured in a graph.
        self._prepared_run = self.prepare(feeds)
        self._context.profiler = self._profiler = _profiler(self._trt, self._layers_ms)
        # Layers are reported when they are asked for, after the run, so that telling takes none of its time.
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
            raise ProfilingError("the engine does not tell what its layers took")

    def finish(self) -> Record:
        """See `ProfiledRuns`."""
        names = list(dict.fromkeys(name for run in self._layers_ms for name in run))
        if not names:
            raise ProfilingError("the engine does not tell what its layers took")
        inspector = self._engine.create_engine_inspector()
        information = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        times_ms = [[run.get(name, 0.0) for name in names] for run in self._layers_ms]
        return Record(layer_operators(names, information, self._nodes, self._owner), times_ms, self._whole_ms)


def layer_operators(
    names: Sequence[str], information: str, nodes: Mapping[str, Node], owner: Callable[[str], str]
) -> list[Operator]:
    """The type of each layer in the builder's words ("gemm", "kgen"), and the module it belongs to.

    The builder fuses nodes of several modules into one layer. It belongs to the module of most of its nodes, the first
    on a tie; but where some of them are matrix products or convolutions, which take the time, only those count. A layer
    of no known node, such as one that changes a layout, belongs where the next one does, or else the one before it.

    Args:
        names: of layers, in the order in which they run.
        information: the engine inspector's JSON.
        nodes: those of the ONNX file, by name.
        owner: a module's path to the module that its time is counted to.
    """
    # Without details, the layers are names only.
    layers = {layer["Name"]: layer for layer in json.loads(information).get("Layers", []) if isinstance(layer, Mapping)}
    told = [layers.get(name, {}) for name in names]
    paths = [_path([nodes[n] for n in layer_nodes(layer) if n in nodes], owner) for layer in told]
    types = [str(layer.get("LayerType", _UNKNOWN)) for layer in told]
    return [Operator(*pair) for pair in zip(types, _adopted(paths), strict=True)]


def layer_nodes(layer: Mapping[str, Any]) -> list[str]:
    """The names of the ONNX nodes that a layer of the inspector's was made of, each once."""
    return list(dict.fromkeys(_NODE.findall(str(layer.get("Metadata", "")))))


def _path(nodes: Iterable[Node], owner: Callable[[str], str]) -> str:
    known = [node for node in nodes if node.path]
    voters = [node.path for node in known if node.operator in _PRODUCTS] or [node.path for node in known]
    if not voters:
        return ""
    # Counters keep the order in which they first see what they count.
    winner = Counter(map(owner, voters)).most_common(1)[0][0]
    return next(path for path in voters if owner(path) == winner)


def _adopted(paths: Sequence[str]) -> list[str]:
    """The paths, with those that are "" replaced by the next that is not, or else by the one before."""
    adopted = list(paths)
    for order in (range(len(paths) - 2, -1, -1), range(1, len(paths))):
        step = order.step
        for index in order:
            adopted[index] = adopted[index] or adopted[index - step]
    return adopted


def _nodes(onnx: Path) -> dict[str, Node]:
    return {node.name: Node(node.op_type, node_module(node)) for node in read_graph(onnx).node if node.name}


def _profiler(trt: Any, runs_ms: list[dict[str, float]]) -> Any:
    """A profiler that adds what each layer took to the last of ``runs_ms``."""

    class Profiler(trt.IProfiler):
        def __init__(self) -> None:
            trt.IProfiler.__init__(self)

        def report_layer_time(self, layer_name: str, ms: float) -> None:
            runs_ms[-1][layer_name] = runs_ms[-1].get(layer_name, 0.0) + ms

    return Profiler()
