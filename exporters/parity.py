"""Comparing what a file computes with the torch module that it was made from."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporters.errors import ExportError, first_line
from exporters.onnx_writer import save_model
from profilers.external_data import reading_elsewhere

Array = NDArray[Any]
Alternatives = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Sequence[Tensor]]
"""From a batch of one sample, and what the file decided on it, to what the module may as rightly give for it, where its
computation decides between what is equal but for rounding: every output, ``(candidates, ...)``."""


@dataclass(frozen=True)
class OutputParity:
    """How far one output of the ONNX file is from torch's, at worst over all batches, in the output's own unit.

    `shape` is the output's in the batch with the largest error. Errors are infinite where a shape differs or a value
    is NaN or infinite on either side; such an output never passes. Of integers and truth values (answers, masks) both
    errors are the part of the values that differ, and the reference is 1. Of all `samples`, `near_ties` were compared
    with an alternative that the module may as rightly give.
    """

    output: str
    max_abs_error: float
    mean_abs_error: float
    max_abs_reference: float
    tolerance: float
    passed: bool
    shape: tuple[int, ...]
    samples: int = 0
    near_ties: int = 0


def check_parity(
    module: nn.Module,
    onnx_path: str | Path,
    batches: Sequence[Mapping[str, Tensor]],
    output_names: Sequence[str],
    tolerance: float = 1e-4,
    threads: int | None = None,
    alternatives: Alternatives | None = None,
    decisions: Sequence[str] = (),
) -> tuple[OutputParity, ...]:
    """Runs `module` (put in eval mode, float32, CPU) and the ONNX file under ONNX Runtime's CPU provider on `batches`.

    A batch maps forward's argument names to tensors; let batches differ in batch size and sequence length. An output
    passes when its largest absolute error is at most tolerance × max(1, its largest absolute reference value), each
    over all batches. A sample that is further off is compared with the nearest of its `alternatives` instead, if that
    is within the tolerance in all outputs; outputs without the batch as their first axis have none. `alternatives` are
    told the `decisions`, values inside of the file. `threads` limits ONNX Runtime's threads. Raises ExportError when
    ONNX Runtime is missing, cannot run the file, or the number of outputs is not that of `output_names`.
    """
    expected = _expected(module, batches, output_names)
    with _giving(Path(onnx_path), decisions) as file:
        session = open_session(file, threads)
    given = [_run(session, batch, (*output_names, *decisions)) for batch in batches]
    actual = [row[: len(output_names)] for row in given]
    decided = [dict(zip(decisions, row[len(output_names) :], strict=True)) for row in given]
    return _compared(expected, actual, batches, output_names, tolerance, alternatives, decided)


def compare_outputs(
    module: nn.Module,
    outputs: Sequence[Mapping[str, Array]],
    batches: Sequence[Mapping[str, Tensor]],
    output_names: Sequence[str],
    tolerance: float = 1e-4,
    alternatives: Alternatives | None = None,
) -> tuple[OutputParity, ...]:
    """`check_parity` for outputs that were computed elsewhere: by name, for each of the batches.

    Raises ExportError when one of ``output_names`` is missing or their number is not that of the module's outputs.
    """
    missing = [name for name in output_names for given in outputs if name not in given]
    if missing:
        raise ExportError(f"there is no output {missing[0]} among {', '.join(outputs[0])}")
    actual = [[given[name] for name in output_names] for given in outputs]
    expected = _expected(module, batches, output_names)
    return _compared(expected, actual, batches, output_names, tolerance, alternatives, [{}] * len(batches))


class OnnxModule(nn.Module):
    """An ONNX file under ONNX Runtime's CPU provider in the place of a module.

    Args:
        path: the file.
        outputs: name in the file -> what the result, a mapping, has it under.
        threads: of ONNX Runtime.

    Raises:
        ExportError: ONNX Runtime is missing or cannot load the file.
    """

    def __init__(self, path: str | Path, outputs: Mapping[str, str], threads: int | None = None) -> None:
        super().__init__()
        self.session, self.outputs = open_session(path, threads), dict(outputs)

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        given = self.session.run(list(self.outputs), {name: t.cpu().numpy() for name, t in inputs.items()})
        return {key: torch.from_numpy(array) for key, array in zip(self.outputs.values(), given, strict=True)}


@contextmanager
def _giving(path: Path, names: Sequence[str]) -> Iterator[Path]:
    """The file, or one that gives values of its inside, too; ExportError where it has none of these names."""
    if not names:
        yield path
        return
    import onnx_ir as ir

    model = ir.load(path)
    values = {output.name: output for node in model.graph.all_nodes() for output in node.outputs}
    missing = [name for name in names if name not in values]
    if missing:
        raise ExportError(f"{path.name} has no value {missing[0]}: export it again")
    model.graph.outputs.extend(values[name] for name in names)
    with tempfile.TemporaryDirectory(prefix="optin-parity-") as folder:
        made = Path(folder, path.name)
        save_model(model, made)
        yield made


@dataclass(frozen=True)
class _Difference:
    largest: float
    mean: float
    reference: float
    shape: tuple[int, ...]


def _expected(
    module: nn.Module, batches: Sequence[Mapping[str, Tensor]], output_names: Sequence[str]
) -> list[list[Array]]:
    """What the module gives, batches × outputs."""
    if not batches:
        raise ExportError("parity needs at least one batch")
    module.eval()
    rows = []
    for batch in batches:
        expected = _given(module, batch)
        if len(expected) != len(output_names):
            raise ExportError(f"the module returns {len(expected)} tensors, but {len(output_names)} outputs are named")
        rows.append([_array(tensor) for tensor in expected])
    return rows


def _given(module: nn.Module, batch: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors that the module gives; ExportError where it fails, or gives something else."""
    try:
        # Copies, so that a module that changes its inputs does not change those of the file.
        with torch.no_grad():
            result = module(**{name: tensor.clone() for name, tensor in batch.items()})
    except Exception as error:  # whatever a user's module raises
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.items())
        raise ExportError(f"{type(module).__name__} fails on {shapes}: {first_line(error)}") from error
    found = [result] if isinstance(result, Tensor) else result
    if not isinstance(found, tuple | list) or not all(isinstance(each, Tensor) for each in found):
        raise ExportError(
            f"{type(module).__name__} gives a {type(result).__name__}: a tensor or a tuple of them is compared"
        )
    return list(found)


def _array(tensor: Tensor) -> Array:
    # NumPy has no bfloat16, of which every value is a float32 too.
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()


def _run(session: Any, batch: Mapping[str, Tensor], output_names: Sequence[str]) -> list[Array]:
    try:
        return list(session.run(list(output_names), {name: tensor.numpy() for name, tensor in batch.items()}))
    except Exception as error:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.items())
        raise ExportError(f"ONNX Runtime cannot run the file on {shapes}: {first_line(error)}") from error


def _compared(
    expected: Sequence[Sequence[Array]],
    actual: Sequence[Sequence[Array]],
    batches: Sequence[Mapping[str, Tensor]],
    output_names: Sequence[str],
    tolerance: float,
    alternatives: Alternatives | None,
    decided: Sequence[Mapping[str, Array]],
) -> tuple[OutputParity, ...]:
    """The worst of all batches, by output; expected and actual are batches × outputs."""
    allowed = [tolerance * max(1.0, *(_largest(row[i]) for row in expected)) for i in range(len(output_names))]
    near_ties = 0
    if alternatives is not None:
        cases = zip(expected, actual, batches, decided, strict=True)
        settled = [_settled(*each, allowed, alternatives) for each in cases]
        expected, near_ties = [row for row, _ in settled], sum(ties for _, ties in settled)
    rows = [[_difference(*pair) for pair in zip(*row, strict=True)] for row in zip(expected, actual, strict=True)]
    samples = sum(len(next(iter(batch.values()))) for batch in batches)
    return tuple(
        _worst(name, [row[i] for row in rows], tolerance, samples, near_ties) for i, name in enumerate(output_names)
    )


def _settled(
    expected: Sequence[Array],
    actual: Sequence[Array],
    batch: Mapping[str, Tensor],
    decided: Mapping[str, Array],
    allowed: Sequence[float],
    alternatives: Alternatives,
) -> tuple[list[Array], int]:
    """The expected outputs with the nearest alternative of each sample that is further off than allowed, where there is
    one within that; and for how many samples there is."""
    found, near_ties = [output.copy() for output in expected], 0
    size = len(next(iter(batch.values())))
    if any(e.shape != a.shape or e.shape[:1] != (size,) for e, a in zip(expected, actual, strict=True)):
        return found, near_ties
    apart = _apart(expected, actual, allowed)
    for sample in np.flatnonzero(~(apart <= 1)):
        with torch.no_grad():
            one = {name: tensor[sample : sample + 1] for name, tensor in batch.items()}
            its = {name: torch.from_numpy(values[sample : sample + 1]) for name, values in decided.items()}
            made = alternatives(one, its)
        candidates = [output.numpy() for output in made]
        distances = _apart(candidates, [output[sample : sample + 1] for output in actual], allowed)
        nearest = int(np.argmin(distances))
        if distances[nearest] <= 1:
            near_ties += 1
            for output, candidate in zip(found, candidates, strict=True):
                output[sample] = candidate[nearest]
    return found, near_ties


def _apart(some: Sequence[Array], others: Sequence[Array], allowed: Sequence[float]) -> Array:
    """By sample, the largest error of all outputs in units of what is allowed; infinite where a value is not finite."""
    errors = [_by_sample(*each) for each in zip(some, others, allowed, strict=True)]
    return np.nan_to_num(np.max(errors, axis=0), nan=math.inf, posinf=math.inf)


def _by_sample(some: Array, others: Array, allowed: float) -> Array:
    if _is_answer(some):
        return (some != others).reshape(max(len(some), len(others)), -1).mean(axis=1) / allowed
    errors = np.abs(some.astype(np.float64) - others.astype(np.float64)).reshape(max(len(some), len(others)), -1)
    largest: Array = errors.max(axis=1, initial=0) / allowed
    return largest


def _largest(values: Array) -> float:
    """The largest value that is finite; 1 of answers, which differ or do not."""
    return 1.0 if _is_answer(values) else float(np.abs(values[np.isfinite(values)]).max(initial=0))


def _is_answer(values: Array) -> bool:
    """Whether the values are integers or truth values: which one it is counts, not how far apart two are."""
    return bool(values.dtype.kind in "iub")


def _difference(reference: Array, actual: Array) -> _Difference:
    if reference.shape != actual.shape or not (np.isfinite(reference).all() and np.isfinite(actual).all()):
        return _Difference(math.inf, math.inf, 0.0, reference.shape)
    if reference.size == 0:
        return _Difference(0.0, 0.0, 0.0, reference.shape)
    if _is_answer(reference):
        differing = float((reference != actual).mean())
        return _Difference(differing, differing, 1.0, reference.shape)
    error = np.abs(reference.astype(np.float64) - actual.astype(np.float64))
    return _Difference(float(error.max()), float(error.mean()), float(np.abs(reference).max()), reference.shape)


def _worst(
    name: str, differences: Sequence[_Difference], tolerance: float, samples: int, near_ties: int
) -> OutputParity:
    worst = max(differences, key=lambda difference: difference.largest)
    reference = max(difference.reference for difference in differences)
    return OutputParity(
        output=name,
        max_abs_error=worst.largest,
        mean_abs_error=max(difference.mean for difference in differences),
        max_abs_reference=reference,
        tolerance=tolerance,
        passed=worst.largest <= tolerance * max(1.0, reference),
        shape=worst.shape,
        samples=samples,
        near_ties=near_ties,
    )


def open_session(path: str | Path, threads: int | None = None) -> Any:
    """The file under ONNX Runtime's CPU provider; ExportError when that is missing or cannot load it, or the file has
    weights outside its own directory."""
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
