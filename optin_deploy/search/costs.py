"""FLOPs, counted by torch's own counter on a real input. One multiply-add is two FLOPs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor, nn

from optin_deploy.nn.flops import FlopCounts
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan


class CostModel(Protocol):
    """A cost that a search keeps below a budget, in FLOPs or in milliseconds."""

    @property
    def total(self) -> float:
        """The dense network's cost."""
        ...

    @property
    def floor(self) -> float:
        """The cost with every unit removed."""
        ...

    def of(self, plan: Plan) -> float:
        """Return the cost of the network that ``plan`` leaves."""
        ...

    def option(self, group: str, units: int, width: int | None) -> float:
        """Return the cost above the floor of ``units`` units of a group, with ``width`` units of its child group."""
        ...


@dataclass(frozen=True)
class Costs:
    """The FLOPs of a network for one sample, by group.

    Attributes:
        total: of the dense network.
        per_unit: of one unit of each group.
        units: number of units of each group.
        widths: parent group -> child group.
        shared: parent group -> FLOPs of the modules that belong to both it and its child; they shrink in proportion to
            both. A parent that is not listed shares all its modules with its child, like heads and their width.
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
        """Return the cost of the network that ``plan`` leaves."""
        return self.floor + sum(self.option(name, *kept_size(self, plan, name)) for name in self._removable)

    def option(self, group: str, units: int, width: int | None) -> float:
        """See `CostModel`; None keeps the whole width."""
        inner = self.widths.get(group)
        if inner is None or not units:
            return self.per_unit[group] * units
        share, inner_share = units / self.units[group], 1.0 if width is None else width / self.units[inner]
        if group not in self.shared:
            return self.per_unit[group] * units * inner_share
        shared = self.shared[group]
        alone, inner_alone = (self.per_unit[g] * self.units[g] - shared for g in (group, inner))
        return alone * share + inner_alone * inner_share + shared * share * inner_share

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
    """Return the number of units that ``plan`` keeps of a group, and of its child group (None without a child)."""

    def kept(name: str) -> int:
        return len(plan.kept[name]) if name in plan.kept else costs.units[name]

    return kept(group), kept(costs.widths[group]) if group in costs.widths else None


def flop_costs(module: nn.Module, structure: Structure, inputs: Mapping[str, Tensor]) -> Costs:
    """Return the `Costs` of ``module`` for one sample of ``inputs``, from one counted forward pass."""
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
