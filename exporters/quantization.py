"""8-bit precision, written into the graph as QuantizeLinear and DequantizeLinear around linear maps.

ONNX Runtime's quantizer finds the ranges on calibration batches and places the operators. Weights have a scale per
output, activations one per tensor, all symmetric, as TensorRT wants them; everything but the linear maps (attention's
own products, norms, softmax) stays float32. Before that the inputs of every map are made equally large, channel by
channel, which changes nothing in float32: transformers have a few channels that would take the whole range.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporters.errors import ExportError, first_line
from exporters.files import staged
from exporters.onnx import onnx_from_program, save_model
from exporters.precision import Precision
from exporters.tracing import DynamicAxes

Quantized = Literal["int8", "fp8"]
Batch = Mapping[str, Tensor]

# How much of the difference between channels goes from activations to weights (SmoothQuant's α, Xiao et al. 2023): of
# 0.35 to 0.95 the best for MiniLM in int8, whose STS-B score falls by 0.1 then, and by 0.6 without.
_STRENGTH = 0.8
# Ranges change little with more samples.
_SAMPLES = 256
_INT8_MOST, _FP8_MOST = 127.0, 448.0
# TensorRT's convolutions take int8, and fp8 on few devices only.
_OPERATORS: dict[Quantized, list[str]] = {"int8": ["MatMul", "Gemm", "Conv"], "fp8": ["MatMul", "Gemm"]}


def is_quantized(precision: Precision) -> bool:
    """Whether a file of ``precision`` is made by calibration."""
    return precision in _OPERATORS


def onnx_in_precision(
    program: torch.export.ExportedProgram,
    path: str | Path,
    precision: Precision,
    batches: Sequence[Batch],
    *,
    output_names: Sequence[str],
    dynamic_axes: DynamicAxes,
    opset: int = 20,
) -> None:
    """`onnx_from_program` of what `in_precision` gave for ``precision``, quantized on ``batches`` for int8 and fp8."""
    if not is_quantized(precision):
        onnx_from_program(program, path, output_names=output_names, dynamic_axes=dynamic_axes, opset=opset)
        return
    with tempfile.TemporaryDirectory(prefix="optin-quantize-") as folder:
        exact = Path(folder, "exact.onnx")
        onnx_from_program(program, exact, output_names=output_names, dynamic_axes=dynamic_axes, opset=opset)
        quantize(exact, path, batches, precision)  # type: ignore[arg-type]


def quantize(source: Path, path: str | Path, batches: Sequence[Batch], precision: Quantized) -> None:
    """Write ``source``, a float32 ONNX file, with its linear maps in 8 bits.

    Args:
        path: appears whole or not at all.
        batches: calibration data by input name; the first 256 samples are used.
        precision: `int8`, or `fp8` (e4m3; opset 19 at least), whose scales are those of int8 times 127/448: both let
            the largest value seen be the largest that there is.

    Raises:
        ExportError: there is nothing to quantize or to calibrate on, or ONNX Runtime cannot do it.
    """
    import onnx_ir as ir

    used = _first(batches)
    if not used:
        raise ExportError(f"{precision} needs calibration data, and there is none")
    with tempfile.TemporaryDirectory(prefix="optin-quantize-") as folder, staged(path) as temporary:
        equal, made = Path(folder, "equal.onnx"), Path(folder, "made.onnx")
        model = ir.load(source)
        scopes = {node.outputs[0].name: dict(node.metadata_props) for node in model.graph}
        _equalise(model, source, used)
        _drop_unused(model)
        save_model(model, equal)
        _quantize_static(equal, made, used, precision, _own_products(model))
        model = ir.load(made)
        if precision == "fp8":
            _to_fp8(model)
            _drop_unused(model)
        for node in model.graph:
            node.metadata_props.update(scopes.get(node.outputs[0].name, {}))
        save_model(model, temporary)


def _first(batches: Sequence[Batch]) -> list[Batch]:
    counts = np.cumsum([0, *(next(iter(b.values())).shape[0] for b in batches)])
    return [b for b, _ in takewhile(lambda pair: pair[1] < _SAMPLES, zip(batches, counts, strict=False))]


def _maps(model: Any) -> dict[Any, list[Any]]:
    """The products with constant matrices (inputs × outputs) by the value that they take."""
    found: dict[Any, list[Any]] = {}
    for node in model.graph:
        if node.op_type == "MatMul" and node.inputs[1].const_value is not None and node.inputs[0].const_value is None:
            found.setdefault(node.inputs[0], []).append(node)
    return found


def _equalise(model: Any, source: Path, batches: Iterable[Batch]) -> None:
    """Divide every channel of the maps' inputs by a factor, and multiply the rows of their weights by it."""
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


def _drop_unused(model: Any) -> None:
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
        axes = _axes(ir, probe, f"probe_axes_{number}", len(value.shape) - 1)
        size = ir.node("Abs", [value])
        largest = ir.node("ReduceMax", [size.outputs[0], axes], attributes={"keepdims": 0})
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
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    found: list[NDArray[Any]] = []
    for batch in batches if names else ():
        largest = session.run(names, {name: tensor.numpy() for name, tensor in batch.items()})
        found = [np.maximum(a, b) for a, b in zip(found, largest, strict=True)] if found else largest
    return found


def _own_products(model: Any) -> list[str]:
    """Products of two activations, as attention has."""
    return [node.name for node in model.graph if node.op_type == "MatMul" and node.inputs[1].const_value is None]


def _quantize_static(
    source: Path, target: Path, batches: Sequence[Batch], precision: Quantized, excluded: list[str]
) -> None:
    try:
        from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    except ImportError as error:
        raise ExportError("onnxruntime is not installed: pip install 'optin-deploy[cpu]'") from error

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self.batches = iter(batches)

        def get_next(self) -> dict[str, NDArray[Any]] | None:
            batch = next(self.batches, None)
            return None if batch is None else {name: tensor.numpy() for name, tensor in batch.items()}

    options = {
        "ActivationSymmetric": True,
        "WeightSymmetric": True,
        "OpTypesToExcludeOutputQuantization": _OPERATORS[precision],
        "QuantizeBias": False,
        # What is to become fp8 must not have gone through int8.
        "AddQDQPairToWeight": precision == "fp8",
    }
    try:
        with _quiet():
            quantize_static(
                str(source),
                str(target),
                Reader(),
                quant_format=QuantFormat.QDQ,
                op_types_to_quantize=_OPERATORS[precision],
                nodes_to_exclude=excluded,
                per_channel=True,
                activation_type=QuantType.QInt8,
                weight_type=QuantType.QInt8,
                use_external_data_format=source.with_name(f"{source.name}.data").exists(),
                extra_options=options,
            )
    except Exception as error:  # the quantizer raises many unrelated types
        raise ExportError(f"ONNX Runtime cannot quantize the network: {first_line(error)}") from error


@contextmanager
def _quiet() -> Any:
    """Without what the quantizer prints and logs: its failures are exceptions."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def _to_fp8(model: Any) -> None:
    """Exchange int8 by e4m3 in every pair of operators; weights are rounded here, once."""
    import ml_dtypes
    import onnx_ir as ir

    eight = ml_dtypes.float8_e4m3fn
    changed: set[str] = set()
    for node in list(model.graph):
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale, zero = node.inputs[1], node.inputs[2]
        if scale.name not in changed:
            scale.const_value = ir.tensor(scale.const_value.numpy() * (_INT8_MOST / _FP8_MOST), name=scale.name)
            changed.add(scale.name)
        if zero.name not in changed:
            zero.const_value = ir.tensor(np.zeros(zero.const_value.shape, eight), name=zero.name)
            zero.dtype = ir.DataType.FLOAT8E4M3FN
            changed.add(zero.name)
        if node.op_type == "QuantizeLinear":
            node.outputs[0].dtype = ir.DataType.FLOAT8E4M3FN
    for node in list(model.graph):
        if node.op_type == "QuantizeLinear" and node.inputs[0].const_value is not None:
            _round_weight(ir, model, node, eight)


def _round_weight(ir: Any, model: Any, node: Any, eight: Any) -> None:
    """Put the rounded weight in the place of the operator that would round it at run time."""
    weight, scale = node.inputs[0].const_value.numpy(), node.inputs[1].const_value.numpy()
    axis = node.attributes["axis"].as_int() if scale.ndim else 0
    over = scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)]) if scale.ndim else scale
    rounded = np.clip(weight / over, -_FP8_MOST, _FP8_MOST).astype(eight)
    name = f"{node.inputs[0].name}_fp8"
    value = ir.Value(name=name, const_value=ir.tensor(rounded, name=name))
    value.dtype, value.shape = ir.DataType.FLOAT8E4M3FN, ir.Shape(rounded.shape)
    model.graph.register_initializer(value)
    for user, index in list(node.outputs[0].uses()):
        user.replace_input_with(index, value)
    model.graph.remove(node, safe=True)
