"""Operators of an ONNX file, timed by ONNX Runtime's own profiler."""

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from profilers.errors import ProfilingError
from profilers.layer_profilers import Operator, ProfiledRuns, ProfileInputs, Record
from profilers.layer_profilers.scopes import node_module, read_graph
from profilers.runners.base import RunSettings, first_line
from profilers.runners.ort import OnnxRuntimeRunner, provider_options, session_options
from profilers.runners.registry import RuntimeSpec

if TYPE_CHECKING:
    from onnx import GraphProto

Event = Mapping[str, Any]
"""One entry of ONNX Runtime's profile."""

# Prefix of an operator's float32 output if it has no float16 kernel; the cast after it has the tensor's own name.
_ROUNDED_LATER = "InsertedPrecisionFreeCast_"
_RUN = "model_run"
_KERNEL = "_kernel_time"


class ProfiledSession(OnnxRuntimeRunner, ProfiledRuns):
    """An ONNX file in a session with profiling.

    ONNX Runtime fuses and inserts nodes under other names than the file's. So the session also writes its optimised
    graph: a node belongs to the module of the file's node with the same output.

    Raises:
        ProfilingError: the file cannot be loaded or profiled on this machine.
    """

    def __init__(self, path: Path, spec: RuntimeSpec, settings: RunSettings, inputs: ProfileInputs) -> None:
        super().__init__(path, spec, settings)
        import onnxruntime as ort

        self._path, self._optimised = path, inputs.folder / "optimised.onnx"
        options = session_options(ort, settings)
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(inputs.folder / "profile")
        options.optimized_model_filepath = str(self._optimised)
        # Put the weights into a file of their own, which nobody reads.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        providers = provider_options(spec.provider, settings.tf32)
        try:
            self._session = ort.InferenceSession(str(path), options, providers=providers)
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise ProfilingError(f"onnxruntime cannot profile {path}: {first_line(error)}") from error
        self._run = self.prepare(inputs.feeds)

    def run(self) -> None:
        """See `ProfiledRuns`."""
        self._run()

    def finish(self) -> Record:
        """See `ProfiledRuns`."""
        events = json.loads(Path(self._session.end_profiling()).read_text())
        runs = node_times(events)
        if not runs:
            raise ProfilingError("onnxruntime's profile holds no run: try another version of onnxruntime")
        types = {_node_name(event): event["args"]["op_name"] for event in events if _is_kernel(event)}
        paths = node_paths(read_graph(self._optimised), original_paths(read_graph(self._path)))
        return Record(
            [Operator(kind, paths.get(name, "")) for name, kind in types.items()],
            [[times.get(name, 0.0) for name in types] for times, _ in runs],
            [whole_ms for _, whole_ms in runs],
        )


def node_times(events: Sequence[Event]) -> list[tuple[dict[str, float], float]]:
    """Return, for each run in a profile, the milliseconds of its nodes by name and of the whole run."""
    wholes = sorted((event["ts"], event["dur"]) for event in events if event["name"] == _RUN)
    starts = [start for start, _ in wholes]
    runs: list[dict[str, float]] = [{} for _ in wholes]
    for event in filter(_is_kernel, events):
        index = bisect_right(starts, event["ts"]) - 1
        if index >= 0:
            name = _node_name(event)
            runs[index][name] = runs[index].get(name, 0.0) + event["dur"] / 1e3
    return [(times, duration / 1e3) for times, (_, duration) in zip(runs, wholes, strict=True)]


def _is_kernel(event: Event) -> bool:
    return event["cat"] == "Node" and event["name"].endswith(_KERNEL)


def _node_name(event: Event) -> str:
    return str(event["name"]).removesuffix(_KERNEL)


def original_paths(graph: "GraphProto") -> dict[str, str]:
    """Return the module path of every tensor that a node of the exported graph computes."""
    return {tensor: node_module(node) for node in graph.node for tensor in node.output}


def node_paths(graph: "GraphProto", tensors: Mapping[str, str]) -> dict[str, str]:
    """Return the module path of every node of the optimised graph.

    A node has the path of an output that the exported graph has too. An inserted node has the path of the nearest node
    that takes its output, or else of the nearest node whose output it takes.

    Args:
        graph: the optimised graph.
        tensors: see `original_paths`.
    """
    paths = {}
    for node in graph.node:
        outputs = (name.removeprefix(_ROUNDED_LATER) for name in node.output)
        known = [tensors[name] for name in outputs if name in tensors]
        if known:
            paths[node.name] = known[0]
    consumers = _neighbours((node.name, node.input) for node in graph.node)
    producers = _neighbours((node.name, node.output) for node in graph.node)
    # The nodes are in an order in which they can run, so one pass each way finds the nearest.
    for node in reversed(graph.node):
        _adopt(paths, node.name, node.output, consumers)
    for node in graph.node:
        _adopt(paths, node.name, node.input, producers)
    return paths


def _neighbours(nodes: Iterable[tuple[str, Iterable[str]]]) -> dict[str, list[str]]:
    """Return the names of nodes by tensor, from the tensors of each node."""
    by_tensor: dict[str, list[str]] = {}
    for node, tensors in nodes:
        for tensor in tensors:
            by_tensor.setdefault(tensor, []).append(node)
    return by_tensor


def _adopt(paths: dict[str, str], node: str, tensors: Iterable[str], nodes: Mapping[str, list[str]]) -> None:
    """Give a node without a path that of the first of ``nodes`` that shares one of the tensors and has a path."""
    if node in paths:
        return
    near = [paths[other] for tensor in tensors for other in nodes.get(tensor, ()) if other in paths]
    if near:
        paths[node] = near[0]
