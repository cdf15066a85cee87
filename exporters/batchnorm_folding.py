"""Batch norms of features beside linear maps, folded into them: of what is between, only moves of axes stay.

The exporter folds batch norms behind convolutions itself. What is left are those in place of a layer norm, before the
linear maps of a block, alone or with a part of their own input added to what they give (a re-parameterised norm), and
those behind a linear map whose tokens are moved to the batch first.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class _Affine:
    """Channels, along axis 1, of ``before`` times ``scale`` plus ``shift`` give ``after``."""

    before: Any
    after: Any
    scale: Array
    shift: Array


@dataclass(frozen=True)
class _Linear:
    """A product with constant weights, ``transposed`` to (outputs, inputs); ``bias`` is what it or an Add behind it
    adds, as (node, index of the input), and ``output`` what it gives in all."""

    node: Any
    transposed: bool
    bias: tuple[Any, int] | None
    output: Any


def fold_batch_norms(model: Any) -> int:
    """Fold, in place, the batch norms of an onnx_ir model that only linear maps see, or that see only one; how many."""
    folded = 0
    for node in list(model.graph):
        affine = _affine(node) if node.op_type == "BatchNormalization" else None
        if affine is not None:
            folded += _into_previous(model.graph, affine) or _into_next(model.graph, affine)
    if folded:
        _remove_unused(model)
    return folded


def _affine(node: Any) -> _Affine | None:
    found = [array for v in node.inputs[1:5] if (array := _constant(v)) is not None]
    if len(found) < 4:
        return None
    weight, bias, mean, variance = found
    epsilon = node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5
    scale = weight / np.sqrt(variance + epsilon)
    before, after, shift = node.inputs[0], node.outputs[0], bias - mean * scale
    add = _only_consumer(after)
    if add is not None and add.op_type == "Add":
        (other,) = [v for v in add.inputs if v is not after] or [None]
        part = _part_of(other, before)
        if part is not None:
            return _Affine(before, add.outputs[0], scale + part, shift)
    return _Affine(before, after, scale, shift)


def _part_of(value: Any, whole: Any) -> float | None:
    """The factor by which ``value`` is ``whole``, where it is one number and nothing else uses it."""
    if value is whole:
        return 1.0
    node = value.producer() if value is not None else None
    if node is None or node.op_type != "Mul" or whole not in node.inputs or _only_consumer(value) is None:
        return None
    factors = [_constant(v) for v in node.inputs if v is not whole]
    return float(factors[0].reshape(())) if factors and factors[0] is not None and factors[0].size == 1 else None


def _into_previous(graph: Any, affine: _Affine) -> bool:
    """Fold into the linear map that gives ``before``, if nothing else uses that."""
    value, axis = affine.before, 1
    while True:
        node = value.producer()
        if node is None or _only_consumer(value) is None:
            return False
        if node.op_type in ("Transpose", "Reshape"):
            moved = _moved_back(node, axis)
            if moved is None:
                return False
            value, axis = node.inputs[0], moved
            continue
        linear = _linear_giving(value)
        if linear is None or not _is_last(value, axis):
            return False
        _scale_outputs(graph, linear, affine)
        _bypass(affine)
        return True


def _into_next(graph: Any, affine: _Affine) -> bool:
    """Fold into all linear maps that take ``after``, if nothing else does."""
    found = []
    for node, index, last in _consumers(affine.after, 1):
        linear = _linear(node) if last and index == 0 else None
        if linear is None:
            return False
        found.append(linear)
    for linear in found:
        _scale_inputs(graph, linear, affine)
    if found:
        _bypass(affine)
    return bool(found)


def _consumers(value: Any, axis: int) -> Iterator[tuple[Any, int, bool]]:
    """What uses ``value``, through moves of axes: node, index of its input, whether the channels are last there."""
    if value.is_graph_output():
        yield None, 0, False
    for use in value.uses():
        node, index = use[0], use[1]
        moved = _moved(node, axis) if index == 0 and node.op_type in ("Transpose", "Reshape") else None
        if moved is None:
            yield node, index, _is_last(value, axis)
        else:
            yield from _consumers(node.outputs[0], moved)


def _moved(node: Any, axis: int) -> int | None:
    """Where the channels are behind a node that moves axes; None where that is not known."""
    if node.op_type == "Transpose":
        return list(node.attributes["perm"].as_ints()).index(axis)
    return _last_kept(node.inputs[0], node.outputs[0], axis)


def _moved_back(node: Any, axis: int) -> int | None:
    if node.op_type == "Transpose":
        return int(node.attributes["perm"].as_ints()[axis])
    return _last_kept(node.outputs[0], node.inputs[0], axis)


def _last_kept(given: Any, other: Any, axis: int) -> int | None:
    """The last axis of ``other`` where a reshape leaves the last axis of ``given``, and that is ``axis``."""
    if not _is_last(given, axis) or other.shape is None:
        return None
    size, kept = given.shape[axis], other.shape[-1]
    return len(other.shape) - 1 if isinstance(size, int) and size == kept else None


def _is_last(value: Any, axis: int) -> bool:
    return value.shape is not None and axis == len(value.shape) - 1


def _linear_giving(value: Any) -> _Linear | None:
    node = value.producer()
    if node.op_type == "Add":
        node = next((v.producer() for v in node.inputs if v.producer() is not None), node)
    linear = _linear(node)
    return linear if linear is not None and linear.output is value else None


def _linear(node: Any) -> _Linear | None:
    """The linear map that ``node`` is the product of."""
    weight = _constant(node.inputs[1]) if node is not None and node.op_type in ("MatMul", "Gemm") else None
    if weight is None or weight.ndim != 2:
        return None
    if node.op_type == "Gemm":
        numbers = {name: node.attributes[name].value for name in node.attributes}
        if numbers.get("transA", 0) or numbers.get("alpha", 1.0) != 1.0 or numbers.get("beta", 1.0) != 1.0:
            return None
        biased = len(node.inputs) > 2 and node.inputs[2] is not None
        if biased and _constant(node.inputs[2]) is None:
            return None
        return _Linear(node, bool(numbers.get("transB", 0)), (node, 2) if biased else None, node.outputs[0])
    add = _only_consumer(node.outputs[0])
    if add is not None and add.op_type == "Add":
        index = int(add.inputs[0] is node.outputs[0])
        bias = _constant(add.inputs[index])
        if bias is not None and bias.shape == weight.shape[1:]:
            return _Linear(node, False, (add, index), add.outputs[0])
    return _Linear(node, False, None, node.outputs[0])


def _scale_inputs(graph: Any, linear: _Linear, affine: _Affine) -> None:
    weight = _matrix(linear)
    _set_weight(graph, linear, affine.scale[:, None] * weight)
    _set_bias(graph, linear, _bias(linear, weight) + affine.shift @ weight)


def _scale_outputs(graph: Any, linear: _Linear, affine: _Affine) -> None:
    weight = _matrix(linear)
    _set_weight(graph, linear, weight * affine.scale)
    _set_bias(graph, linear, _bias(linear, weight) * affine.scale + affine.shift)


def _matrix(linear: _Linear) -> Array:
    """The weights as (inputs, outputs)."""
    weight = _constant(linear.node.inputs[1])
    assert weight is not None
    return weight.T if linear.transposed else weight


def _bias(linear: _Linear, weight: Array) -> Array:
    found = None if linear.bias is None else _constant(linear.bias[0].inputs[linear.bias[1]])
    return np.zeros(weight.shape[1]) if found is None else found


def _set_weight(graph: Any, linear: _Linear, weight: Array) -> None:
    old = linear.node.inputs[1]
    linear.node.replace_input_with(1, _initializer(graph, old, weight.T if linear.transposed else weight, old.name))


def _set_bias(graph: Any, linear: _Linear, bias: Array) -> None:
    import onnx_ir as ir

    weight = linear.node.inputs[1]
    value = _initializer(graph, weight, bias, f"{weight.name}.bias")
    if linear.bias is not None:
        linear.bias[0].replace_input_with(linear.bias[1], value)
        return
    product = linear.node.outputs[0]
    output = ir.Value(name=f"{product.name}.biased", shape=product.shape, type=product.type)
    uses = [(use[0], use[1]) for use in product.uses()]
    add = ir.Node("", "Add", [product, value], outputs=[output])
    for node, index in uses:
        node.replace_input_with(index, output)
    graph.insert_after(linear.node, add)


def _initializer(graph: Any, like: Any, array: Array, name: str) -> Any:
    import onnx_ir as ir

    while name in graph.initializers:
        name = f"{name}.folded"
    tensor = ir.tensor(array.astype(like.const_value.numpy().dtype), name=name)
    value = ir.Value(name=name, shape=ir.Shape(array.shape), type=like.type, const_value=tensor)
    graph.register_initializer(value)
    return value


def _bypass(affine: _Affine) -> None:
    for use in list(affine.after.uses()):
        use[0].replace_input_with(use[1], affine.before)


def _remove_unused(model: Any) -> None:
    from onnx_ir.passes.common import RemoveUnusedNodesPass

    RemoveUnusedNodesPass()(model)


def _constant(value: Any) -> Array | None:
    """The numbers of a value that is fixed in the file, as float64."""
    if value is None or value.const_value is None or value.is_graph_input():
        return None
    return np.asarray(value.const_value.numpy(), dtype=np.float64)


def _only_consumer(value: Any) -> Any:
    uses = list(value.uses())
    return uses[0][0] if len(uses) == 1 and not value.is_graph_output() else None
