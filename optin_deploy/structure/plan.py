"""Which units stay: the value that search makes and slicing, checkpoints and reports read."""

from collections.abc import Mapping
from dataclasses import dataclass

from optin_deploy.errors import UserError
from optin_deploy.structure.groups import Structure


@dataclass(frozen=True)
class Plan:
    """Group name -> indices of the units kept, ascending. A group that is not named keeps all of its units.

    ``tokens`` says how many tokens enter each block of the network's `TokenStack`; where it is empty, all of them do.
    """

    kept: Mapping[str, tuple[int, ...]]
    tokens: tuple[int, ...] = ()

    def __repr__(self) -> str:
        parts = [f"{name}: {len(units)}" for name, units in self.kept.items()]
        return f"Plan({', '.join([*parts, f'tokens {self.tokens}'] if self.tokens else parts)})"

    def after(self, earlier: "Plan") -> "Plan":
        """This plan, made for a network already pruned by ``earlier``, in the dense network's indices."""
        kept = dict(earlier.kept)
        for name, indices in self.kept.items():
            before = kept.get(name)
            kept[name] = indices if before is None else tuple(before[i] for i in indices)
        return Plan(kept, self.tokens or earlier.tokens)

    def check(self, structure: Structure) -> None:
        """Raise UserError unless every group exists in ``structure``, every index is in range and ascending, and units
        that leave together stay together."""
        units = {g.name: g.units for g in structure.groups}
        tied = {g.name: g for g in structure.groups if g.together is not None}
        inner = {g.name: g for g in structure.groups if g.outer is not None}
        for name, kept in self.kept.items():
            if name not in units:
                raise UserError(f"the plan names group {name!r}, which the network does not have")
            if name in inner and not kept:
                what, outer = inner[name].kind, inner[name].outer
                raise UserError(f"the plan leaves {name!r} no {what}: it goes with the last unit of {outer!r}")
            if list(kept) != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < units[name]):
                raise UserError(f"the plan keeps units {list(kept)[:5]}… of {name!r}, which has {units[name]} units")
            if name in tied and any(0 < len({*kept} & {*each}) < len(each) for each in tied[name].tuples):
                raise UserError(f"the plan parts units of {name!r}: of its {units[name]} units {tied[name].together}")
