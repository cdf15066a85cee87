"""8-bit precision, written into the graph as QuantizeLinear and DequantizeLinear around linear maps.

ONNX Runtime's quantizer finds the ranges on calibration batches and places the operators. Weights have a scale per
output, activations one per tensor, all symmetric, as TensorRT wants them; everything but the linear maps (attention's
own products, norms, softmax) stays float32. Before that the inputs of every map are made equally large, channel by
channel, which changes nothing in float32: transformers have a few channels that would take the whole range.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from functools import partial
from io import StringIO
from itertools import takewhile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from exporters.errors import ExportError, first_line
from exporters.files import staged
from exporters.onnx_writer import PRODUCER, onnx_from_program, save_model
from exporters.precisions import Precision, Quantized, is_quantized
from exporters.smoothquant import drop_unused, equalise
from exporters.tracing import DynamicAxes

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
    precision: Precision,
    batches: Sequence[Batch],
    *,
    output_names: Sequence[str],
    dynamic_axes: DynamicAxes,
    opset: int = 20,
    inner_names: Sequence[str] = (),
) -> None:
    """`onnx_from_program` of what `in_precision` gave for ``precision``, quantized on ``batches`` for int8 and fp8."""
    write = partial(
        onnx_from_program,
        program,
        output_names=output_names,
        dynamic_axes=dynamic_axes,
        opset=opset,
        inner_names=inner_names,
    )
    if not is_quantized(precision):
        write(path)
        return
    with tempfile.TemporaryDirectory(prefix="optin-quantize-") as folder:
        exact = Path(folder, "exact.onnx")
        write(exact)
        quantize(exact, path, batches, precision)


def quantize(source: Path, path: str | Path, batches: Sequence[Batch], precision: Quantized) -> None:
    """Write ``source``, a float32 ONNX file, with its linear maps in 8 bits.

    Args:
        path: appears whole or not at all.
        batches: calibration data by input name; the first 256 samples are used.
        precision: `int8`, or `fp8` (e4m3; opset 19 at least), whose scales are those of int8 times 127/448: both let
            the largest value seen be the largest that there is.

    Raises:
        ExportError: there is nothing to calibrate on, the opset has no fp8, or ONNX Runtime cannot quantize it.
    """
    import onnx_ir as ir

    used = _first(batches)
    if not used:
        raise ExportError(f"{precision} needs calibration data, and there is none")
    with tempfile.TemporaryDirectory(prefix="optin-quantize-") as folder, staged(path) as temporary:
        equal, made = Path(folder, "equal.onnx"), Path(folder, "made.onnx")
        model = ir.load(source)
        if precision == "fp8" and (model.opset_imports[""] or 0) < _FP8_OPSET:
            raise ExportError(f"ONNX has fp8 from opset {_FP8_OPSET} on, and this is opset {model.opset_imports['']}")
        scopes = {node.outputs[0].name: dict(node.metadata_props) for node in model.graph}
        equalise(model, source, used)
        drop_unused(model)
        save_model(model, equal)
        _quantize_static(equal, made, used, precision, _own_products(model))
        model = ir.load(made)
        if precision == "fp8":
            _to_fp8(model)
            drop_unused(model)
        for node in model.graph:
            node.metadata_props.update(scopes.get(_taker(node).outputs[0].name, {}))
        model.producer_name, model.producer_version = PRODUCER, None
        save_model(model, temporary)


def _first(batches: Sequence[Batch]) -> list[Batch]:
    counts = np.cumsum([0, *(next(iter(b.values())).shape[0] for b in batches)])
    return [b for b, _ in takewhile(lambda pair: pair[1] < _SAMPLES, zip(batches, counts, strict=False))]


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
def _quiet() -> Iterator[None]:
    """Without what the quantizer prints and logs: its failures are exceptions."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(StringIO()), redirect_stderr(StringIO()):
            yield
    finally:
        logging.disable(before)


def _taker(node: Any) -> Any:
    """The operator that a value is quantized for, of several the first; the node itself if it quantizes none."""
    while node.op_type in ("QuantizeLinear", "DequantizeLinear") and node.outputs[0].uses():
        node = next(iter(node.outputs[0].uses()))[0]
    return node


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
