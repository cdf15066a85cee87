"""Exported programs (`.pt2` files written by `torch.export.save`) run by torch, eagerly or compiled, on CPU or CUDA."""

import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np

from profilers.errors import ProfilingError
from profilers.runners.base import Feeds, Run, check_inputs, first_line, numpy_feeds
from profilers.runners.cuda import captured, set_torch_tf32, timed_by_events

_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# Parts of an archive that torch unpickles or loads as machine code; no plain network has any.
_UNSAFE_PARTS = ("/opaque_obj", "/custom_obj", "/aotinductor/")


class TorchRunner:
    """An exported program, called as a module in inference mode.

    Sets the threads of torch in this process, and on CUDA whether it may use TF32.

    Args:
        path: a `.pt2` file.
        device: `cpu` or `cuda`.
        threads: intra-op threads.
        compiled: by `torch.compile` (its default mode), for the shapes of the first inputs; that takes a minute and,
            on the CPU, needs a C++ compiler.
        graph: what `prepare` gives replays a CUDA graph. `infer` does not.
        tf32: matrix products and convolutions on CUDA may use it.

    Raises:
        ProfilingError: the file cannot be loaded or holds pickled objects, or torch sees no CUDA device.
    """

    def __init__(
        self,
        path: Path,
        device: str,
        threads: int,
        *,
        compiled: bool = False,
        graph: bool = False,
        tf32: bool = False,
    ) -> None:
        import torch
        from torch.export.passes import move_to_device_pass

        if device == "cuda" and not torch.cuda.is_available():
            raise ProfilingError("a torch runtime on CUDA was asked for, but torch sees no CUDA device")
        torch.set_num_threads(threads)
        if device == "cuda":
            set_torch_tf32(tf32)
        self._device = torch.device(device)
        self.cuda_graph: bool | None = True if graph else None
        try:
            _refuse_unsafe(path)
            with _weights_only():
                program = torch.export.load(path)
            if device == "cuda":
                program = move_to_device_pass(program, self._device)
        except ProfilingError:
            raise
        except Exception as error:  # torch raises anything from KeyError to RuntimeError on a broken archive
            raise ProfilingError(f"torch cannot load {path}: {first_line(error)}") from error
        # The checks of inputs that export adds (guards, and a hook around `forward`) are no part of the network: they
        # would slow dense and pruned down by the same microseconds and so understate the ratio.
        module = program.module(check_guards=False)
        self._forward: Any = torch.compile(module.forward, dynamic=False) if compiled else module.forward
        signature = program.module_call_graph[0].signature
        self._inputs = list((signature and signature.forward_arg_names) or program.graph_signature.user_inputs)
        self._outputs = [str(name) for name in program.graph_signature.user_outputs]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._forward = None

    def infer(self, feeds: Feeds) -> Feeds:
        """Outputs by the names that `torch.export` gave them; see `Runner.infer`."""
        import torch

        inputs = self._place(feeds)
        with torch.inference_mode():
            outputs = self._forward(*inputs)
        return numpy_feeds(self._outputs, (tensor.cpu().numpy() for tensor in _tensors(outputs)))

    def prepare(self, feeds: Feeds) -> Run:
        """On CUDA each run is timed by events and ends with a synchronisation; see `Runner.prepare`."""
        import torch

        inputs = self._place(feeds)
        if self.cuda_graph:
            graph, outputs = self._captured(inputs)
            return timed_by_events(graph.replay, torch.cuda.current_stream(), (inputs, outputs))
        forward, inference_mode = self._forward, torch.inference_mode

        def run() -> None:
            with inference_mode():
                forward(*inputs)

        return timed_by_events(run, torch.cuda.current_stream(), inputs) if self._device.type == "cuda" else run

    def _captured(self, inputs: list[Any]) -> tuple[Any, Any]:
        """A `torch.cuda.CUDAGraph` that reads the inputs, and the outputs that it fills."""
        import torch

        outputs = None

        def launch() -> None:
            nonlocal outputs
            with torch.inference_mode():
                outputs = self._forward(*inputs)

        try:
            return captured(launch, torch.cuda.Stream()), outputs
        except RuntimeError as error:
            raise ProfilingError(f"the program cannot be captured in a CUDA graph: {first_line(error)}") from error

    def _place(self, feeds: Feeds) -> list[Any]:
        """The feeds as tensors on the device, in the order of the program's arguments (keywords come last)."""
        import torch

        check_inputs(self._inputs, feeds)
        return [torch.from_numpy(np.array(feeds[name])).to(self._device) for name in self._inputs]


def _refuse_unsafe(path: Path) -> None:
    """ProfilingError when the archive holds anything that runs code while it is loaded."""
    with zipfile.ZipFile(path) as archive:
        unsafe = [name for name in archive.namelist() if any(part in name for part in _UNSAFE_PARTS)]
    if unsafe:
        raise ProfilingError(f"{path} holds {unsafe[0]}, which could run code when loaded: export the network again")


@contextmanager
def _weights_only() -> Iterator[None]:
    """Keeps `torch.export.load` from unpickling: it retries what `weights_only=True` refuses without it."""
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before


def _tensors(outputs: Any) -> Iterator[Any]:
    """The tensors of a module's result (a tensor, or tuples, lists and mappings of them), in order."""
    if isinstance(outputs, Mapping):
        outputs = tuple(outputs.values())
    if isinstance(outputs, tuple | list):
        for item in outputs:
            yield from _tensors(item)
    else:
        yield outputs
