"""Writing an exported program as an ONNX file."""

from __future__ import annotations

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import torch

from exporters import sdpa_translation
from exporters.batchnorm_folding import fold_batch_norms
from exporters.errors import ExportError, first_line
from exporters.files import staged
from exporters.operator_types import cast_where_undefined
from exporters.opset17 import to_opset_17
from exporters.tracing import DynamicAxes, input_names, save_program, symbols, trace

__all__ = ["DynamicAxes", "onnx_from_program", "save_program", "trace"]

PRODUCER = "optin-deploy"
_LEAST_OF_TORCH = 18
"""The lowest opset that torch's exporter writes itself."""
_SINGLE_FILE_BYTES = 1_900_000_000
"""protobuf stops at 2 GiB a file; what the weights leave of it is for the graph."""


def onnx_from_program(
    program: torch.export.ExportedProgram,
    path: str | Path,
    *,
    output_names: Sequence[str],
    dynamic_axes: DynamicAxes,
    opset: int = 20,
    inner_names: Sequence[str] = (),
) -> None:
    """Lowers `program`, as `trace` made it with the same `dynamic_axes`, to one checked ONNX file.

    Inputs are named after forward's arguments, in their order, outputs by `output_names`, and the dynamic dimensions
    by `dynamic_axes`. Weights of 1.9 GB and more go to `<path>.data` beside the file. Nothing is printed.
    What the program gives behind its outputs stays inside the file under `inner_names`.
    Raises ExportError when the program cannot be lowered, the file is invalid, or the outputs are not those named.
    """
    names = symbols(program, dynamic_axes)
    every = (*output_names, *inner_names)
    _check_names(input_names(program), every)
    try:
        model = _lower(program, list(every), opset)
        fold_batch_norms(model)
        if opset < _LEAST_OF_TORCH:
            to_opset_17(model)
        cast_where_undefined(model, opset)
    except ExportError:
        raise
    except Exception as error:  # the exporter raises many unrelated types
        raise ExportError(f"torch.onnx.export failed at opset {opset}: {first_line(error)}") from error
    _name_values(model, input_names(program), every)
    del model.graph.outputs[len(output_names) :]
    _name_axes(model, names)
    _set_metadata(model)
    with staged(path) as temporary:
        save_model(model, temporary)
        _check(temporary)


def _lower(program: torch.export.ExportedProgram, output_names: list[str], opset: int) -> Any:
    """The onnx_ir model. What the exporter prints and warns about is dropped: its failures are exceptions."""
    quiet = io.StringIO()
    with redirect_stdout(quiet), redirect_stderr(quiet), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        lowered = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=max(opset, _LEAST_OF_TORCH),
            output_names=output_names,
            optimize=True,
            verbose=False,
            custom_translation_table=sdpa_translation.translations(program, opset) or None,
        )
    assert lowered is not None
    return lowered.model


def _check_names(inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Raise ExportError where two of them are one: values of an ONNX file have names of their own."""
    names = [*inputs, *outputs]
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        what = "an input and an output" if twice[0] in inputs else "two outputs"
        raise ExportError(f"{what} are both called {twice[0]}: call one of them otherwise")


def _name_values(model: Any, inputs: Sequence[str], outputs: Sequence[str]) -> None:
    if len(model.graph.inputs) != len(inputs):
        raise ExportError(
            f"the model takes {len(model.graph.inputs)} tensors, not the {len(inputs)} it was traced with"
        )
    taken = {*inputs, *outputs}
    for node in model.graph.all_nodes():
        for value in node.outputs:
            if value.name in taken and not value.is_graph_output():
                value.name = f"{value.name}_inside"
    for value, name in zip(model.graph.inputs, inputs, strict=True):
        value.name = name
    found = [value.name for value in model.graph.outputs]
    if found != list(outputs):
        raise ExportError(f"the model returns {len(found)} distinct tensors ({', '.join(found)}), not {list(outputs)}")


def _name_axes(model: Any, names: Mapping[str, str]) -> None:
    """Puts the readable axis names in the place of torch's symbols, in every shape of the graph."""
    import onnx_ir as ir

    for value in [*model.graph.inputs, *(output for node in model.graph.all_nodes() for output in node.outputs)]:
        if value.shape is None:
            continue
        value.shape = ir.Shape(
            [dim if isinstance(dim, int) else ir.SymbolicDim(_renamed(dim.value, names)) for dim in value.shape]
        )


def _renamed(expression: str | None, names: Mapping[str, str]) -> str | None:
    return expression and re.sub(r"[A-Za-z_]\w*", lambda word: names.get(word[0], word[0]), expression)


def _set_metadata(model: Any) -> None:
    """Records the producer, and drops the stack traces: they carry this machine's paths and half of a small file."""
    model.producer_name = PRODUCER
    model.metadata_props["producer"] = PRODUCER
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        node.metadata_props.clear()
        if scopes:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes


def save_model(model: Any, path: Path) -> None:
    """Write an onnx_ir model; weights of 1.9 GB and more go to `<path>.data`.

    The version of the format is the lowest that its opsets allow: runtimes refuse versions that they do not know.
    """
    import onnx_ir as ir
    from onnx import helper

    opsets = [helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    model.ir_version = helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if weights < _SINGLE_FILE_BYTES:
        ir.save(model, path)
    else:
        ir.save(model, path, external_data=f"{path.name}.data")


def _check(path: Path) -> None:
    import onnx

    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"the exported ONNX file is invalid: {first_line(error)}") from error
