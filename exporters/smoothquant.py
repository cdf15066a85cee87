"""Bring the input channels of linear layers to one size, in ONNX, by rescaling the weights.

Transformers have a few channels that are far larger than the others and take the whole range of 8 bits. Dividing every
channel by a factor and multiplying the rows of the weights by it changes nothing in float32 (SmoothQuant, Xiao et al.
2023).
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray
from torch import Tensor

from exporters.onnx_graph import add_constant
from exporters.onnx_session import run_onnx
from exporters.onnx_writer import save_model

Array = NDArray[Any]

# How much of the difference between channels goes from activations to weights (SmoothQuant's α). 0.8 is the best of
# 0.35 to 0.95 for MiniLM in int8.
_STRENGTH = 0.8


def equalise(model: ir.Model, source: Path, batches: Sequence[Mapping[str, Tensor]]) -> None:
    """Divide every input channel of matrix products by a factor, and multiply the rows of the weights by it.

    A norm whose output only these products use takes the factors over. Elsewhere each input gets one more operator.

    Args:
        model: in float32, changed in place.
        source: the file that it was read from.
        batches: inputs by name, on which the largest value of every channel is found.
    """
    products = _products_by_input(model)
    if not products:
        return
    largest = _largest_inputs(source, [str(value.name) for value in products], batches)
    for (value, nodes), activations in zip(products.items(), largest, strict=True):
        weights = [node.inputs[1].const_value.numpy() for node in nodes]
        factors = _factors(activations, np.max([np.abs(w).max(1) for w in weights], axis=0))
        for node, weight in zip(nodes, weights, strict=True):
            name = f"{node.inputs[1].name}_equalised_for_{node.name}"
            node.replace_input_with(1, _add_float32(model, name, weight * factors[:, None]))
        if not _absorb_into_norm(model, value, nodes, factors):
            output = ir.Value(name=f"{value.name}_equalised", shape=value.shape, type=value.type)
            reciprocals = _add_float32(model, f"{value.name}_factors", 1 / factors)
            divide = ir.node("Mul", [value, reciprocals], outputs=[output])
            divide.metadata_props.update(nodes[0].metadata_props)
            model.graph.insert_before(nodes[0], divide)
            for node in nodes:
                node.replace_input_with(0, output)


def _products_by_input(model: ir.Model) -> dict[ir.Value, list[ir.Node]]:
    """Return the products with constant matrices (inputs × outputs), by their input."""
    products: dict[ir.Value, list[ir.Node]] = {}
    for node in model.graph:
        if node.op_type != "MatMul" or node.inputs[0].const_value is not None:
            continue
        value, weight = node.inputs[0], node.inputs[1].const_value
        if weight is not None and len(weight.shape) == 2 and value.shape is not None:
            products.setdefault(value, []).append(node)
    return products


def _factors(activations: Array, weights: Array) -> NDArray[np.float32]:
    """Return aᵅ / w¹⁻ᵅ of the largest values by channel, with a geometric mean of 1; channels that are 0 stay."""
    live = (activations > 0) & (weights > 0)
    factors = np.ones_like(activations, dtype=np.float64)
    factors[live] = activations[live] ** _STRENGTH / weights[live] ** (1 - _STRENGTH)
    if live.any():
        factors[live] /= np.exp(np.log(factors[live]).mean())
    return factors.astype(np.float32)


def _absorb_into_norm(model: ir.Model, value: ir.Value, nodes: Sequence[ir.Node], factors: Array) -> bool:
    """Divide the norm that computes ``value`` for these nodes alone by the factors; return whether there is one."""
    norm = value.producer()
    if norm is None or norm.op_type != "LayerNormalization" or {user for user, _ in value.uses()} != set(nodes):
        return False
    if value.is_graph_output() or any(v is None or v.const_value is None for v in norm.inputs[1:3]):
        return False
    for index, parameter in enumerate(norm.inputs[1:3], start=1):
        scaled = parameter.const_value.numpy() / factors
        norm.replace_input_with(index, _add_float32(model, f"{parameter.name}_equalised_for_{norm.name}", scaled))
    return True


def _add_float32(model: ir.Model, name: str, array: Array) -> ir.Value:
    return add_constant(model, name, array.astype(np.float32))


def _largest_inputs(source: Path, names: Sequence[str], batches: Sequence[Mapping[str, Tensor]]) -> list[Array]:
    """Return the largest absolute value of every channel, the last dimension, of each of the named tensors."""
    probe = ir.load(source)
    values = {output.name: output for node in probe.graph for output in node.outputs} | {
        value.name: value for value in probe.graph.inputs
    }
    for number, name in enumerate(names):
        value = values[name]
        axes, size = list(range(len(value.shape) - 1)), ir.node("Abs", [value])
        # From opset 18 on these axes are an input.
        if (probe.opset_imports[""] or 0) < 18:
            largest = ir.node("ReduceMax", size.outputs, attributes={"axes": axes, "keepdims": 0})
        else:
            constant = add_constant(probe, f"probe_axes_{number}", np.array(axes, dtype=np.int64))
            largest = ir.node("ReduceMax", [size.outputs[0], constant], attributes={"keepdims": 0})
        largest.outputs[0].name, size.outputs[0].name = f"probe_{number}", f"probe_size_{number}"
        largest.outputs[0].dtype, largest.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([value.shape[-1]])
        probe.graph.extend([size, largest])
        probe.graph.outputs.append(largest.outputs[0])
    with tempfile.TemporaryDirectory(prefix="optin-probe-") as folder:
        file = Path(folder, "probe.onnx")
        save_model(probe, file)
        rows = run_onnx(file, batches, [f"probe_{number}" for number in range(len(names))])
    return [np.max([row[f"probe_{number}"] for row in rows], axis=0) for number in range(len(names))]
