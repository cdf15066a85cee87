"""Fold batch norms of features into linear layers next to them, in an onnx_ir model.

torch's exporter folds batch norms after convolutions and Gemm itself, by onnxscript's rewriter. This module folds those
that the rewriter does not match: after a MatMul, with moves of axes between, and before linear layers, as in blocks
with a batch norm in place of a layer norm, also with a multiple of its own input added (a re-parameterised norm).
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from exporters.onnx_graph import add_constant, remove_unused

Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Affine:
    """``after`` is ``before`` times ``scale`` plus ``shift``, by channels along axis 1."""

    before: ir.Value
    after: ir.Value
    scale: Array
    shift: Array


@dataclass(frozen=True)
class _Linear:
    """A product with constant weights, and the addition of a bias.

    Attributes:
        weight: (inputs, outputs).
        bias: zeros where there is none.
        transposed: whether the file has the weights as (outputs, inputs).
        bias_input: the node and the index of its input by which the bias is added; None where there is none.
    """

    product: ir.Node
    weight: Array
    bias: Array
    transposed: bool = False
    bias_input: tuple[ir.Node, int] | None = None

    @property
    def output(self) -> ir.Value:
        return (self.bias_input[0] if self.bias_input else self.product).outputs[0]

    def replace(self, model: ir.Model, weight: Array, bias: Array) -> None:
        """Write other weights and another bias into the model."""
        old = self.product.inputs[1]
        new = _add_like(model, old, weight.T if self.transposed else weight, old.name)
        self.product.replace_input_with(1, new)
        value = _add_like(model, new, bias, f"{new.name}.bias")
        if self.bias_input is not None:
            self.bias_input[0].replace_input_with(self.bias_input[1], value)
            return
        unbiased = self.product.outputs[0]
        output = ir.Value(name=f"{unbiased.name}.biased", shape=unbiased.shape, type=unbiased.type)
        for node, index in list(unbiased.uses()):
            node.replace_input_with(index, output)
        model.graph.insert_after(self.product, ir.Node("", "Add", [unbiased, value], outputs=[output]))


def fold_batch_norms(model: ir.Model) -> int:
    """Fold the batch norms whose input or output only linear layers use, in place; return their number."""
    folded = 0
    for node in list(model.graph):
        affine = _affine(node) if node.op_type == "BatchNormalization" else None
        if affine is not None and (_fold_into_previous(model, affine) or _fold_into_next(model, affine)):
            for user, index in list(affine.after.uses()):
                user.replace_input_with(index, affine.before)
            folded += 1
    if folded:
        remove_unused(model)
    return folded


def _affine(node: ir.Node) -> _Affine | None:
    """Return what a batch norm computes, an addition of its input included; None where it has no constants."""
    constants = [array for value in node.inputs[1:5] if (array := _constant(value)) is not None]
    if len(constants) < 4:
        return None
    weight, bias, mean, variance = constants
    scale = weight / np.sqrt(variance + node.attributes.get_float("epsilon", 1e-5))
    before, after, shift = node.inputs[0], node.outputs[0], bias - mean * scale
    add = _only_user(after)
    if add is not None and add.op_type == "Add":
        (other,) = [value for value in add.inputs if value is not after] or [None]
        multiple = _multiple_of(other, before)
        if multiple is not None:
            return _Affine(before, add.outputs[0], scale + multiple, shift)
    return _Affine(before, after, scale, shift)


def _multiple_of(value: ir.Value | None, base: ir.Value) -> float | None:
    """Return the constant factor between ``base`` and ``value``, where nothing else uses ``value``; else None."""
    if value is base:
        return 1.0
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Mul" or base not in node.inputs or _only_user(value) is None:
        return None
    factors = [_constant(v) for v in node.inputs if v is not base]
    return float(factors[0].reshape(())) if factors and factors[0] is not None and factors[0].size == 1 else None


def _fold_into_previous(model: ir.Model, affine: _Affine) -> bool:
    """Fold into the linear layer that computes ``before``, if nothing else uses that; return whether it was."""
    value, axis = affine.before, 1
    while (node := value.producer()) is not None and _only_user(value) is not None:
        if node.op_type not in ("Transpose", "Reshape"):
            if node.op_type == "Add":
                node = next((v.producer() for v in node.inputs if v.producer() is not None), node)
            linear = _linear(node)
            if linear is None or linear.output is not value or not _is_last(value, axis):
                return False
            linear.replace(model, linear.weight * affine.scale, linear.bias * affine.scale + affine.shift)
            return True
        previous = _axis_before(node, axis)
        if previous is None:
            return False
        value, axis = node.inputs[0], previous
    return False


def _fold_into_next(model: ir.Model, affine: _Affine) -> bool:
    """Fold into all linear layers that use ``after``, if nothing else does; return whether it was."""
    users = list(_linear_users(affine.after, 1))
    linears = [linear for linear in users if linear is not None]
    if not linears or len(linears) < len(users):
        return False
    for linear in linears:
        weight = affine.scale[:, None] * linear.weight
        linear.replace(model, weight, linear.bias + affine.shift @ linear.weight)
    return True


def _linear_users(value: ir.Value, axis: int) -> Iterator[_Linear | None]:
    """Yield the linear layers that use ``value`` with the channels as their inputs, through moves of axes.

    Any other use is None.
    """
    if value.is_graph_output():
        yield None
    for node, index in value.uses():
        moved = _axis_after(node, axis) if index == 0 and node.op_type in ("Transpose", "Reshape") else None
        if moved is not None:
            yield from _linear_users(node.outputs[0], moved)
        else:
            yield _linear(node) if index == 0 and _is_last(value, axis) else None


def _axis_after(node: ir.Node, axis: int) -> int | None:
    """Return where the channels are after a node that moves axes; None where that is unknown."""
    if node.op_type == "Transpose":
        return list(node.attributes["perm"].as_ints()).index(axis)
    return _kept_last(node.inputs[0], node.outputs[0], axis)


def _axis_before(node: ir.Node, axis: int) -> int | None:
    if node.op_type == "Transpose":
        return int(node.attributes["perm"].as_ints()[axis])
    return _kept_last(node.outputs[0], node.inputs[0], axis)


def _kept_last(value: ir.Value, reshaped: ir.Value, axis: int) -> int | None:
    """Return the last axis of ``reshaped`` if ``axis`` is the last one of ``value``, of the same size; else None."""
    if not _is_last(value, axis) or reshaped.shape is None:
        return None
    size = value.shape[axis]
    return len(reshaped.shape) - 1 if isinstance(size, int) and size == reshaped.shape[-1] else None


def _is_last(value: ir.Value, axis: int) -> bool:
    return value.shape is not None and axis == len(value.shape) - 1


def _linear(node: ir.Node | None) -> _Linear | None:
    """Return the linear layer whose product is ``node``."""
    weight = _constant(node.inputs[1]) if node is not None and node.op_type in ("MatMul", "Gemm") else None
    if node is None or weight is None or weight.ndim != 2:
        return None
    if node.op_type == "Gemm":
        options = node.attributes
        if options.get_int("transA", 0) or {options.get_float(name, 1.0) for name in ("alpha", "beta")} != {1.0}:
            return None
        transposed = bool(options.get_int("transB", 0))
        weight = weight.T if transposed else weight
        if len(node.inputs) < 3 or node.inputs[2] is None:
            return _Linear(node, weight, np.zeros(weight.shape[1]), transposed)
        bias = _constant(node.inputs[2])
        return None if bias is None else _Linear(node, weight, bias, transposed, (node, 2))
    add = _only_user(node.outputs[0])
    if add is not None and add.op_type == "Add":
        index = int(add.inputs[0] is node.outputs[0])
        bias = _constant(add.inputs[index])
        if bias is not None and bias.shape == weight.shape[1:]:
            return _Linear(node, weight, bias, bias_input=(add, index))
    return _Linear(node, weight, np.zeros(weight.shape[1]))


def _add_like(model: ir.Model, like: ir.Value, array: Array, name: str) -> ir.Value:
    """Add a constant of the type of ``like``, with ``name`` or a name made of it."""
    while name in model.graph.initializers:
        name = f"{name}.folded"
    return add_constant(model, name, array.astype(like.const_value.numpy().dtype))


def _constant(value: ir.Value | None) -> Array | None:
    """Return the numbers of a value that is fixed in the file, as float64."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return np.asarray(value.const_value.numpy(), dtype=np.float64)


def _only_user(value: ir.Value) -> ir.Node | None:
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None
