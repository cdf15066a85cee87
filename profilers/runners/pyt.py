"""Exported programs (``.pt2`` files of ``torch.export.save``) run by torch, eagerly or compiled, on CPU or CUDA."""

import os
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from profilers.errors import ProfilingError
from profilers.runners.base import Feeds, Run, Runner, RunSettings, check_inputs, first_line, numpy_feeds
from profilers.runners.cuda import capture_graph, set_torch_tf32, timed_by_events
from profilers.runners.registry import RuntimeSpec

if TYPE_CHECKING:
    import torch

_WEIGHTS_ONLY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"
# Parts of an archive that torch unpickles or loads as machine code. Plain networks do not have them.
_UNSAFE_PARTS = ("/opaque_obj", "/custom_obj", "/aotinductor/")


class TorchRunner(Runner):
    """An exported program, called as a module in inference mode.

    Sets the threads of torch in this process, and on CUDA whether torch may use TF32. ``torch.compile`` (its default
    mode) compiles for the shapes of the first inputs. That takes a minute and, on the CPU, needs a C++ compiler. Only
    the runs of `prepare` replay a CUDA graph, `infer` does not.

    Raises:
        ProfilingError: the file cannot be loaded or holds pickled objects, or torch sees no CUDA device.
    """

    def __init__(self, path: Path, spec: RuntimeSpec, settings: RunSettings) -> None:
        import torch
        from torch.export.passes import move_to_device_pass

        cuda = spec.device == "cuda"
        if cuda and not torch.cuda.is_available():
            raise ProfilingError("a torch runtime on CUDA was asked for, but torch sees no CUDA device")
        torch.set_num_threads(settings.threads)
        if cuda:
            set_torch_tf32(settings.tf32)
        self._device = torch.device(spec.device)
        self.cuda_graph = True if spec.cuda_graph else None
        try:
            _refuse_unsafe(path)
            with _weights_only():
                program = torch.export.load(path)
            if cuda:
                program = move_to_device_pass(program, self._device)
        except ProfilingError:
            raise
        except Exception as error:  # torch raises anything from KeyError to RuntimeError on a broken archive
            raise ProfilingError(f"torch cannot load {path}: {first_line(error)}") from error
        # Export adds checks of the inputs (guards, and a hook around ``forward``). They are not part of the network and
        # would slow dense and pruned down by the same microseconds, which understates the ratio.
        module = program.module(check_guards=False)
        self._forward: Any = torch.compile(module.forward, dynamic=False) if spec.compiled else module.forward
        signature = program.module_call_graph[0].signature
        self._inputs = list((signature and signature.forward_arg_names) or program.graph_signature.user_inputs)
        self._outputs = [str(name) for name in program.graph_signature.user_outputs]

    def close(self) -> None:
        """See `Runner.close`."""
        self._forward = None

    def infer(self, feeds: Feeds) -> Feeds:
        """Return the outputs by their names in the exported program; see `Runner.infer`."""
        outputs = self._run(self._place(feeds))
        return numpy_feeds(self._outputs, (tensor.cpu().numpy() for tensor in _tensors(outputs)))

    def prepare(self, feeds: Feeds) -> Run:
        """Return a run that, on CUDA, is timed by events and ends with a synchronisation; see `Runner.prepare`."""
        import torch

        inputs = self._place(feeds)
        if self.cuda_graph:
            graph, outputs = self._capture(inputs)
            return timed_by_events(graph.replay, torch.cuda.current_stream(), (inputs, outputs))
        forward, inference_mode = self._forward, torch.inference_mode

        def run() -> None:
            with inference_mode():
                forward(*inputs)

        return timed_by_events(run, torch.cuda.current_stream(), inputs) if self._device.type == "cuda" else run

    def _run(self, inputs: "list[torch.Tensor]") -> Any:
        import torch

        with torch.inference_mode():
            return self._forward(*inputs)

    def _capture(self, inputs: "list[torch.Tensor]") -> "tuple[torch.cuda.CUDAGraph, Any]":
        """Return a CUDA graph that reads ``inputs``, and the outputs that it writes."""
        import torch

        try:
            return capture_graph(partial(self._run, inputs), torch.cuda.Stream())
        except RuntimeError as error:
            raise ProfilingError(f"the program cannot be captured in a CUDA graph: {first_line(error)}") from error

    def _place(self, feeds: Feeds) -> "list[torch.Tensor]":
        """Return the feeds as tensors on the device, in the order of the program's arguments, keywords last."""
        import torch

        check_inputs(self._inputs, feeds)
        return [torch.from_numpy(np.array(feeds[name])).to(self._device) for name in self._inputs]


def _refuse_unsafe(path: Path) -> None:
    """Raise ProfilingError if the archive holds anything that runs code when loaded."""
    with zipfile.ZipFile(path) as archive:
        unsafe = [name for name in archive.namelist() if any(part in name for part in _UNSAFE_PARTS)]
    if unsafe:
        raise ProfilingError(f"{path} holds {unsafe[0]}, which could run code when loaded: export the network again")


@contextmanager
def _weights_only() -> Iterator[None]:
    """Keep ``torch.export.load`` from unpickling: it retries without ``weights_only=True`` if that fails."""
    before = os.environ.get(_WEIGHTS_ONLY)
    os.environ[_WEIGHTS_ONLY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_WEIGHTS_ONLY]
        else:
            os.environ[_WEIGHTS_ONLY] = before


def _tensors(outputs: object) -> "Iterator[torch.Tensor]":
    """Yield the tensors of a module's result (a tensor, or tuples, lists and mappings of them) in order."""
    if isinstance(outputs, Mapping):
        outputs = tuple(outputs.values())
    if isinstance(outputs, tuple | list):
        for item in outputs:
            yield from _tensors(item)
    else:
        yield cast("torch.Tensor", outputs)
