"""Tracing a module with torch.export, with the dimensions that are to stay dynamic."""

from __future__ import annotations

import inspect
import io
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from exporters.errors import ExportError, first_line
from exporters.files import staged

DynamicAxes = Mapping[str, Mapping[int, str]]
"""Input name → dimension → readable axis name, as in {"input_ids": {0: "batch", 1: "sequence"}}."""


def trace(module: nn.Module, inputs: Mapping[str, Tensor], dynamic_axes: DynamicAxes) -> torch.export.ExportedProgram:
    """Traces `module`, put in eval mode, on `inputs`, passed to its forward as keyword arguments.

    A dynamic dimension whose sample has size 1 is repeated to 2 first, since torch.export bakes in sizes of 1.
    Raises ExportError when the module cannot be traced or fixes a dimension that `dynamic_axes` asks to be dynamic.
    Nothing is printed.
    """
    _check_inputs(module, inputs)
    _check_axes(inputs, dynamic_axes)
    samples = {name: _without_ones(tensor, dynamic_axes.get(name, {})) for name, tensor in inputs.items()}
    # DYNAMIC and not named Dims: a named Dim has to state the exact range (a position table's length, say), which
    # only tracing finds out. It does not tie two dimensions of one name together; the ONNX file's names do that.
    shapes = {name: dict.fromkeys(dynamic_axes.get(name, {}), torch.export.Dim.DYNAMIC) or None for name in samples}
    # What torch prints of a graph that it cannot finish is many lines.
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
    symbols(program, dynamic_axes)
    # Run-time checks of the inputs. Those on a forward that takes **kwargs name a variable that torch does not define
    # when it lowers the program; ONNX files have no such checks, and the dynamic dimensions are verified above.
    program._guards_code = []
    return program


@contextmanager
def _named_parameters(module: nn.Module, names: Iterable[str]) -> Iterator[None]:
    """Gives a forward that takes ``**kwargs`` parameters of these names: torch before 2.12 accepts no dynamic shapes
    for ``**kwargs``."""
    forward = module.forward
    if all(p.kind is not p.VAR_KEYWORD for p in inspect.signature(forward).parameters.values()):
        yield
        return

    @wraps(forward)
    def named(**inputs: Tensor) -> Any:
        return forward(**inputs)

    parameters = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in names]
    named.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    module.forward = named
    try:
        yield
    finally:
        del module.forward


def save_program(program: torch.export.ExportedProgram, path: str | Path) -> None:
    """Writes `program` as a .pt2 archive that torch.export.load reads.

    Raises ExportError for another suffix, and where torch cannot save it or the file cannot be written.
    """
    if Path(path).suffix != ".pt2":
        raise ExportError(f"an exported program is saved as .pt2, not as {Path(path).name}")
    try:
        with staged(path) as temporary, _Unfailing(temporary, "w") as file:
            torch.export.save(program, file)
            if file.error is not None:
                raise file.error
    except OSError as error:
        raise ExportError(f"{path} cannot be written: {error.strerror}") from error
    except RuntimeError as error:
        raise ExportError(f"the program for {path} cannot be saved: {first_line(error)}") from error


class _Unfailing(io.FileIO):
    """Takes all that is written, and keeps the first error: torch's writer ends the process where a write fails."""

    error: OSError | None = None

    def write(self, data: Any) -> int:
        left = memoryview(data).cast("B")
        size = len(left)
        try:
            while left and self.error is None:
                left = left[super().write(left) :]
        except OSError as error:
            self.error = error
        return size


def input_names(program: torch.export.ExportedProgram) -> tuple[str, ...]:
    """The keyword arguments of the traced forward, in the order of the graph's inputs."""
    example = program.example_inputs
    return tuple(example[1]) if example else tuple(str(name) for name in program.graph_signature.user_inputs)


def symbols(program: torch.export.ExportedProgram, dynamic_axes: DynamicAxes) -> dict[str, str]:
    """Torch's symbol → readable axis name, for every dimension in `dynamic_axes`.

    Raises ExportError when one of them became a number, a multiple of something, or equal to one of another name.
    """
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    found: dict[str, str] = {}
    for name, placeholder in zip(input_names(program), program.graph_signature.user_inputs, strict=True):
        for axis, label in dynamic_axes.get(name, {}).items():
            size = nodes[str(placeholder)].meta["val"].shape[axis]
            where = f"dimension {axis} ({label}) of input {name}"
            if isinstance(size, int):
                raise ExportError(f"{where} was asked to be dynamic, but the model fixes it to {size}")
            symbol = str(size)
            if not re.fullmatch(r"[A-Za-z_]\w*", symbol):
                raise ExportError(f"{where} was asked to be dynamic, but the model only takes sizes of {symbol}")
            if found.setdefault(symbol, label) != label:
                raise ExportError(f"{where} must equal the dimension named {found[symbol]}: give both one name")
    return found


def _check_inputs(module: object, inputs: object) -> None:
    if not isinstance(module, nn.Module):
        raise ExportError(f"a torch.nn.Module is exported, not a {type(module).__name__}")
    if not isinstance(inputs, Mapping) or not inputs:
        raise ExportError("the inputs are a mapping of forward's argument names to tensors, with one at least")
    odd = next((name for name, value in inputs.items() if not isinstance(value, Tensor)), None)
    if odd is not None:
        raise ExportError(f"input {odd} is a {type(inputs[odd]).__name__}: a tensor is needed")


def _check_axes(inputs: Mapping[str, Tensor], dynamic_axes: DynamicAxes) -> None:
    for name, axes in dynamic_axes.items():
        if name not in inputs:
            raise ExportError(f"dynamic axes are given for {name}, which is not among the inputs {', '.join(inputs)}")
        for axis in axes:
            if not 0 <= axis < inputs[name].dim():
                raise ExportError(f"input {name} has {inputs[name].dim()} dimensions, so no dimension {axis}")


def _without_ones(tensor: Tensor, axes: Mapping[int, str]) -> Tensor:
    for axis in axes:
        if tensor.shape[axis] == 1:
            tensor = tensor.repeat_interleave(2, dim=axis)
    return tensor
