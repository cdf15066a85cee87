"""Write an exported program as an ONNX file."""

import io
import re
import warnings
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx_ir as ir
import torch

from exporters import sdpa_translation
from exporters.batchnorm_folding import fold_batch_norms
from exporters.errors import ExportError, first_line
from exporters.files import staged
from exporters.operator_types import cast_where_undefined
from exporters.opset17 import to_opset_17
from exporters.tracing import DynamicAxes, axis_symbols, input_names

PRODUCER = "optin-deploy"
_LEAST_OF_TORCH = 18
"""The lowest opset that torch's exporter writes itself."""
_SINGLE_FILE_BYTES = 1_900_000_000
"""protobuf files end at 2 GiB; the rest is for the graph."""


@dataclass(frozen=True)
class OnnxSpec:
    """Names in an ONNX file, and its opset.

    Attributes:
        output_names: in the order of the module's outputs.
        dynamic_axes: those with which the program was traced.
        inner_names: of further tensors that the module returns after its outputs; they stay inside the file.
    """

    output_names: Sequence[str]
    dynamic_axes: DynamicAxes
    opset: int = 20
    inner_names: Sequence[str] = ()


def onnx_from_program(
    program: torch.export.ExportedProgram,
    path: str | Path,
    *,
    output_names: Sequence[str],
    dynamic_axes: DynamicAxes,
    opset: int = 20,
) -> None:
    """Write the program, as `trace` made it, to one checked ONNX file.

    Inputs are named after forward's arguments, in their order. Weights of 1.9 GB and more go to `<path>.data` next to
    the file. Nothing is printed.

    Args:
        output_names: in the order of the module's outputs.
        dynamic_axes: those with which the program was traced; the file's dynamic dimensions get these names.

    Raises:
        ExportError: the program cannot be lowered, the file is invalid, or the outputs are not those named.

    Example:
        >>> program = trace(module, {"x": torch.randn(2, 3, 32, 32)}, {"x": {0: "batch"}})  # doctest: +SKIP
        >>> onnx_from_program(program, "m.onnx", output_names=["y"], dynamic_axes={"x": {0: "batch"}})  # doctest: +SKIP
    """
    write_onnx(program, path, OnnxSpec(output_names, dynamic_axes, opset))


def write_onnx(program: torch.export.ExportedProgram, path: str | Path, spec: OnnxSpec) -> None:
    """Write the program with the names of ``spec``; see `onnx_from_program`."""
    axis_names, inputs = axis_symbols(program, spec.dynamic_axes), input_names(program)
    outputs = (*spec.output_names, *spec.inner_names)
    _check_names(inputs, outputs)
    try:
        model = _lower(program, outputs, spec.opset)
        fold_batch_norms(model)
        if spec.opset < _LEAST_OF_TORCH:
            to_opset_17(model)
        cast_where_undefined(model, spec.opset)
    except ExportError:
        raise
    except Exception as error:  # the exporter raises many unrelated types
        raise ExportError(f"torch.onnx.export failed at opset {spec.opset}: {first_line(error)}") from error
    _name_values(model, inputs, outputs)
    del model.graph.outputs[len(spec.output_names) :]
    _name_axes(model, axis_names)
    _set_metadata(model)
    with staged(path) as temporary:
        save_model(model, temporary)
        _check(temporary)


def _lower(program: torch.export.ExportedProgram, output_names: Sequence[str], opset: int) -> ir.Model:
    """Return the onnx_ir model. What the exporter prints and warns about is dropped: its failures are exceptions."""
    quiet = io.StringIO()
    with redirect_stdout(quiet), redirect_stderr(quiet), warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        lowered = torch.onnx.export(
            program,
            (),
            dynamo=True,
            opset_version=max(opset, _LEAST_OF_TORCH),
            output_names=list(output_names),
            optimize=True,
            verbose=False,
            custom_translation_table=sdpa_translation.translations(program, opset) or None,
        )
    if lowered is None:
        raise ExportError("torch.onnx.export returned no model")
    return lowered.model


def _check_names(inputs: Sequence[str], outputs: Sequence[str]) -> None:
    """Raise ExportError where two names are the same: every value of an ONNX file has its own name."""
    names = [*inputs, *outputs]
    twice = [name for index, name in enumerate(names) if name in names[:index]]
    if twice:
        what = "an input and an output" if twice[0] in inputs else "two outputs"
        raise ExportError(f"{what} are both called {twice[0]}: give one of them another name")


def _name_values(model: ir.Model, inputs: Sequence[str], outputs: Sequence[str]) -> None:
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
    names = [str(value.name) for value in model.graph.outputs]
    if names != list(outputs):
        raise ExportError(f"the model returns {len(names)} distinct tensors ({', '.join(names)}), not {list(outputs)}")


def _name_axes(model: ir.Model, names: Mapping[str, str]) -> None:
    """Replace torch's symbols by readable axis names, in every shape of the graph."""
    for value in [*model.graph.inputs, *(output for node in model.graph.all_nodes() for output in node.outputs)]:
        if value.shape is None:
            continue
        value.shape = ir.Shape(
            [dim if isinstance(dim, int) else ir.SymbolicDim(_renamed(dim.value, names)) for dim in value.shape]
        )


def _renamed(expression: str | None, names: Mapping[str, str]) -> str | None:
    return expression and re.sub(r"[A-Za-z_]\w*", lambda word: names.get(word[0], word[0]), expression)


def _set_metadata(model: ir.Model) -> None:
    """Record the producer, and drop stack traces: they have this machine's paths and are half of a small file."""
    model.producer_name = PRODUCER
    model.metadata_props["producer"] = PRODUCER
    for node in model.graph.all_nodes():
        scopes = node.metadata_props.get("pkg.torch.onnx.name_scopes")
        node.metadata_props.clear()
        if scopes:
            node.metadata_props["pkg.torch.onnx.name_scopes"] = scopes


def save_model(model: ir.Model, path: Path) -> None:
    """Write an onnx_ir model; weights of 1.9 GB and more go to `<path>.data`.

    The version of the format is the lowest that its opsets allow: runtimes refuse versions that they do not know.
    """
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    model.ir_version = onnx.helper.find_min_ir_version_for(opsets, ignore_unknown=True)
    weights = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value)
    if weights < _SINGLE_FILE_BYTES:
        ir.save(model, path)
    else:
        ir.save(model, path, external_data=f"{path.name}.data")


def _check(path: Path) -> None:
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except Exception as error:
        raise ExportError(f"the exported ONNX file is invalid: {first_line(error)}") from error
