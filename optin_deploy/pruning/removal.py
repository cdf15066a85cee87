"""Slicing by a plan, and compensation for the removed units."""

from dataclasses import dataclass

from torch import nn

from optin_deploy.compensation.batchnorm import reestimate
from optin_deploy.compensation.classifier import refit_classifier
from optin_deploy.compensation.pair import CompensationPair
from optin_deploy.compensation.refit import compensate
from optin_deploy.compensation.ridge import STRENGTHS
from optin_deploy.compensation.sparsity import sparsify
from optin_deploy.network import Network
from optin_deploy.nn.batches import Batches
from optin_deploy.pruning.settings import Ridge
from optin_deploy.pruning.space import PruningSpace
from optin_deploy.pruning.verify_plan import check_cut
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network
from optin_deploy.tokens.merging import with_merging


@dataclass(frozen=True)
class Remover:
    """Removes units from a network and compensates for them.

    Attributes:
        dense: the network, with its heads in the basis that they are narrowed in.
        space: its prunable units.
        batches: calibration inputs on the network's device.
        ridge: strength of the ridge. None turns compensation off; batch norms get new statistics instead.
    """

    dense: Network
    space: PruningSpace
    batches: Batches
    ridge: Ridge

    def remove(self, plan: Plan) -> nn.Module:
        """Slice by ``plan``, compensate, and merge tokens if the plan says so.

        Merged tokens have no counterpart in the dense network, so linear layers are refitted before tokens merge.
        Class logits have one, so the classifier is refitted afterwards.

        Raises:
            GateError: the sliced network differs from the masked one. Not checked without ``batches``.
        """
        structure, stack = self.space.structure, self.space.stack
        small = slice_network(self.dense.module, structure, plan)
        if self.batches:
            check_cut(self.dense, small, structure, plan, self.batches)
        self._compensate(small, plan)
        if plan.tokens and stack is not None:
            with_merging(small, structure, stack, plan)
        self._refit_classifier(small)
        return small

    def remove_more(self, before: tuple[Plan, nn.Module], step: tuple[Structure, Plan]) -> tuple[Plan, nn.Module]:
        """Slice a pruned module again, and compensate towards the dense network.

        Args:
            before: the plan of the earlier rounds, and the module that it left.
            step: the structure of that module, and the plan in its units (see `rounds.next_step`).

        Returns:
            the plan of all rounds, in units of the dense network, and the module.

        Raises:
            GateError: the sliced network differs from the masked one.
        """
        plan, small = before
        together = step[1].after(plan)
        smaller = slice_network(small, *step)
        check_cut(self.dense.with_module(small), smaller, *step, self.batches)
        self._compensate(smaller, together)
        self._refit_classifier(smaller)
        return together, smaller

    def make_sparse(self, small: nn.Module, plan: Plan) -> None:
        """Set half of the weights of ``small`` to zero in the 2:4 pattern, in place, and refit the others.

        Without a ridge the other weights keep their values. The classifier stays dense.

        Args:
            small: the dense network sliced by ``plan``.
        """
        strengths = STRENGTHS if self.ridge == "auto" else () if self.ridge is None else (self.ridge,)
        sparsify(self._pair(small, plan), self.batches, strengths)
        self._refit_classifier(small)

    def _compensate(self, small: nn.Module, plan: Plan) -> None:
        """Refit all linear layers except the classifier."""
        if self.ridge is None:
            reestimate(small, self.batches)
            return
        strengths = STRENGTHS if self.ridge == "auto" else (self.ridge,)
        compensate(self._pair(small, plan), self.batches, strengths)

    def _pair(self, small: nn.Module, plan: Plan) -> CompensationPair:
        return CompensationPair(self.dense, small, self.space.structure, plan)

    def _refit_classifier(self, small: nn.Module) -> None:
        if self.ridge == "auto":
            refit_classifier(self.dense, small, self.batches)
        elif self.ridge is not None:
            refit_classifier(self.dense, small, self.batches, (self.ridge,))
