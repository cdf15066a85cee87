"""FLOPs, counted by torch's own counter on a real input. One multiply-add is two FLOPs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from optin_deploy.masking import frozen
from optin_deploy.plan import Plan
from optin_deploy.structure.groups import Structure


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
        return self.floor + sum(
            self.per_unit[name] * self.units[name] * self._share(plan, name) * self._share(plan, self.widths.get(name))
            for name in self._removable
        )

    @property
    def _removable(self) -> list[str]:
        widths = set(self.widths.values())
        return [name for name in self.units if name not in widths]

    def _share(self, plan: Plan, name: str | None) -> float:
        return len(plan.kept[name]) / self.units[name] if name is not None and name in plan.kept else 1.0


def count_flops(module: nn.Module, inputs: Mapping[str, Tensor]) -> int:
    """FLOPs of one forward pass for one sample of ``inputs`` (its first)."""
    return sum(_counts(module, inputs).get("Global", {}).values())


def flop_costs(module: nn.Module, structure: Structure, inputs: Mapping[str, Tensor]) -> Costs:
    """`Costs` of ``module`` for one sample of ``inputs``, from one counted forward pass."""
    counts = _counts(module, inputs)
    prefix = type(module).__name__
    per_unit = {}
    for group in structure.groups:
        owned = sum(sum(counts.get(f"{prefix}.{owner}", {}).values()) for owner in group.owners)
        per_unit[group.name] = owned / group.units
    total = sum(counts.get("Global", {}).values())
    widths = {g.heads: g.name for g in structure.groups if g.heads is not None}
    return Costs(total, per_unit, {g.name: g.units for g in structure.groups}, widths)


def flops_share(module: nn.Module, inputs: Mapping[str, Tensor], name: str) -> float:
    """The part of the FLOPs that the submodule ``name`` takes."""
    counts = _counts(module, inputs)
    total = sum(counts.get("Global", {}).values())
    return sum(counts.get(f"{type(module).__name__}.{name}", {}).values()) / total if total else 0.0


def _counts(module: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, dict[object, int]]:
    sample = {name: value[:1] for name, value in inputs.items()}
    # The plain attention is counted on every device alike; fused kernels are not all known to the counter.
    # Frozen, because the counter follows everything that could have a gradient.
    with frozen(module), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        module(**sample)
    return counter.get_flop_counts()
