"""CORP, closed-form one-shot representation-preserving pruning (Zhang & Yang, 2026, arXiv 2602.05243).

From the paper and the defaults of its released code: all layers lose the same share of their units. With x the dense
activations that enter an output projection, S the features kept and P those removed, an affine map x_P ≈ B x_S + c is
fitted by ridge regression on the covariance Σ and mean μ of calibration data,

    B = Σ_PS (Σ_SS + λ 1)⁻¹,    c = μ_P − B μ_S,

and folded into the projection: W_S ← W_S + W_P B, b ← b + W_P c. λ is the larger of 1e-3 and oracle-approximating
shrinkage (Chen et al., 2010) of Σ_SS. Statistics are the dense network's throughout; no layer sees what was done to
those before it. Features are ranked by E[x²] · P(|x| > 1 % of the layer's root mean square).

Where we differ: for attention the paper removes query and key dimensions within heads and compensates the logits. Our
adapters remove whole heads, ranked by the sum over their features and compensated like neurons. FLOPs are met by
rounding the number of heads and filling up with neurons, so that the shares of layers differ by at most one aligned
step.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optin_deploy.network import Network
from optin_deploy.pruning.space import PruningSpace
from optin_deploy.search.knapsack import BUDGET_WINDOW, candidate_sizes, check_budget
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import features_of, slice_network

from .shared import Batch, add_to_bias, check_met, projection_inputs, transformer_part

RIDGE = 1e-3
# A feature is active where it is larger than this part of its layer's root mean square.
ACTIVE = 0.01


@dataclass
class Moments:
    """Rows seen, their sum ``(features,)`` and their second moments ``(features, features)``, in float64."""

    count: int
    total: Tensor
    gram: Tensor

    def add(self, rows: Tensor) -> None:
        """Take in ``(rows, features)``."""
        self.count += len(rows)
        self.total += rows.sum(0)
        self.gram += rows.T @ rows

    @property
    def mean(self) -> Tensor:
        return self.total / self.count

    @property
    def covariance(self) -> Tensor:
        return self.gram / self.count - self.mean.outer(self.mean)


def moments(network: Network, structure: Structure, batches: Sequence[Batch]) -> dict[str, Moments]:
    """`Moments` of the activations that enter every group's output projection in the dense network."""
    found: dict[str, Moments] = {}
    for group, rows in projection_inputs(network, structure, batches):
        features = rows.shape[1]
        empty = Moments(0, rows.new_zeros(features), rows.new_zeros(features, features))
        found.setdefault(group.name, empty).add(rows)
    return found


def active_energy(
    network: Network, structure: Structure, batches: Sequence[Batch], found: dict[str, Moments]
) -> dict[str, Tensor]:
    """E[x²] · P(x active) summed over each unit's features: group name -> float64 ``(units,)`` on the CPU."""
    energy = {name: m.gram.diagonal() / m.count for name, m in found.items()}
    active = {name: torch.zeros_like(e) for name, e in energy.items()}
    for group, rows in projection_inputs(network, structure, batches):
        threshold = ACTIVE * energy[group.name].mean().sqrt()
        active[group.name] += (rows.abs() > threshold).sum(0) / found[group.name].count
    return {g.name: (energy[g.name] * active[g.name]).reshape(g.units, g.width).sum(1).cpu() for g in structure.groups}


def prune(
    network: Network,
    space: PruningSpace,
    batches: Sequence[Batch],
    flops: float,
    *,
    align: int = 64,
    seed: int = 0,
    ridge: float | None = None,
) -> tuple[Plan, nn.Module]:
    """Remove the same share of every group's units and compensation in closed form; see the package.

    Args:
        ridge: λ, in squared activations, in place of the rule above.

    Raises:
        UserError: the budget cannot be reached.
    """
    linear = transformer_part(network.module, space)
    check_budget(linear.structure, linear.costs, flops)
    sizes = uniform_sizes(linear, flops, align)
    found = moments(network, linear.structure, batches)
    scores = active_energy(network, linear.structure, batches, found)
    kept = {}
    for name, size in sizes.items():
        best = scores[name].sort(descending=True, stable=True).indices[:size]
        kept[name] = tuple(best.sort().values.tolist())
    plan = Plan(kept)
    check_met(plan, space.costs, flops, "CORP")
    module = copy.deepcopy(network.module)
    for group in linear.structure.groups:
        if len(kept[group.name]) < group.units:
            compensate(module, group, kept[group.name], found[group.name], ridge)
    return plan, slice_network(module, space.structure, plan)


def uniform_sizes(space: PruningSpace, flops: float, align: int) -> dict[str, int]:
    """The number of units that each group keeps, the same share of each as far as whole heads and steps allow.

    Steps are halved until the budget's window is met; the best that there is comes back where none meets it.
    """
    costs, groups = space.costs, space.structure.groups
    share = (flops * costs.total - costs.floor) / (costs.total - costs.floor)
    heads = {g.name: max(1, min(g.units, round(share * g.units))) for g in groups if g.kind == "head"}
    while True:
        sizes = _filled(space, heads, flops, align)
        spent = costs.floor + sum(costs.per_unit[name] * n for name, n in sizes.items())
        if align == 1 or (flops - BUDGET_WINDOW) * costs.total <= spent:
            return sizes
        align //= 2


def _filled(space: PruningSpace, heads: dict[str, int], flops: float, align: int) -> dict[str, int]:
    """``heads``, and of every other group an equal share of what the budget leaves, rounded down and filled up."""
    costs = space.costs
    others = {g.name: candidate_sizes(g, align) for g in space.structure.groups if g.name not in heads}
    left = flops * costs.total - costs.floor - sum(costs.per_unit[name] * n for name, n in heads.items())
    whole = sum(costs.per_unit[name] * costs.units[name] for name in others)
    share = min(max(left / whole, 0.0), 1.0) if whole else 0.0
    sizes = dict(heads)
    for name, candidates in others.items():
        sizes[name] = max(n for n in candidates if n <= share * costs.units[name] + 1e-9)
        left -= costs.per_unit[name] * sizes[name]
    for name, candidates in others.items():
        larger = next((n for n in candidates if n > sizes[name]), sizes[name])
        extra = costs.per_unit[name] * (larger - sizes[name])
        if extra <= left:
            sizes[name], left = larger, left - extra
    return {g.name: sizes[g.name] for g in space.structure.groups}


@torch.no_grad()
def compensate(module: nn.Module, group: Group, kept: Sequence[int], found: Moments, ridge: float | None) -> None:
    """Fold what the kept units tell of the others into the dense output projection, in place; slice afterwards."""
    linear = module.get_submodule(group.output)
    assert isinstance(linear, nn.Linear)
    features = torch.zeros(len(found.mean), dtype=torch.bool, device=found.mean.device)
    features[features_of(torch.tensor(kept, dtype=torch.long), group, len(features))] = True
    covariance, mean, weight = found.covariance, found.mean, linear.weight.double()
    inner, lost = covariance[features][:, features], weight[:, ~features]
    penalty = (shrinkage(inner, found.count) if ridge is None else ridge) * torch.eye(len(inner)).to(inner)
    predictor = torch.linalg.solve(inner + penalty, covariance[features][:, ~features]).T
    linear.weight[:, features] += (lost @ predictor).to(linear.weight)
    add_to_bias(linear, lost @ (mean[~features] - predictor @ mean[features]))


def shrinkage(covariance: Tensor, count: int) -> float:
    """Ridge for a covariance matrix ``(p, p)`` of ``count`` rows: ρ tr Σ / p, at least 1e-3, with

    ρ = min(1, ((1 − 2/p) tr Σ² + tr² Σ) / ((n + 1 − 2/p) (tr Σ² − tr² Σ / p)))
    """
    p = len(covariance)
    if not p:
        return RIDGE
    trace, square = float(covariance.trace()), float(covariance.square().sum())
    spread = (count + 1 - 2 / p) * (square - trace**2 / p)
    rho = min(1.0, ((1 - 2 / p) * square + trace**2) / spread) if spread > 0 else 1.0
    return max(RIDGE, rho * trace / p)
