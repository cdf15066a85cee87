"""Models as Triton Inference Server wants them: `MODEL/config.pbtxt` beside `MODEL/1/`, batched by the server."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from exporters.errors import ExportError

Backend = Literal["onnxruntime", "tensorrt"]
MODEL_FILES: dict[Backend, str] = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
"""What each of Triton's back ends looks for in a version's folder."""

# How long a request waits for others to be batched with.
_QUEUE_MICROSECONDS = 100
_TYPES = {
    "FLOAT": "FP32",
    "FLOAT16": "FP16",
    "BFLOAT16": "BF16",
    "DOUBLE": "FP64",
    "BOOL": "BOOL",
    **{f"{sign}INT{bits}": f"{sign}INT{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)},
}


def model_file(folder: Path, backend: Backend) -> Path:
    """Where the model of a folder's first version goes."""
    return folder / "1" / MODEL_FILES[backend]


def triton_config(name: str, backend: Backend, onnx: Path, batch_sizes: Sequence[int]) -> str:
    """A `config.pbtxt` with dynamic batching up to the largest of ``batch_sizes``, all of which are preferred.

    Args:
        name: of the model; its folder has to be called so.
        onnx: the ONNX file that tells inputs and outputs, also of an engine.

    Raises:
        ExportError: an input or output has no dynamic batch first, or a type that Triton does not have.
    """
    import onnx as onnx_package

    graph = onnx_package.load(onnx, load_external_data=False).graph
    weights = {initializer.name for initializer in graph.initializer}
    inputs = [_tensor(value) for value in graph.input if value.name not in weights]
    outputs = [_tensor(value) for value in graph.output]
    sizes = sorted(set(batch_sizes))
    return "\n".join(
        [
            f'name: "{name}"',
            f'backend: "{backend}"',
            f"max_batch_size: {sizes[-1]}",
            *(f"input {text}" for text in inputs),
            *(f"output {text}" for text in outputs),
            "dynamic_batching {",
            f"  preferred_batch_size: [{', '.join(map(str, sizes))}]",
            f"  max_queue_delay_microseconds: {_QUEUE_MICROSECONDS}",
            "}",
            "",
        ]
    )


def _tensor(value: Any) -> str:
    """One input or output, without its batch dimension."""
    from onnx import TensorProto

    kind = TensorProto.DataType.Name(value.type.tensor_type.elem_type)
    if kind not in _TYPES:
        raise ExportError(f"{value.name} is of type {kind}, which Triton does not have")
    dims = value.type.tensor_type.shape.dim
    if not dims or dims[0].HasField("dim_value"):
        raise ExportError(f"{value.name} has no dynamic batch as its first dimension, so Triton cannot batch requests")
    sizes = [str(dim.dim_value) if dim.HasField("dim_value") else "-1" for dim in dims[1:]]
    # A tensor of nothing but the batch has one number for each sample.
    shape = f"dims: [{', '.join(sizes)}]" if sizes else "dims: [1] reshape {}"
    return f'{{\n  name: "{value.name}"\n  data_type: TYPE_{_TYPES[kind]}\n  {shape}\n}}'
