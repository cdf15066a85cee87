"""Variance-based pruning (Berisha, Mehnert & Condurache, ICCV 2025, arXiv 2507.12988).

From the paper: over calibration data, count each FFN neuron's activation h behind the non-linearity, mean μ and
variance σ² = Σ (h − μ)² / (N − 1) by Welford's running update. Remove the neurons of least variance, in one ranking
over the whole network, and put μ in their place by folding it into the bias of the output projection: b ← b + W_P μ_P.
Attention stays. The paper then fine-tunes for ten epochs; here nothing is trained.

Where we differ: groups keep aligned numbers of neurons, found by our knapsack over variance × cost, whose best units
per FLOP are those of most variance.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.pruning.space import PruningSpace
from optin_deploy.search.knapsack import search
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

from .shared import Batch, add_to_bias, check_met, part, projection_inputs, transformer_part


@dataclass
class Spread:
    """Mean and summed squared deviation, ``(features,)`` each, of the rows seen so far; Welford's update by batches."""

    count: int
    mean: Tensor
    squares: Tensor

    def add(self, rows: Tensor) -> None:
        """Take in ``(rows, features)``."""
        if not len(rows):
            return
        mean = rows.mean(0)
        total = self.count + len(rows)
        self.squares += (rows - mean).square().sum(0) + (mean - self.mean).square() * (self.count * len(rows) / total)
        self.mean += (mean - self.mean) * (len(rows) / total)
        self.count = total

    @property
    def variance(self) -> Tensor:
        return self.squares / max(self.count - 1, 1)


def spreads(network: Network, structure: Structure, batches: Sequence[Batch]) -> dict[str, Spread]:
    """`Spread` of the activations behind the units of every group in the dense network; group name -> float64."""
    found: dict[str, Spread] = {}
    for group, rows in projection_inputs(network, structure, batches):
        found.setdefault(group.name, Spread(0, torch.zeros_like(rows[0]), torch.zeros_like(rows[0]))).add(rows)
    return found


def prune(
    network: Network, space: PruningSpace, batches: Sequence[Batch], flops: float, *, align: int = 64, seed: int = 0
) -> tuple[Plan, nn.Module]:
    """Remove FFN neurons until at most ``flops`` of the FLOPs are left; see the package.

    Raises:
        UserError: the budget cannot be reached with neurons alone.
    """
    whole = transformer_part(network.module, space)
    ffn = part(whole, [g for g in whole.structure.groups if g.kind == "neuron"])
    if flops * ffn.costs.total < ffn.costs.floor:
        raise UserError(
            f"variance-based pruning removes FFN neurons only: without any, {ffn.costs.floor / ffn.costs.total:.3f} of "
            f"the FLOPs are left, more than the {flops:g} asked for"
        )
    found = spreads(network, ffn.structure, batches)
    scores = {name: spread.variance.cpu() * ffn.costs.per_unit[name] for name, spread in found.items()}
    plan = search(ffn.structure, scores, ffn.costs, flops, align)
    check_met(plan, space.costs, flops, "variance-based pruning")
    module = copy.deepcopy(network.module)
    for group in ffn.structure.groups:
        shift_mean(module, group, plan.kept[group.name], found[group.name].mean)
    return plan, slice_network(module, space.structure, plan)


@torch.no_grad()
def shift_mean(module: nn.Module, group: Group, kept: Sequence[int], mean: Tensor) -> None:
    """Fold the mean activations ``(units,)`` of the units not kept into the bias of the dense output projection."""
    linear = module.get_submodule(group.output)
    assert isinstance(linear, nn.Linear)
    removed = mean.clone()
    removed[list(kept)] = 0.0
    add_to_bias(linear, linear.weight.double() @ removed)
