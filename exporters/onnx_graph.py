"""Edits of onnx_ir graphs that several modules need."""

from typing import Any

import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes.common import RemoveUnusedNodesPass


def add_constant(model: ir.Model, name: str, array: NDArray[Any]) -> ir.Value:
    """Add a tensor to the graph's initializers; return its value."""
    tensor = ir.tensor(array, name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def remove_unused(model: ir.Model) -> None:
    """Remove the nodes and initializers that nothing uses any more."""
    RemoveUnusedNodesPass()(model)


def cast_input(node: ir.Node, index: int, dtype: ir.DataType) -> None:
    """Cast one input of a node to ``dtype``, for this node alone."""
    cast = _cast(node, node.inputs[index], dtype)
    node.graph.insert_before(node, cast)
    node.replace_input_with(index, cast.outputs[0])


def cast_output(node: ir.Node, output: ir.Value, dtype: ir.DataType) -> None:
    """Let a node return float32, and cast it to ``dtype`` for all that use it."""
    uses = list(output.uses())
    output.dtype = ir.DataType.FLOAT
    cast = _cast(node, output, dtype)
    node.graph.insert_after(node, cast)
    for user, index in uses:
        user.replace_input_with(index, cast.outputs[0])


def _cast(node: ir.Node, value: ir.Value, dtype: ir.DataType) -> ir.Node:
    """Return a cast of a value that belongs to the same torch module as ``node``."""
    cast = ir.node("Cast", [value], attributes={"to": int(dtype)})
    cast.outputs[0].dtype, cast.outputs[0].shape = dtype, value.shape
    cast.metadata_props.update(node.metadata_props)
    return cast
