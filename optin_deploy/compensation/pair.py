"""The dense and the pruned network that compensation compares."""

from dataclasses import dataclass

from torch import nn

from optin_deploy.network import Network
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.plan import Plan


@dataclass(frozen=True)
class CompensationPair:
    """A network and its sliced copy.

    Attributes:
        dense: the dense network.
        pruned: the copy sliced by ``plan``, which compensation changes in place.
        structure: of the dense network.
        plan: the units kept.
    """

    dense: Network
    pruned: nn.Module
    structure: Structure
    plan: Plan

    def is_pruned(self, group: Group) -> bool:
        """Return whether ``group``, or the width of its heads, lost units."""
        both = (group, self.structure.child(group.name))
        return any(g is not None and len(self.plan.units(g)) < g.units for g in both)
