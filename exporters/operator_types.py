"""Compute operators in float32 where an opset does not define them for the type of their inputs."""

from collections.abc import Iterator

import onnx_ir as ir
from onnx import defs

from exporters.onnx_graph import cast_input, cast_output

_NAMES = {"FLOAT16": "tensor(float16)", "BFLOAT16": "tensor(bfloat16)"}


def cast_where_undefined(model: ir.Model, opset: int) -> None:
    """Put casts around each operator that has no float16 or bfloat16 in ``opset``, in place.

    Convolutions, sorting and resizing have bfloat16 in late opsets only, or in none.
    """
    for node in list(model.graph.all_nodes()):
        schema = _schema(node, opset)
        for variable in _undefined_types(node, schema) if schema is not None else ():
            _cast_around(node, schema, variable)


def _schema(node: ir.Node, opset: int) -> defs.OpSchema | None:
    known = node.domain in ("", "ai.onnx") and defs.has(node.op_type, opset, "")
    return defs.get_schema(node.op_type, opset, "") if known else None


def _undefined_types(node: ir.Node, schema: defs.OpSchema) -> list[str]:
    """Return the type variables of an operator whose type here the opset does not allow."""
    allowed = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    undefined = {
        variable
        for value, variable in _typed_values(node, schema)
        if value.dtype is not None and _NAMES.get(value.dtype.name, "") not in ("", *allowed.get(variable, ()))
    }
    return sorted(undefined & set(allowed))


def _typed_values(node: ir.Node, schema: defs.OpSchema) -> Iterator[tuple[ir.Value, str]]:
    """Yield inputs and outputs, with the type variable of each."""
    for values, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for index, value in enumerate(values):
            if value is not None and formal:
                # The last formal parameter may take any number of values.
                yield value, formal[min(index, len(formal) - 1)].type_str


def _cast_around(node: ir.Node, schema: defs.OpSchema, variable: str) -> None:
    values = [value for value, name in _typed_values(node, schema) if name == variable]
    low = {value: value.dtype for value in values if value.dtype is not None and value.dtype.name in _NAMES}
    for index, value in enumerate(node.inputs):
        if value in low:
            cast_input(node, index, ir.DataType.FLOAT)
    for output in node.outputs:
        if output in low:
            cast_output(node, output, low[output])
