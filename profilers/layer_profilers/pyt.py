"""Operators of an exported program, timed one by one."""

import time
from pathlib import Path
from typing import Any

import torch

from profilers.layer_profilers import Operator, ProfiledRuns, ProfileInputs, Record
from profilers.layer_profilers.scopes import innermost_module
from profilers.runners.base import RunSettings
from profilers.runners.pyt import TorchRunner
from profilers.runners.registry import RuntimeSpec


class ProfiledProgram(TorchRunner, ProfiledRuns):
    """An exported program whose graph is run node by node; raises as `TorchRunner`."""

    def __init__(self, path: Path, spec: RuntimeSpec, settings: RunSettings, inputs: ProfileInputs) -> None:
        super().__init__(path, spec, settings)
        self._timer = _Timer(self._forward.__self__, cuda=spec.device == "cuda")
        self._inputs_on_device = self._place(inputs.feeds)
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
    """Runs a graph and stores the milliseconds of each function call, run by run."""

    def __init__(self, module: torch.nn.Module, *, cuda: bool) -> None:
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
    """Return the name of an operator without its overload: "linear" for aten.linear.default."""
    packet = getattr(node.target, "overloadpacket", node.target)
    return str(getattr(packet, "__name__", packet))


def _path(node: torch.fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    return innermost_module([str(path) for path, _ in stack.values()])
