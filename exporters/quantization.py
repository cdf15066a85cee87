"""Write 8-bit precision into an ONNX file, as QuantizeLinear and DequantizeLinear around linear layers.

ONNX Runtime's quantizer finds the ranges on calibration batches and places the operators. Weights have a scale per
output, activations one per tensor, all symmetric, as TensorRT needs them. Everything but the linear layers (attention's
own products, norms, softmax) stays float32. `smoothquant` first brings the channels of their inputs to one size.
"""

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from io import StringIO
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporters.errors import ExportError, first_line
from exporters.files import staged
from exporters.onnx_graph import add_constant, remove_unused
from exporters.onnx_writer import PRODUCER, OnnxSpec, save_model, write_onnx
from exporters.precisions import Precision, Quantized, is_quantized
from exporters.smoothquant import equalise

Batch = Mapping[str, Tensor]

# Ranges change little with more samples.
_SAMPLES = 256
_INT8_MOST, _FP8_MOST = 127.0, 448.0
_FP8_OPSET = 19
# TensorRT's convolutions take int8, and fp8 on few devices only.
_OPERATORS: dict[Quantized, list[str]] = {"int8": ["MatMul", "Gemm", "Conv"], "fp8": ["MatMul", "Gemm"]}


def onnx_in_precision(
    program: torch.export.ExportedProgram,
    path: str | Path,
    spec: OnnxSpec,
    precision: Precision,
    batches: Sequence[Batch],
) -> None:
    """Write the ONNX file of a program, as `in_precision` returns it, in ``precision``.

    Args:
        batches: calibration data for int8 and fp8; other precisions need none.
    """
    if not is_quantized(precision):
        write_onnx(program, path, spec)
        return
    with tempfile.TemporaryDirectory(prefix="optin-quantize-") as folder:
        exact = Path(folder, "exact.onnx")
        write_onnx(program, exact, spec)
        quantize(exact, path, batches, precision)


def quantize(source: Path, path: str | Path, batches: Sequence[Batch], precision: Quantized) -> None:
    """Write ``source``, a float32 ONNX file, with its linear layers in 8 bits.

    Args:
        path: written whole or not at all.
        batches: calibration data by input name; the first 256 samples are used.
        precision: ``int8``, or ``fp8`` (e4m3, from opset 19 on). fp8 has the scales of int8 times 127/448, so that the
            largest value seen becomes the largest value of the type in both.

    Raises:
        ExportError: there is no calibration data, the opset has no fp8, or ONNX Runtime cannot quantize the file.
    """
    batches = _first_samples(batches)
    if not batches:
        raise ExportError(f"{precision} needs calibration data, and there is none")
    with tempfile.TemporaryDirectory(prefix="optin-quantize-") as folder, staged(path) as temporary:
        equalised, quantized = Path(folder, "equalised.onnx"), Path(folder, "quantized.onnx")
        model = ir.load(source)
        if precision == "fp8" and (model.opset_imports[""] or 0) < _FP8_OPSET:
            opset = model.opset_imports[""]
            raise ExportError(f"fp8 needs opset {_FP8_OPSET} or later, and this file has opset {opset}")
        scopes = {node.outputs[0].name: dict(node.metadata_props) for node in model.graph}
        equalise(model, source, batches)
        remove_unused(model)
        save_model(model, equalised)
        _quantize_static(equalised, quantized, batches, precision, _activation_products(model))
        model = ir.load(quantized)
        if precision == "fp8":
            _convert_to_fp8(model)
            remove_unused(model)
        for node in model.graph:
            node.metadata_props.update(scopes.get(_quantized_operator(node).outputs[0].name, {}))
        model.producer_name, model.producer_version = PRODUCER, None
        save_model(model, temporary)


def _first_samples(batches: Sequence[Batch]) -> list[Batch]:
    counts = np.cumsum([0, *(next(iter(b.values())).shape[0] for b in batches)])
    return [b for b, _ in takewhile(lambda pair: pair[1] < _SAMPLES, zip(batches, counts, strict=False))]


def _activation_products(model: ir.Model) -> list[str]:
    """Return the names of products of two activations, as in attention."""
    return [str(node.name) for node in model.graph if node.op_type == "MatMul" and node.inputs[1].const_value is None]


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
        # Weights that become fp8 must not be rounded to int8 before.
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
def _quiet() -> Iterator[None]:
    """Hide what the quantizer prints and logs: its failures are exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(before)


def _quantized_operator(node: ir.Node) -> ir.Node:
    """Return the first operator that a value is quantized for; the node itself if it quantizes none."""
    while node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.outputs[0].uses():
        node = next(iter(node.outputs[0].uses()))[0]
    return node


def _convert_to_fp8(model: ir.Model) -> None:
    """Replace int8 by e4m3 in every pair of operators; weights are rounded here, once."""
    import ml_dtypes

    nodes = [node for node in model.graph if node.op_type in ("QuantizeLinear", "DequantizeLinear")]
    changed: set[str] = set()
    for node in nodes:
        scale, zero = node.inputs[1], node.inputs[2]
        if scale.name not in changed:
            scale.const_value = ir.tensor(scale.const_value.numpy() * (_INT8_MOST / _FP8_MOST), name=scale.name)
            changed.add(scale.name)
        if zero.name not in changed:
            zero.const_value = ir.tensor(np.zeros(zero.const_value.shape, ml_dtypes.float8_e4m3fn), name=zero.name)
            zero.dtype = ir.DataType.FLOAT8E4M3FN
            changed.add(zero.name)
        if node.op_type == "QuantizeLinear":
            node.outputs[0].dtype = ir.DataType.FLOAT8E4M3FN
    for node in nodes:
        if node.op_type == "QuantizeLinear" and node.inputs[0].const_value is not None:
            _round_weight(model, node)


def _round_weight(model: ir.Model, node: ir.Node) -> None:
    """Replace the operator that would round the weight at run time by the rounded weight."""
    import ml_dtypes

    weight, scale = node.inputs[0].const_value.numpy(), node.inputs[1].const_value.numpy()
    axis = node.attributes["axis"].as_int() if scale.ndim else 0
    scales = scale.reshape([-1 if i == axis else 1 for i in range(weight.ndim)]) if scale.ndim else scale
    rounded = np.clip(weight / scales, -_FP8_MOST, _FP8_MOST).astype(ml_dtypes.float8_e4m3fn)
    value = add_constant(model, f"{node.inputs[0].name}_fp8", rounded)
    for user, index in list(node.outputs[0].uses()):
        user.replace_input_with(index, value)
    model.graph.remove(node, safe=True)
