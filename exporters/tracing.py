"""Trace a module with torch.export, with dynamic dimensions, and save the program."""

from __future__ import annotations

import inspect
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from exporters.errors import ExportError, first_line
from exporters.files import staged

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

DynamicAxes = Mapping[str, Mapping[int, str]]
"""Input name → dimension → readable axis name, as in {"input_ids": {0: "batch", 1: "sequence"}}."""


def trace(module: nn.Module, inputs: Mapping[str, Tensor], dynamic_axes: DynamicAxes) -> torch.export.ExportedProgram:
    """Trace ``module``, put in eval mode, on ``inputs``. Nothing is printed.

    A dynamic dimension whose sample has size 1 is repeated to 2 first, since torch.export fixes sizes of 1.

    Args:
        inputs: tensors by forward's argument names, passed as keyword arguments.
        dynamic_axes: dimensions that take any size, with readable names.

    Raises:
        ExportError: the module cannot be traced, or it fixes a dimension of ``dynamic_axes``.
    """
    _check_inputs(module, inputs)
    _check_axes(inputs, dynamic_axes)
    samples = {name: _repeat_ones(tensor, dynamic_axes.get(name, {})) for name, tensor in inputs.items()}
    # DYNAMIC, because a named Dim must state the exact range, such as a position table's length, which only tracing
    # finds out. DYNAMIC does not tie two dimensions of one name together; the names in the ONNX file do that.
    shapes = {name: dict.fromkeys(dynamic_axes.get(name, {}), torch.export.Dim.DYNAMIC) or None for name in samples}
    # torch prints many lines about a graph that it cannot finish.
    quiet = io.StringIO()
    try:
        module.eval()
        with (
            torch.no_grad(),
            warnings.catch_warnings(),
            redirect_stdout(quiet),
            redirect_stderr(quiet),
            _named_parameters(module, samples),
        ):
            warnings.simplefilter("ignore")
            program = torch.export.export(module, (), kwargs=samples, dynamic_shapes=shapes, strict=False)
    except Exception as error:  # torch.export raises a dozen unrelated types
        raise ExportError(f"torch.export cannot trace {type(module).__name__}: {first_line(error)}") from error
    axis_symbols(program, dynamic_axes)
    # Run-time checks of the inputs name an undefined variable for a forward that takes **kwargs. ONNX files have no
    # such checks, and the dynamic dimensions are verified above.
    program._guards_code = []
    return program


@contextmanager
def _named_parameters(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Let a forward that takes ``**kwargs`` have parameters of these names.

    torch before 2.12 accepts no dynamic shapes for ``**kwargs``.
    """
    forward = module.forward
    if all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values()):
        yield
        return

    @wraps(forward)
    def named(**inputs: Tensor) -> object:
        return forward(**inputs)

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    named.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    module.forward = named
    try:
        yield
    finally:
        del module.forward


def save_program(program: torch.export.ExportedProgram, path: str | Path) -> None:
    """Write ``program`` as a .pt2 archive, which ``torch.export.load`` reads.

    Raises:
        ExportError: the suffix is another one, torch cannot save the program, or the file cannot be written.
    """
    if Path(path).suffix != ".pt2":
        raise ExportError(f"an exported program is saved as .pt2, not as {Path(path).name}")
    try:
        with staged(path) as temporary, _ErrorKeepingFile(temporary, "w") as file:
            torch.export.save(program, file)
            if file.error is not None:
                raise file.error
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror}") from error
    except RuntimeError as error:
        raise ExportError(f"the program for {path} cannot be saved: {first_line(error)}") from error


class _ErrorKeepingFile(io.FileIO):
    """A file that keeps its first error instead of raising it: torch's writer ends the process when a write fails."""

    error: OSError | None = None

    def write(self, data: ReadableBuffer) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and self.error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return size


def input_names(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """Return the keyword arguments of the traced forward, in the order of the graph's inputs."""
    example = program.example_inputs
    return tuple(example[1]) if example else tuple(str(name) for name in program.graph_signature.user_inputs)


def axis_symbols(program: torch.export.ExportedProgram, dynamic_axes: DynamicAxes) -> dict[str, str]:
    """Return torch's symbol -> readable axis name, for every dimension in ``dynamic_axes``.

    Raises:
        ExportError: a dimension became a number, a multiple of something, or equal to one of another name.
    """
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    labels: dict[str, str] = {}
    for name, placeholder in zip(input_names(program), program.graph_signature.user_inputs, strict=True):
        for axis, label in dynamic_axes.get(name, {}).items():
            size = nodes[str(placeholder)].meta["val"].shape[axis]
            where = f"dimension {axis} ({label}) of input {name}"
            if isinstance(size, int):
                raise ExportError(f"{where} is to be dynamic, but the model fixes it to {size}")
            symbol = str(size)
            if not re.fullmatch(r"[A-Za-z_]\w*", symbol):
                raise ExportError(f"{where} is to be dynamic, but the model only takes sizes of {symbol}")
            if labels.setdefault(symbol, label) != label:
                raise ExportError(f"{where} must equal the dimension named {labels[symbol]}: give both one name")
    return labels


def _check_inputs(module: object, inputs: object) -> None:
    if not isinstance(module, nn.Module):
        raise ExportError(f"only a torch.nn.Module can be exported, not a {type(module).__name__}")
    if not isinstance(inputs, Mapping) or not inputs:
        raise ExportError("inputs must map forward's argument names to tensors, with one at least")
    for name, value in inputs.items():
        if not isinstance(value, Tensor):
            raise ExportError(f"input {name} is a {type(value).__name__}: a tensor is needed")


def _check_axes(inputs: Mapping[str, Tensor], dynamic_axes: DynamicAxes) -> None:
    for name, axes in dynamic_axes.items():
        if name not in inputs:
            raise ExportError(f"dynamic_axes names {name}, which is not among the inputs {', '.join(inputs)}")
        for axis in axes:
            if not 0 <= axis < inputs[name].dim():
                raise ExportError(f"input {name} has {inputs[name].dim()} dimensions, so no dimension {axis}")


def _repeat_ones(tensor: Tensor, axes: Mapping[int, str]) -> Tensor:
    for axis in axes:
        if tensor.shape[axis] == 1:
            tensor = tensor.repeat_interleave(2, dim=axis)
    return tensor
