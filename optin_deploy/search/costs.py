"""FLOPs, counted by torch's own counter on a real input. One multiply-add is two FLOPs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from optin_deploy.nn.flops import FlopCounts
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan


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
        """What so many units of a group, with so many of its inner group where it has one, cost above the floor."""
        ...


@dataclass(frozen=True)
class Costs:
    """What a network costs: in all, and per unit of each group. The unit is FLOPs for one sample.

    ``widths`` says which group is the inner one of which, and ``shared`` what the modules that both own cost, in
    proportion to both. Where it does not say, they own all together, as heads and their width do.
    """

    total: float
    per_unit: Mapping[str, float]
    units: Mapping[str, int]
    widths: Mapping[str, str] = field(default_factory=dict)
    shared: Mapping[str, float] = field(default_factory=dict)

    @property
    def floor(self) -> float:
        """The cost with every unit removed."""
        return self.total - sum(self.option(name, self.units[name], None) for name in self._removable)

    def of(self, plan: Plan) -> float:
        """The cost of the network that ``plan`` leaves."""
        return self.floor + sum(self.option(name, *kept_size(self, plan, name)) for name in self._removable)

    def option(self, group: str, units: int, width: int | None) -> float:
        """See `CostModel`; a width of None is all of it."""
        inner = self.widths.get(group)
        if inner is None or not units:
            return self.per_unit[group] * units
        part, inner_part = units / self.units[group], 1.0 if width is None else width / self.units[inner]
        if group not in self.shared:
            return self.per_unit[group] * units * inner_part
        shared = self.shared[group]
        alone, inner_alone = (self.per_unit[g] * self.units[g] - shared for g in (group, inner))
        return alone * part + inner_alone * inner_part + shared * part * inner_part

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
    """Units of a group that ``plan`` keeps, and those of its inner group, None where it has none."""

    def kept(name: str) -> int:
        return len(plan.kept[name]) if name in plan.kept else costs.units[name]

    return kept(group), kept(costs.widths[group]) if group in costs.widths else None


def flop_costs(module: nn.Module, structure: Structure, inputs: Mapping[str, Tensor]) -> Costs:
    """`Costs` of ``module`` for one sample of ``inputs``, from one counted forward pass."""
    counts = FlopCounts(module, inputs)

    def cost(modules: Iterable[str]) -> int:
        return sum(counts.of(name) for name in modules)

    per_unit = {g.name: (cost(g.cost.modules) - cost(g.cost.excluded)) / g.units for g in structure.groups}
    pairs = {g.parent: g for g in structure.groups if g.parent is not None}
    widths = {outer: g.name for outer, g in pairs.items()}
    shared = {
        outer: float(cost({*g.cost.modules} & {*structure.group(outer).cost.modules}))
        for outer, g in pairs.items()
        if g.cost.modules != structure.group(outer).cost.modules
    }
    return Costs(counts.total, per_unit, {g.name: g.units for g in structure.groups}, widths, shared)
