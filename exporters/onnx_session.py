"""ONNX files run by ONNX Runtime's CPU provider."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporters.errors import ExportError, first_line
from exporters.onnx_writer import save_model
from profilers.external_data import reading_elsewhere

if TYPE_CHECKING:
    from onnxruntime import InferenceSession

Array = NDArray[Any]


class OnnxModule(nn.Module):
    """An ONNX file in the place of a module.

    Args:
        path: the file.
        outputs: name in the file -> key in the dict that ``forward`` returns.
        threads: of ONNX Runtime.

    Raises:
        ExportError: ONNX Runtime is missing or cannot load the file.
    """

    def __init__(self, path: str | Path, outputs: Mapping[str, str], threads: int | None = None) -> None:
        super().__init__()
        self.session, self.outputs = open_session(path, threads), dict(outputs)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        arrays = self.session.run(list(self.outputs), {name: t.cpu().numpy() for name, t in inputs.items()})
        return {key: torch.from_numpy(array) for key, array in zip(self.outputs.values(), arrays, strict=True)}


def run_onnx(
    path: str | Path,
    batches: Sequence[Mapping[str, Tensor]],
    outputs: Sequence[str],
    inner: Sequence[str] = (),
    threads: int | None = None,
) -> list[dict[str, Array]]:
    """Return the named values that the file computes for each batch.

    Args:
        outputs: names of outputs.
        inner: names of values inside of the file.
        threads: of ONNX Runtime.

    Raises:
        ExportError: ONNX Runtime is missing or cannot run the file, or it has no value of a name.
    """
    with _with_outputs(Path(path), inner) as file:
        session = open_session(file, threads)
    return [_run_batch(session, batch, [*outputs, *inner]) for batch in batches]


def _run_batch(session: InferenceSession, batch: Mapping[str, Tensor], names: Sequence[str]) -> dict[str, Array]:
    try:
        arrays = session.run(list(names), {name: tensor.numpy() for name, tensor in batch.items()})
    except Exception as error:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.items())
        raise ExportError(f"ONNX Runtime cannot run the file on {shapes}: {first_line(error)}") from error
    return dict(zip(names, arrays, strict=True))


@contextmanager
def _with_outputs(path: Path, inner: Sequence[str]) -> Iterator[Path]:
    """Yield the file, or a temporary copy that also returns values inside of it."""
    if not inner:
        yield path
        return
    model = ir.load(path)
    values = {output.name: output for node in model.graph.all_nodes() for output in node.outputs}
    missing = [name for name in inner if name not in values]
    if missing:
        raise ExportError(f"{path.name} has no value {missing[0]}: export it again")
    model.graph.outputs.extend(values[name] for name in inner)
    with tempfile.TemporaryDirectory(prefix="optin-parity-") as folder:
        copy = Path(folder, path.name)
        save_model(model, copy)
        yield copy


def open_session(path: str | Path, threads: int | None = None) -> InferenceSession:
    """Open the file; ExportError where ONNX Runtime is missing or cannot load it, or weights are outside its folder."""
    if elsewhere := reading_elsewhere(Path(path)):
        raise ExportError(elsewhere)
    try:
        import onnxruntime
    except ImportError as error:
        raise ExportError("onnxruntime is not installed: pip install 'optin-deploy[cpu]'") from error
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    if threads is not None:
        options.intra_op_num_threads = threads
    try:
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise ExportError(f"ONNX Runtime cannot load {Path(path).name}: {first_line(error)}") from error
