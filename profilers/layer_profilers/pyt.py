"""Operators of an exported program, timed one by one."""

import time
from pathlib import Path
from typing import Any

import torch

from profilers.layer_profilers import Operator, Record
from profilers.runners.base import Feeds
from profilers.runners.pyt import TorchRunner

_NO_MODULE = "_empty_nn_module_stack"


class ProfiledProgram(TorchRunner):
    """An exported program whose graph is run node by node.

    Args:
        path: a `.pt2` file.
        device: `cpu` or `cuda`.
        threads: intra-op threads.
        feeds: the inputs of all runs.
        tf32: see `TorchRunner`.

    Raises:
        ProfilingError: see `TorchRunner`.
    """

    def __init__(self, path: Path, device: str, threads: int, feeds: Feeds, *, tf32: bool = False) -> None:
        super().__init__(path, device, threads, tf32=tf32)
        self._timer = _Timer(self._forward.__self__, cuda=device == "cuda")
        self._inputs_on_device = self._place(feeds)
        self._whole_ms: list[float] = []

    def run(self) -> None:
        """See `ProfiledRuns`."""
        self._timer.runs_ms.append([])
        start_ns = time.perf_counter_ns()
        with torch.inference_mode():
            self._timer.run(*self._inputs_on_device)
        self._whole_ms.append((time.perf_counter_ns() - start_ns) / 1e6)

    def finish(self) -> Record:
        """See `ProfiledRuns`."""
        nodes = [node for node in self._timer.graph.nodes if node.op == "call_function"]
        return Record([Operator(_type(node), _path(node)) for node in nodes], self._timer.runs_ms, self._whole_ms)


class _Timer(torch.fx.Interpreter):
    """Runs a graph and keeps what each of its function calls takes, run by run, in milliseconds."""

    def __init__(self, module: Any, *, cuda: bool) -> None:
        super().__init__(module)
        self.runs_ms: list[list[float]] = []
        self._cuda = cuda

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        start_ns = time.perf_counter_ns()
        result = target(*args, **kwargs)
        if self._cuda:
            torch.cuda.synchronize()
        self.runs_ms[-1].append((time.perf_counter_ns() - start_ns) / 1e6)
        return result


def _type(node: torch.fx.Node) -> str:
    """The name of an operator without its overload: "linear" for aten.linear.default."""
    target: Any = node.target
    return str(getattr(getattr(target, "overloadpacket", target), "__name__", target))


def _path(node: torch.fx.Node) -> str:
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return "" if path.startswith(_NO_MODULE) else path
