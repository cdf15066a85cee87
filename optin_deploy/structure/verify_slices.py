"""Whether a sliced network computes what the masked one does, and which of the groups cut are to blame if not."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.nn.copies import copied
from optin_deploy.nn.outputs import named_outputs
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.masking import masked
from optin_deploy.structure.slicing import features_of, layer_size

Kept = Mapping[str, Sequence[int]]

# How far a tensor may be off, relative to its norm: in the network's own precision, and in float64.
_TOLERANCE, _EXACT_TOLERANCE = 1e-5, 1e-9
# What is off by less than this may be rounding, so that it is computed again in float64.
_ROUNDING = 0.05


@dataclass(frozen=True)
class Verdict:
    """How a sliced network differs from the masked one.

    Attributes:
        groups: name -> how far what its output projection gives is off, relative to its norm, of those that are off.
        outputs: how far the network's outputs are off, 0 where they are not.
        error: what the sliced network raises, None where it runs.
    """

    groups: Mapping[str, float]
    outputs: float
    error: str | None = None

    @property
    def passed(self) -> bool:
        """Whether nothing differs."""
        return not self.groups and not self.outputs and self.error is None

    @property
    def largest(self) -> float:
        """The largest difference."""
        return max([self.outputs, *self.groups.values()])


@torch.no_grad()
def compared(
    module: nn.Module, small: nn.Module, groups: Sequence[Group], kept: Kept, inputs: Mapping[str, Tensor]
) -> Verdict:
    """Compare ``small``, the sliced ``module``, with the masked ``module``.

    Every output projection goes on with what the masked network gives there. So a difference is that of its own group,
    and rounding does not add up over layers. A difference that may be rounding is judged again in float64, where the
    network can be run in that.

    Args:
        kept: group name -> the units that stay, of all ``groups``.
    """
    found = _compared(module, small, groups, kept, inputs, _TOLERANCE)
    # Of outputs that are decisions, rounding may change a few wholly.
    large = bool(found.groups) and found.largest > _ROUNDING
    if found.passed or found.error is not None or large:
        return found
    wide = {n: t.double() if t.is_floating_point() else t for n, t in inputs.items()}
    try:
        exact = _compared(copied(module).double(), copied(small).double(), groups, kept, wide, _EXACT_TOLERANCE)
    except Exception:
        # Its forward asks for another precision.
        return found
    return found if exact.error is not None else exact


def _compared(
    module: nn.Module,
    small: nn.Module,
    groups: Sequence[Group],
    kept: Kept,
    inputs: Mapping[str, Tensor],
    tolerance: float,
) -> Verdict:
    masks = {g.name: _mask(module, g, kept[g.name]) for g in groups}
    # With the last unit of a group, or of its outer one, the projection goes too.
    staying = [g for g in groups if len(kept[g.name]) and len(kept.get(g.outer or "", (0,)))]
    with masked(module, Structure((), tuple(groups), 0), masks), _recorded(module, staying) as wanted:
        expected = named_outputs(module(**inputs))
    for group in {g.output: g for g in staying}.values():
        wanted[group.output] = [_left(module, group, groups, kept, t) for t in wanted[group.output]]
    differences: dict[str, float] = {}
    try:
        with _replaced(small, staying, wanted, differences):
            given = named_outputs(small(**inputs))
    except Exception as error:
        return Verdict({}, 0.0, told(error))
    same = given.keys() == expected.keys()
    outputs = max((_difference(given[n], t) for n, t in expected.items()), default=0.0) if same else math.inf
    found = {name: off for name, off in differences.items() if off > tolerance}
    return Verdict(found, outputs if outputs > tolerance else 0.0)


def _left(module: nn.Module, group: Group, groups: Sequence[Group], kept: Kept, given: Tensor) -> Tensor:
    """What is left of what the output projection of ``group`` gives, where other groups begin with it."""
    for other in groups:
        for side in other.sides:
            if side.module == group.output and side.axis == "out":
                features = layer_size(module.get_submodule(side.module), side)
                index = features_of(torch.tensor(kept[other.name]), other, features, side.widths)
                given = given.index_select(group.axis, index.to(given.device))
    return given


def told(error: Exception) -> str:
    """An error in a part of a line."""
    return " ".join(str(error).split())[:120] or type(error).__name__


def _mask(module: nn.Module, group: Group, kept: Sequence[int]) -> Tensor:
    parameter = next(module.get_submodule(group.output).parameters())
    mask = torch.zeros(group.units, dtype=parameter.dtype, device=parameter.device)
    mask[list(kept)] = 1
    return mask


def _difference(given: Tensor, wanted: Tensor) -> float:
    """How far ``given`` is off, relative to the norm of ``wanted``, where that is finite."""
    if given.shape != wanted.shape:
        return math.inf
    # Padding, and masks that are handed on, may be infinite or NaN.
    finite = wanted.isfinite()
    found, asked = (t.double().masked_fill(~finite, 0) for t in (given, wanted))
    off, size = float((found - asked).norm()), float(asked.norm())
    if math.isnan(off):
        return math.inf
    return off / size if size else math.inf if off else 0.0


@contextmanager
def _recorded(module: nn.Module, groups: Sequence[Group]) -> Iterator[dict[str, list[Tensor]]]:
    """What the output projections of the groups give while the context lasts, in the order of their runs."""
    found: dict[str, list[Tensor]] = {g.output: [] for g in groups}

    def record(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            # A copy, because the network may change it in place.
            found[name].append(output.clone())

        return hook

    with ExitStack() as stack:
        for name in found:
            stack.callback(module.get_submodule(name).register_forward_hook(record(name)).remove)
        yield found


@contextmanager
def _replaced(
    module: nn.Module, groups: Sequence[Group], wanted: Mapping[str, list[Tensor]], differences: dict[str, float]
) -> Iterator[None]:
    """Output projections give what is ``wanted`` while the context lasts; how far they are off goes to
    ``differences``."""
    runs: Counter[str] = Counter()

    def replace(name: str, of: Sequence[Group]) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> Tensor:
            number = runs[name]
            runs[name] += 1
            off = _difference(output, wanted[name][number]) if number < len(wanted[name]) else math.inf
            for group in of:
                differences[group.name] = max(off, differences.get(group.name, 0.0))
            return output if off == math.inf else wanted[name][number].clone()

        return hook

    with ExitStack() as stack:
        for name in wanted:
            of = [g for g in groups if g.output == name]
            stack.callback(module.get_submodule(name).register_forward_hook(replace(name, of)).remove)
        yield
