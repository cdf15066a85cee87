"""Models as Triton Inference Server wants them: `MODEL/config.pbtxt` beside `MODEL/1/`, batched by the server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from exporters.errors import ExportError

Backend = Literal["onnxruntime", "tensorrt"]
MODEL_FILES: dict[Backend, str] = {"onnxruntime": "model.onnx", "tensorrt": "model.plan"}
"""What each of Triton's back ends looks for in a version's folder."""

_CONTAINERS = "https://docs.nvidia.com/deeplearning/frameworks/support-matrix/"
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


@dataclass(frozen=True)
class Engine:
    """What Triton has to know of an engine: the version of TensorRT, and whether later versions run it too."""

    version: str
    version_compatible: bool = False


def triton_config(
    name: str, onnx: Path, most: int, sample: Mapping[str, Sequence[int]], engine: Engine | None = None
) -> str:
    """A `config.pbtxt` with dynamic batching up to ``most``, a warm-up, and comments on serving and measuring.

    No batch size is preferred: with size 1 among those that are, a single request would never wait for others.

    Args:
        name: of the model; its folder has to be called so.
        onnx: the ONNX file that tells inputs and outputs, also of an engine.
        most: the largest batch.
        sample: shapes of a sample by input, batch first, for the warm-up.
        engine: the engine that TensorRT serves, by CUDA graphs; None has ONNX Runtime serve the ONNX file.

    Raises:
        ExportError: an input or output has no dynamic batch first, or a type that Triton does not have.
    """
    import onnx as onnx_package

    graph = onnx_package.load(onnx, load_external_data=False).graph
    weights = {initializer.name for initializer in graph.initializer}
    values = [value for value in graph.input if value.name not in weights]
    return "\n".join(
        [
            *_comments(name, most, {value.name: sample[value.name] for value in values}, engine),
            f'name: "{name}"',
            f'backend: "{"tensorrt" if engine else "onnxruntime"}"',
            f"max_batch_size: {most}",
            *(f"input {_tensor(value)}" for value in values),
            *(f"output {_tensor(value)}" for value in graph.output),
            "dynamic_batching {",
            f"  max_queue_delay_microseconds: {_QUEUE_MICROSECONDS}",
            "}",
            *(["optimization { cuda { graphs: true } }"] if engine else []),
            *(f"model_warmup {_warm_up(size, values, sample)}" for size in sorted({1, most})),
            "",
        ]
    )


def _comments(name: str, most: int, sample: Mapping[str, Sequence[int]], engine: Engine | None) -> list[str]:
    """How to serve the model and how to measure it there."""
    shapes = " ".join(f"--shape {n}:{','.join(map(str, s[1:]))}" for n, s in sample.items() if len(s) > 1)
    lines = [f"# Measure: perf_analyzer -m {name} -b 1 --concurrency-range 1:{2 * most} {shapes}".rstrip()]
    if engine is None:
        return lines
    lines.append(f"# Built by TensorRT {engine.version}. Which container has it: {_CONTAINERS}")
    if engine.version_compatible:
        lines.append("# Later versions run it with: tritonserver --backend-config=tensorrt,version-compatible=true")
    return lines


def _warm_up(batch: int, values: Sequence[Any], sample: Mapping[str, Sequence[int]]) -> str:
    """A request of zeros, before the first real one."""
    inputs = []
    for value in values:
        sizes = list(sample[value.name][1:]) or [1]
        kind = f"data_type: TYPE_{_type(value)} dims: [{', '.join(map(str, sizes))}] zero_data: true"
        inputs.append(f'  inputs {{ key: "{value.name}" value: {{ {kind} }} }}')
    return "\n".join([f'{{\n  name: "batch {batch}"\n  batch_size: {batch}', *inputs, "}"])


def _type(value: Any) -> str:
    """Triton's name of a tensor's type; ExportError where it has none."""
    from onnx import TensorProto

    kind = TensorProto.DataType.Name(value.type.tensor_type.elem_type)
    if kind not in _TYPES:
        raise ExportError(f"{value.name} is of type {kind}, which Triton does not have")
    return _TYPES[kind]


def _tensor(value: Any) -> str:
    """One input or output, without its batch dimension."""
    dims = value.type.tensor_type.shape.dim
    if not dims or dims[0].HasField("dim_value"):
        raise ExportError(f"{value.name} has no dynamic batch as its first dimension, so Triton cannot batch requests")
    sizes = [str(dim.dim_value) if dim.HasField("dim_value") else "-1" for dim in dims[1:]]
    # A tensor of nothing but the batch has one number for each sample.
    shape = f"dims: [{', '.join(sizes)}]" if sizes else "dims: [1] reshape {}"
    return f'{{\n  name: "{value.name}"\n  data_type: TYPE_{_type(value)}\n  {shape}\n}}'
