"""Channels of the inputs of linear maps made about equally large, in ONNX, at the expense of the weights.

Transformers have a few channels that are far larger than the others and take the whole range of 8 bits. Dividing every
channel by a factor and multiplying the rows of the weights by it changes nothing in float32 (SmoothQuant, Xiao et al.
2023).
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from exporters.onnx_writer import save_model
from exporters.parity import open_session

Batch = Mapping[str, Tensor]

# How much of the difference between channels goes from activations to weights (SmoothQuant's α): of 0.35 to 0.95 the
# best for MiniLM in int8.
_STRENGTH = 0.8


def equalise(model: Any, source: Path, batches: Iterable[Batch]) -> None:
    """Divide every channel of the inputs of matrix products by a factor, and multiply the rows of the weights by it.

    Where a norm makes the input for these products alone, it takes the factors over; elsewhere there is one operator
    more for each input.

    Args:
        model: an `onnx_ir.Model` in float32, changed in place.
        source: the file that it was read from.
        batches: inputs by name, on which the largest value of every channel is looked for.
    """
    import onnx_ir as ir

    maps = _maps(model)
    largest = _largest_inputs(source, [value.name for value in maps], batches)
    for (value, nodes), activations in zip(maps.items(), largest, strict=True):
        weights = [node.inputs[1].const_value.numpy() for node in nodes]
        factors = _factors(activations, np.max([np.abs(w).max(1) for w in weights], axis=0))
        for node, weight in zip(nodes, weights, strict=True):
            name = f"{node.inputs[1].name}_equalised_for_{node.name}"
            node.replace_input_with(1, _constant(ir, model, name, weight * factors[:, None]))
        if not _absorbed(ir, model, value, nodes, factors):
            divide = ir.node("Mul", [value, _constant(ir, model, f"{value.name}_factors", 1 / factors)])
            divide.outputs[0].name = f"{value.name}_equalised"
            divide.outputs[0].dtype, divide.outputs[0].shape = value.dtype, value.shape
            divide.metadata_props.update(nodes[0].metadata_props)
            model.graph.insert_before(nodes[0], divide)
            for node in nodes:
                node.replace_input_with(0, divide.outputs[0])


def _maps(model: Any) -> dict[Any, list[Any]]:
    """The products with constant matrices (inputs × outputs) by the value that they take."""
    found: dict[Any, list[Any]] = {}
    for node in model.graph:
        if node.op_type != "MatMul" or node.inputs[0].const_value is not None:
            continue
        value, weight = node.inputs[0], node.inputs[1].const_value
        if weight is not None and len(weight.shape) == 2 and value.shape is not None:
            found.setdefault(value, []).append(node)
    return found


def _factors(activations: NDArray[Any], weights: NDArray[Any]) -> NDArray[np.float32]:
    """aᵅ / w¹⁻ᵅ of the largest values by channel, with 1 as geometric mean; channels that are always 0 stay."""
    live = (activations > 0) & (weights > 0)
    factors = np.ones_like(activations, dtype=np.float64)
    factors[live] = activations[live] ** _STRENGTH / weights[live] ** (1 - _STRENGTH)
    if live.any():
        factors[live] /= np.exp(np.log(factors[live]).mean())
    return factors.astype(np.float32)


def _absorbed(ir: Any, model: Any, value: Any, nodes: Sequence[Any], factors: NDArray[Any]) -> bool:
    """Whether the norm that makes ``value`` for the ``nodes`` alone could take the factors over."""
    norm = value.producer()
    if norm is None or norm.op_type != "LayerNormalization" or {user for user, _ in value.uses()} != set(nodes):
        return False
    if value.is_graph_output() or any(v is None or v.const_value is None for v in norm.inputs[1:3]):
        return False
    for index, parameter in enumerate(norm.inputs[1:3], start=1):
        scaled = parameter.const_value.numpy() / factors
        norm.replace_input_with(index, _constant(ir, model, f"{parameter.name}_equalised_for_{norm.name}", scaled))
    return True


def drop_unused(model: Any) -> None:
    """Remove the constants of an `onnx_ir.Model` that nothing takes any more."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def _constant(ir: Any, model: Any, name: str, array: NDArray[Any]) -> Any:
    value = ir.Value(name=name, const_value=ir.tensor(array.astype(np.float32), name=name))
    value.dtype, value.shape = ir.DataType.FLOAT, ir.Shape(array.shape)
    model.graph.register_initializer(value)
    return value


def _largest_inputs(source: Path, names: Sequence[str], batches: Iterable[Batch]) -> list[NDArray[Any]]:
    """The largest absolute value of every channel, the last dimension, of each of the tensors named."""
    import onnx_ir as ir

    probe = ir.load(source)
    values = {output.name: output for node in probe.graph for output in node.outputs} | {
        value.name: value for value in probe.graph.inputs
    }
    for number, name in enumerate(names):
        value = values[name]
        axes, size = range(len(value.shape) - 1), ir.node("Abs", [value])
        # From opset 18 on these axes are an input.
        if (probe.opset_imports[""] or 0) < 18:
            largest = ir.node("ReduceMax", size.outputs, attributes={"axes": list(axes), "keepdims": 0})
        else:
            given = _axes(ir, probe, f"probe_axes_{number}", len(axes))
            largest = ir.node("ReduceMax", [size.outputs[0], given], attributes={"keepdims": 0})
        largest.outputs[0].name, size.outputs[0].name = f"probe_{number}", f"probe_size_{number}"
        largest.outputs[0].dtype, largest.outputs[0].shape = ir.DataType.FLOAT, ir.Shape([value.shape[-1]])
        probe.graph.extend([size, largest])
        probe.graph.outputs.append(largest.outputs[0])
    with tempfile.TemporaryDirectory(prefix="optin-probe-") as folder:
        file = Path(folder, "probe.onnx")
        save_model(probe, file)
        return _largest_over(file, [f"probe_{number}" for number in range(len(names))], batches)


def _axes(ir: Any, model: Any, name: str, count: int) -> Any:
    value = ir.Value(name=name, const_value=ir.tensor(np.arange(count), name=name))
    value.dtype, value.shape = ir.DataType.INT64, ir.Shape([count])
    model.graph.register_initializer(value)
    return value


def _largest_over(file: Path, names: list[str], batches: Iterable[Batch]) -> list[NDArray[Any]]:
    session = open_session(file)
    found: list[NDArray[Any]] = []
    for batch in batches if names else ():
        largest = session.run(names, {name: tensor.numpy() for name, tensor in batch.items()})
        found = [np.maximum(a, b) for a, b in zip(found, largest, strict=True)] if found else largest
    return found
