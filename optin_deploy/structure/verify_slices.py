"""Compare a sliced network with the masked one, group by group."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optin_deploy.errors import one_line
from optin_deploy.nn.copies import copy_module
from optin_deploy.nn.hooks import forward_hooks
from optin_deploy.nn.outputs import named_outputs
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.masking import mask_units
from optin_deploy.structure.slicing import features_of, layer_size

Kept = Mapping[str, Sequence[int]]

# The largest error, relative to the norm, that counts as equal: in the network's own precision, and in float64.
_TOLERANCE, _EXACT_TOLERANCE = 1e-5, 1e-9
# Smaller errors may be rounding and are computed again in float64.
_ROUNDING = 0.05


@dataclass(frozen=True)
class Verdict:
    """How a sliced network differs from the masked one.

    Attributes:
        groups: Group name -> relative error of the output of its projection, for the groups that differ.
        outputs: Relative error of the network's outputs, 0 if they agree.
        error: The error that the sliced network raises, None if it runs.
    """

    groups: Mapping[str, float]
    outputs: float
    error: str | None = None

    @property
    def passed(self) -> bool:
        """Whether the networks agree."""
        return not self.groups and not self.outputs and self.error is None

    @property
    def largest(self) -> float:
        """The largest relative error."""
        return max([self.outputs, *self.groups.values()])


@torch.no_grad()
def compare_slices(
    module: nn.Module, small: nn.Module, groups: Sequence[Group], kept: Kept, inputs: Mapping[str, Tensor]
) -> Verdict:
    """Compare ``small``, the sliced ``module``, with the masked ``module``.

    The output of every projection is compared and then replaced by that of the masked network. So each error belongs
    to one group, and rounding does not add up over layers. Errors that may be rounding are computed again in float64 if
    the network runs in it.

    Args:
        kept: Group name -> the units that stay, for all ``groups``.
    """
    verdict = _compare(module, small, groups, kept, inputs, _TOLERANCE)
    # Rounding may completely change a few outputs that are decisions.
    large = bool(verdict.groups) and verdict.largest > _ROUNDING
    if verdict.passed or verdict.error is not None or large:
        return verdict
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    try:
        exact = _compare(
            copy_module(module).double(), copy_module(small).double(), groups, kept, wide, _EXACT_TOLERANCE
        )
    except Exception:
        # Its forward requires another precision.
        return verdict
    return verdict if exact.error is not None else exact


def _compare(
    module: nn.Module,
    small: nn.Module,
    groups: Sequence[Group],
    kept: Kept,
    inputs: Mapping[str, Tensor],
    tolerance: float,
) -> Verdict:
    masks = {g.name: _mask(module, g, kept[g.name]) for g in groups}
    # The projection of a group without units, or of one whose parent has none, is removed.
    staying = [g for g in groups if len(kept[g.name]) and len(kept.get(g.parent or "", (0,)))]
    with mask_units(module, Structure((), tuple(groups), 0), masks), _record_outputs(module, staying) as wanted:
        expected = named_outputs(module(**inputs))
    for group in {g.output: g for g in staying}.values():
        wanted[group.output] = [_keep_outputs(module, group, groups, kept, t) for t in wanted[group.output]]
    differences: dict[str, float] = {}
    try:
        with _replace_outputs(small, staying, wanted, differences):
            actual = named_outputs(small(**inputs))
    except Exception as error:
        return Verdict({}, 0.0, one_line(error, 120))
    same = actual.keys() == expected.keys()
    outputs = max((_relative_error(actual[n], t) for n, t in expected.items()), default=0.0) if same else math.inf
    failed = {name: error for name, error in differences.items() if error > tolerance}
    return Verdict(failed, outputs if outputs > tolerance else 0.0)


def _keep_outputs(module: nn.Module, group: Group, groups: Sequence[Group], kept: Kept, output: Tensor) -> Tensor:
    """Return the features of the projection's ``output`` that remain if other groups begin with this projection."""
    for other in groups:
        for side in other.sides:
            if side.module == group.output and side.axis == "out":
                features = layer_size(module.get_submodule(side.module), side)
                index = features_of(torch.tensor(kept[other.name]), other, features, side.widths)
                output = output.index_select(group.axis, index.to(output.device))
    return output


def _mask(module: nn.Module, group: Group, kept: Sequence[int]) -> Tensor:
    parameter = next(module.get_submodule(group.output).parameters())
    mask = torch.zeros(group.units, dtype=parameter.dtype, device=parameter.device)
    mask[list(kept)] = 1
    return mask


def _relative_error(actual: Tensor, expected: Tensor) -> float:
    """Return the error of ``actual`` relative to the norm of ``expected``, over the finite values of ``expected``."""
    if actual.shape != expected.shape:
        return math.inf
    # Padding and masks may be infinite or NaN.
    finite = expected.isfinite()
    a, b = (t.double().masked_fill(~finite, 0) for t in (actual, expected))
    error, norm = float((a - b).norm()), float(b.norm())
    if math.isnan(error):
        return math.inf
    return error / norm if norm else math.inf if error else 0.0


@contextmanager
def _record_outputs(module: nn.Module, groups: Sequence[Group]) -> Iterator[dict[str, list[Tensor]]]:
    """Collect the outputs of the groups' projections while the context lasts, in the order of their runs."""
    outputs: dict[str, list[Tensor]] = {g.output: [] for g in groups}

    def record(name: str, _: nn.Module, __: object, output: Tensor) -> None:
        # A copy, because the network may change it in place.
        outputs[name].append(output.clone())

    with forward_hooks(module, outputs, after=record):
        yield outputs


@contextmanager
def _replace_outputs(
    module: nn.Module, groups: Sequence[Group], wanted: Mapping[str, list[Tensor]], differences: dict[str, float]
) -> Iterator[None]:
    """Replace the outputs of projections by ``wanted`` while the context lasts.

    Their relative errors are stored by group in ``differences``.
    """
    runs: Counter[str] = Counter()

    def replace(name: str, _: nn.Module, __: object, output: Tensor) -> Tensor:
        number = runs[name]
        runs[name] += 1
        error = _relative_error(output, wanted[name][number]) if number < len(wanted[name]) else math.inf
        for group in (g for g in groups if g.output == name):
            differences[group.name] = max(error, differences.get(group.name, 0.0))
        return output if error == math.inf else wanted[name][number].clone()

    with forward_hooks(module, wanted, after=replace):
        yield
