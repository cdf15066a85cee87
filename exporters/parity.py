"""Compare the outputs of an exported file with those of the torch module that it was made from."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from exporters.errors import ExportError, first_line
from exporters.onnx_session import run_onnx

Array = NDArray[Any]
Batch = Mapping[str, Tensor]
Alternatives = Callable[[Mapping[str, Tensor], Mapping[str, Tensor]], Sequence[Tensor]]
"""Other results of the module that are as right, where rounding decides between equal values.

Takes a batch of one sample and the inner values by which the file decided; returns every output for a number of
candidates, ``(candidates, ...)``.
"""


@dataclass(frozen=True)
class OutputParity:
    """The largest difference of one output from torch's over all batches, in the output's own unit.

    For integers and truth values, such as answers and masks, both errors are the part of the values that differ, and
    the reference is 1.

    Attributes:
        max_abs_error: infinite where a shape differs or a value is NaN or infinite on either side; such an output never
            passes.
        shape: of the output in the batch with the largest error.
        samples: number of samples compared.
        near_ties: how many of these were compared with an alternative result of the module.
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


@dataclass(frozen=True)
class _Case:
    """One batch, the module's outputs for it, the file's, and inner values by which the file decided."""

    batch: Batch
    expected: Sequence[Array]
    actual: Sequence[Array]
    decided: Mapping[str, Array]

    @property
    def samples(self) -> int:
        return len(next(iter(self.batch.values())))


def check_parity(
    module: nn.Module,
    onnx_path: str | Path,
    batches: Sequence[Batch],
    output_names: Sequence[str],
    tolerance: float = 1e-4,
    threads: int | None = None,
) -> tuple[OutputParity, ...]:
    """Compare an ONNX file, run by ONNX Runtime's CPU provider, with ``module``; see `compare_outputs`.

    Args:
        threads: of ONNX Runtime.

    Raises:
        ExportError: ONNX Runtime is missing or cannot run the file, the module fails, or the number of its outputs is
            not that of ``output_names``.
    """
    expected = _run_module(module, batches, len(output_names))
    outputs = run_onnx(onnx_path, batches, output_names, threads=threads)
    return _compare(_cases(batches, expected, outputs, output_names), output_names, tolerance, None)


def compare_outputs(
    module: nn.Module,
    outputs: Sequence[Mapping[str, Array]],
    batches: Sequence[Batch],
    output_names: Sequence[str],
    tolerance: float = 1e-4,
    alternatives: Alternatives | None = None,
) -> tuple[OutputParity, ...]:
    """Compare outputs of a runtime with those of ``module``, which is put in eval mode.

    An output passes when its largest absolute error is at most tolerance × max(1, its largest absolute reference
    value), each over all batches. A sample that is further off is compared with the nearest of its ``alternatives``
    instead, if that is within the tolerance in all outputs. Outputs without the batch as their first axis have none.

    Args:
        module: in float32, on the CPU.
        outputs: by name, for each of the batches; values that are not among ``output_names`` go to ``alternatives``.
        batches: tensors by forward's argument names; let them differ in batch size and sequence length.
        output_names: of the module's outputs, in their order.

    Raises:
        ExportError: there is no batch, the module fails, one of ``output_names`` is missing, or their number is not
            that of the module's outputs.
    """
    missing = [name for name in output_names for values in outputs if name not in values]
    if missing:
        raise ExportError(f"there is no output {missing[0]} among {', '.join(outputs[0])}")
    expected = _run_module(module, batches, len(output_names))
    return _compare(_cases(batches, expected, outputs, output_names), output_names, tolerance, alternatives)


def _cases(
    batches: Sequence[Batch],
    expected: Sequence[Sequence[Array]],
    outputs: Sequence[Mapping[str, Array]],
    output_names: Sequence[str],
) -> list[_Case]:
    cases = []
    for batch, row, values in zip(batches, expected, outputs, strict=True):
        decided = {name: array for name, array in values.items() if name not in output_names}
        cases.append(_Case(batch, row, [values[name] for name in output_names], decided))
    return cases


def _run_module(module: nn.Module, batches: Sequence[Batch], count: int) -> list[list[Array]]:
    """Return the outputs of the module by batch; ExportError where it returns anything but ``count`` tensors."""
    if not batches:
        raise ExportError("parity needs at least one batch")
    module.eval()
    return [_run_module_on(module, batch, count) for batch in batches]


def _run_module_on(module: nn.Module, batch: Batch, count: int) -> list[Array]:
    try:
        # Copies, so that a module that changes its inputs does not change those of the file.
        with torch.no_grad():
            result = module(**{name: tensor.clone() for name, tensor in batch.items()})
    except Exception as error:  # whatever a user's module raises
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in batch.items())
        raise ExportError(f"{type(module).__name__} fails on {shapes}: {first_line(error)}") from error
    tensors = [result] if isinstance(result, Tensor) else result
    if not isinstance(tensors, tuple | list) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise ExportError(f"{type(module).__name__} returns a {type(result).__name__}: only tensors can be compared")
    if len(tensors) != count:
        raise ExportError(f"the module returns {len(tensors)} tensors, but {count} outputs are named")
    return [_array(tensor) for tensor in tensors]


def _array(tensor: Tensor) -> Array:
    # NumPy has no bfloat16, of which every value is a float32 too.
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).detach().cpu().numpy()


def _compare(
    cases: Sequence[_Case], output_names: Sequence[str], tolerance: float, alternatives: Alternatives | None
) -> tuple[OutputParity, ...]:
    """Return the worst of all cases, by output."""
    indices = range(len(output_names))
    allowed = [tolerance * max(1.0, *(_largest(case.expected[i]) for case in cases)) for i in indices]
    near_ties = 0
    if alternatives is not None:
        settled = [_settle(case, allowed, alternatives) for case in cases]
        cases, near_ties = [case for case, _ in settled], sum(ties for _, ties in settled)
    samples = sum(case.samples for case in cases)
    parities = []
    for i, name in enumerate(output_names):
        errors = [_error(case.expected[i], case.actual[i]) for case in cases]
        largest, means, references = zip(*errors, strict=True)
        worst, reference = int(np.argmax(largest)), max(references)
        parities.append(
            OutputParity(
                output=name,
                max_abs_error=largest[worst],
                mean_abs_error=max(means),
                max_abs_reference=reference,
                tolerance=tolerance,
                passed=largest[worst] <= tolerance * max(1.0, reference),
                shape=cases[worst].expected[i].shape,
                samples=samples,
                near_ties=near_ties,
            )
        )
    return tuple(parities)


def _settle(case: _Case, allowed: Sequence[float], alternatives: Alternatives) -> tuple[_Case, int]:
    """Expect the nearest alternative of each sample that is further off than allowed, where one is within that.

    Returns:
        The case, and the number of samples with such an alternative.
    """
    pairs = list(zip(case.expected, case.actual, strict=True))
    if any(e.shape != a.shape or e.shape[:1] != (case.samples,) for e, a in pairs):
        return case, 0
    expected, near_ties = [output.copy() for output in case.expected], 0
    for index in np.flatnonzero(~(_sample_errors(case.expected, case.actual, allowed) <= 1)):
        one = slice(index, index + 1)
        with torch.no_grad():
            decided = {name: torch.from_numpy(values[one]) for name, values in case.decided.items()}
            outputs = alternatives({name: tensor[one] for name, tensor in case.batch.items()}, decided)
        candidates = [output.numpy() for output in outputs]
        errors = _sample_errors(candidates, [output[one] for output in case.actual], allowed)
        nearest = int(np.argmin(errors))
        if errors[nearest] <= 1:
            near_ties += 1
            for output, candidate in zip(expected, candidates, strict=True):
                output[index] = candidate[nearest]
    return replace(case, expected=expected), near_ties


def _sample_errors(references: Sequence[Array], outputs: Sequence[Array], allowed: Sequence[float]) -> Array:
    """Return the largest error of each sample over all outputs, as a multiple of what is allowed.

    It is infinite where a value is not finite. One of the two may have one sample, which is compared with all.
    """
    errors = [_sample_error(*row) for row in zip(references, outputs, allowed, strict=True)]
    return np.nan_to_num(np.max(errors, axis=0), nan=math.inf, posinf=math.inf)


def _sample_error(reference: Array, output: Array, allowed: float) -> Array:
    samples = max(len(reference), len(output))
    if _is_answer(reference):
        return (reference != output).reshape(samples, -1).mean(axis=1) / allowed
    errors = np.abs(reference.astype(np.float64) - output.astype(np.float64)).reshape(samples, -1)
    largest: Array = errors.max(axis=1, initial=0) / allowed
    return largest


def _largest(values: Array) -> float:
    """Return the largest absolute finite value; 1 for integers and truth values."""
    return 1.0 if _is_answer(values) else float(np.abs(values[np.isfinite(values)]).max(initial=0))


def _is_answer(values: Array) -> bool:
    """Return whether values are integers or truth values, which differ or not, however far they are apart."""
    return bool(values.dtype.kind in "iub")


def _error(reference: Array, actual: Array) -> tuple[float, float, float]:
    """Return the largest error, the mean error and the largest reference value."""
    if reference.shape != actual.shape or not (np.isfinite(reference).all() and np.isfinite(actual).all()):
        return math.inf, math.inf, 0.0
    if reference.size == 0:
        return 0.0, 0.0, 0.0
    if _is_answer(reference):
        differing = float((reference != actual).mean())
        return differing, differing, 1.0
    error = np.abs(reference.astype(np.float64) - actual.astype(np.float64))
    return float(error.max()), float(error.mean()), float(np.abs(reference).max())
