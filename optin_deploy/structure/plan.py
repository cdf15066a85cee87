"""The plan: which units stay. Search returns it; slicing, checkpoints and reports read it."""

from collections.abc import Mapping
from dataclasses import dataclass

from optin_deploy.errors import UserError
from optin_deploy.structure.groups import Group, Structure


@dataclass(frozen=True)
class Plan:
    """Group name -> ascending indices of the units kept. A group without an entry keeps all of its units.

    ``tokens`` stores how many tokens enter each block of the network's `TokenStack`; if it is empty, all of them do.
    """

    kept: Mapping[str, tuple[int, ...]]
    tokens: tuple[int, ...] = ()

    def __repr__(self) -> str:
        parts = [f"{name}: {len(units)}" for name, units in self.kept.items()]
        return f"Plan({', '.join([*parts, f'tokens {self.tokens}'] if self.tokens else parts)})"

    def units(self, group: Group) -> tuple[int, ...]:
        """Return the units of ``group`` that are kept, ascending; all of them if the plan has no entry for it."""
        return tuple(self.kept.get(group.name, range(group.units)))

    def removes(self, name: str | None) -> bool:
        """Return whether the plan removes all units of the group ``name``."""
        return name is not None and not self.kept.get(name, True)

    def after(self, earlier: "Plan") -> "Plan":
        """Return this plan, made for a network pruned by ``earlier``, in the dense network's indices."""
        kept = dict(earlier.kept)
        for name, indices in self.kept.items():
            before = kept.get(name)
            kept[name] = indices if before is None else tuple(before[i] for i in indices)
        return Plan(kept, self.tokens or earlier.tokens)

    def check(self, structure: Structure) -> None:
        """Check that every group exists in ``structure``, that indices ascend in range, and that tuples stay whole.

        Raises:
            UserError: The plan does not fit the structure.
        """
        counts = {g.name: g.units for g in structure.groups}
        tied = {g.name: g for g in structure.groups if g.together is not None}
        inner = {g.name: g for g in structure.groups if g.parent is not None}
        for name, kept in self.kept.items():
            if name not in counts:
                raise UserError(f"the plan names group {name!r}, which the network does not have")
            if name in inner and not kept:
                what, outer = inner[name].kind, inner[name].parent
                raise UserError(f"the plan leaves {name!r} no {what}: it goes with the last unit of {outer!r}")
            if list(kept) != sorted(set(kept)) or (kept and not 0 <= kept[0] <= kept[-1] < counts[name]):
                raise UserError(f"the plan keeps units {list(kept)[:5]}… of {name!r}, which has {counts[name]} units")
            if name in tied and any(0 < len({*kept} & {*units}) < len(units) for units in tied[name].tuples):
                raise UserError(f"the plan parts units of {name!r}: of its {counts[name]} units {tied[name].together}")
