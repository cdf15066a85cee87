"""Operators that an opset does not define for the type they are given, computed in float32."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_NAMES = {"FLOAT16": "tensor(float16)", "BFLOAT16": "tensor(bfloat16)"}


def cast_where_undefined(model: Any, opset: int) -> None:
    """Put casts around each operator of an onnx_ir model that has no float16 or bfloat16 in ``opset``, in place.

    Convolutions, sorting and resizing get bfloat16 late, or never.
    """
    for node in list(model.graph.all_nodes()):
        if node.domain in ("", "ai.onnx"):
            for variable in _undefined(node, opset):
                _cast_around(node, variable, opset)


def _undefined(node: Any, opset: int) -> list[str]:
    """The type variables of an operator that cannot be what they are here."""
    schema = _schema(node, opset)
    if schema is None:
        return []
    allowed = {constraint.type_param_str: constraint.allowed_type_strs for constraint in schema.type_constraints}
    found = {
        variable
        for value, variable in _typed(node, schema)
        if value.dtype is not None and _NAMES.get(value.dtype.name, "") not in ("", *allowed.get(variable, ()))
    }
    return sorted(found & set(allowed))


def _schema(node: Any, opset: int) -> Any:
    from onnx import defs

    return defs.get_schema(node.op_type, opset, "") if defs.has(node.op_type, opset, "") else None


def _typed(node: Any, schema: Any) -> Iterator[tuple[Any, str]]:
    """Inputs and outputs, with the type variable of each."""
    for values, formal in ((node.inputs, schema.inputs), (node.outputs, schema.outputs)):
        for index, value in enumerate(values):
            if value is not None and formal:
                # The last of them may stand for any number.
                yield value, formal[min(index, len(formal) - 1)].type_str


def _cast_around(node: Any, variable: str, opset: int) -> None:
    import onnx_ir as ir

    schema = _schema(node, opset)
    low = {value for value, name in _typed(node, schema) if name == variable and value.dtype is not None}
    low = {value for value in low if value.dtype.name in _NAMES}
    for index, value in enumerate(node.inputs):
        if value in low:
            cast = _cast(ir, value, ir.DataType.FLOAT, node)
            node.graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])
    for output in node.outputs:
        if output in low:
            _cast_back(ir, node, output)


def _cast(ir: Any, value: Any, dtype: Any, near: Any) -> Any:
    cast = ir.node("Cast", [value], attributes={"to": int(dtype)})
    cast.outputs[0].dtype, cast.outputs[0].shape = dtype, value.shape
    cast.metadata_props.update(near.metadata_props)
    return cast


def _cast_back(ir: Any, node: Any, output: Any) -> None:
    dtype, uses = output.dtype, list(output.uses())
    output.dtype = ir.DataType.FLOAT
    cast = _cast(ir, output, dtype, node)
    node.graph.insert_after(node, cast)
    for user, index in uses:
        user.replace_input_with(index, cast.outputs[0])
