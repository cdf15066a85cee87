"""FLOPs, counted by torch's own counter on a real input. One multiply-add is two FLOPs."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from optin_deploy.masking import frozen
from optin_deploy.plan import Plan
from optin_deploy.structure.groups import Structure


class CostModel(Protocol):
    """What a search must know of a cost, in FLOPs or in milliseconds."""

    @property
    def total(self) -> float:
        """The dense network's cost."""
        ...

    @property
    def floor(self) -> float:
        """The cost with every unit removed."""
        ...

    def of(self, plan: Plan) -> float:
        """The cost of the network that ``plan`` leaves."""
        ...

    def option(self, group: str, units: int, width: int | None) -> float:
        """What so many units of a group, each so wide where they can get narrower, cost above the floor."""
        ...


@dataclass(frozen=True)
class Costs:
    """What a network costs: in all, and per unit of each group. The unit is FLOPs for one sample.

    ``widths`` says which group is the width of which heads: what those heads cost is proportional to both, and a
    dimension's cost is its part of that.
    """

    total: float
    per_unit: Mapping[str, float]
    units: Mapping[str, int]
    widths: Mapping[str, str] = field(default_factory=dict)

    @property
    def floor(self) -> float:
        """The cost with every unit removed."""
        return self.total - sum(self.per_unit[name] * self.units[name] for name in self._removable)

    def of(self, plan: Plan) -> float:
        """The cost of the network that ``plan`` leaves."""
        return self.floor + sum(self.option(name, *kept_size(self, plan, name)) for name in self._removable)

    def option(self, group: str, units: int, width: int | None) -> float:
        """See `CostModel`."""
        share = 1.0 if width is None else width / self.units[self.widths[group]]
        return self.per_unit[group] * units * share

    @property
    def _removable(self) -> list[str]:
        widths = set(self.widths.values())
        return [name for name in self.units if name not in widths]


class _Sized(Protocol):
    @property
    def units(self) -> Mapping[str, int]: ...
    @property
    def widths(self) -> Mapping[str, str]: ...


def kept_size(costs: _Sized, plan: Plan, group: str) -> tuple[int, int | None]:
    """Units of a group that ``plan`` keeps, and how wide each is, None where they cannot get narrower."""

    def kept(name: str) -> int:
        return len(plan.kept[name]) if name in plan.kept else costs.units[name]

    return kept(group), kept(costs.widths[group]) if group in costs.widths else None


def count_flops(module: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """FLOPs of one forward pass for one sample of ``inputs`` (its first)."""
    return sum(flops_by_module(module, inputs).get("Global", {}).values())


def flop_costs(module: nn.Module, structure: Structure, inputs: Mapping[str, Tensor]) -> Costs:
    """`Costs` of ``module`` for one sample of ``inputs``, from one counted forward pass."""
    counts = flops_by_module(module, inputs)
    prefix = type(module).__name__
    per_unit = {}
    for group in structure.groups:
        owned = sum(sum(counts.get(f"{prefix}.{owner}", {}).values()) for owner in group.owners)
        per_unit[group.name] = owned / group.units
    total = sum(counts.get("Global", {}).values())
    widths = {g.heads: g.name for g in structure.groups if g.heads is not None}
    return Costs(total, per_unit, {g.name: g.units for g in structure.groups}, widths)


def flops_by_module(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, dict[object, int]]:
    """FLOPs by kind of operator: of every submodule under ``CLASS.name``, with CLASS the module's, and all "Global"."""
    sample = {name: value[:1] for name, value in inputs.items()}
    # The plain attention is counted on every device alike; fused kernels are not all known to the counter.
    # Frozen, because the counter follows everything that could have a gradient.
    with frozen(module), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(**sample)
    return counter.get_flop_counts()
