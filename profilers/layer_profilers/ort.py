"""Operators of an ONNX file as ONNX Runtime's own profiler times them."""

import json
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from profilers.errors import ProfilingError
from profilers.layer_profilers import Operator, Record
from profilers.layer_profilers.scopes import node_module, read_graph
from profilers.runners.base import Feeds, first_line
from profilers.runners.ort import OnnxRuntimeRunner, provider_options

# What an operator gives in float32 where it has no float16 kernel; a cast behind it has the tensor's own name.
_ROUNDED_LATER = "InsertedPrecisionFreeCast_"
_RUN = "model_run"
_KERNEL = "_kernel_time"


class ProfiledSession(OnnxRuntimeRunner):
    """An ONNX file in a session with profiling.

    What ONNX Runtime fuses and inserts has other names than the file's nodes, so the session also writes the graph it
    has made of them: a node belongs where the file's node of the same output does.

    Args:
        path: the ONNX file.
        provider: see `OnnxRuntimeRunner`.
        threads: intra-op threads.
        feeds: the inputs of all runs.
        folder: for the profile and the optimised graph.
        tf32: see `OnnxRuntimeRunner`.

    Raises:
        ProfilingError: the file cannot be loaded or profiled here.
    """

    def __init__(
        self, path: Path, provider: str, threads: int, feeds: Feeds, folder: Path, *, tf32: bool = False
    ) -> None:
        super().__init__(path, provider, threads, tf32=tf32)
        import onnxruntime as ort

        self._path, self._optimised = path, folder / "optimised.onnx"
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.enable_profiling = True
        options.profile_file_prefix = str(folder / "profile")
        options.optimized_model_filepath = str(self._optimised)
        # Weights in a file of their own, which nobody reads.
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights.bin")
        try:
            self._session = ort.InferenceSession(str(path), options, providers=provider_options(provider, tf32))
        except Exception as error:  # ONNX Runtime's exceptions have no common base
            raise ProfilingError(f"onnxruntime cannot profile {path}: {first_line(error)}") from error
        self.run = self.prepare(feeds)

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


def node_times(events: Iterable[Mapping[str, Any]]) -> list[tuple[dict[str, float], float]]:
    """For each run what its nodes and what it as a whole took, in milliseconds, from the events of a profile."""
    events = list(events)
    wholes = sorted((event["ts"], event["dur"]) for event in events if event["name"] == _RUN)
    starts = [start for start, _ in wholes]
    runs: list[dict[str, float]] = [{} for _ in wholes]
    for event in filter(_is_kernel, events):
        index = bisect_right(starts, event["ts"]) - 1
        if index >= 0:
            name = _node_name(event)
            runs[index][name] = runs[index].get(name, 0.0) + event["dur"] / 1e3
    return [(times, duration / 1e3) for times, (_, duration) in zip(runs, wholes, strict=True)]


def _is_kernel(event: Mapping[str, Any]) -> bool:
    return event["cat"] == "Node" and event["name"].endswith(_KERNEL)


def _node_name(event: Mapping[str, Any]) -> str:
    return str(event["name"]).removesuffix(_KERNEL)


def original_paths(graph: Any) -> dict[str, str]:
    """The module path of every tensor that a node of the exported graph makes."""
    return {tensor: node_module(node) for node in graph.node for tensor in node.output}


def node_paths(graph: Any, tensors: Mapping[str, str]) -> dict[str, str]:
    """The module path of every node of the optimised graph.

    That of an output which the exported graph has too; for inserted nodes, that of the nearest node that takes their
    output, else of the nearest one whose output they take.

    Args:
        tensors: see `original_paths`.
    """
    paths = {}
    for node in graph.node:
        made = (name.removeprefix(_ROUNDED_LATER) for name in node.output)
        known = [tensors[name] for name in made if name in tensors]
        if known:
            paths[node.name] = known[0]
    consumers = _neighbours((node.name, node.input) for node in graph.node)
    producers = _neighbours((node.name, node.output) for node in graph.node)
    # The nodes stand in an order in which they can run, so one pass each way finds the nearest.
    for node in reversed(graph.node):
        _adopt(paths, node.name, node.output, consumers)
    for node in graph.node:
        _adopt(paths, node.name, node.input, producers)
    return paths


def _neighbours(nodes: Iterable[tuple[str, Iterable[str]]]) -> dict[str, list[str]]:
    """Nodes by the tensors they have."""
    found: dict[str, list[str]] = {}
    for node, tensors in nodes:
        for tensor in tensors:
            found.setdefault(tensor, []).append(node)
    return found


def _adopt(paths: dict[str, str], node: str, tensors: Iterable[str], nodes: Mapping[str, list[str]]) -> None:
    if node in paths:
        return
    near = [paths[other] for tensor in tensors for other in nodes.get(tensor, ()) if other in paths]
    if near:
        paths[node] = near[0]
