"""What the rivals share: the groups they work on, budgets, and activations that enter output projections."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from optin_deploy.criteria.fisher import ends_linear
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.nn.partial_forward import record_inputs
from optin_deploy.nn.unfold import valid_rows
from optin_deploy.pruning.space import PruningSpace
from optin_deploy.search.costs import Costs
from optin_deploy.search.knapsack import BUDGET_WINDOW
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.plan import Plan

Batch = Mapping[str, Tensor]


def part(space: PruningSpace, groups: Sequence[Group]) -> PruningSpace:
    """The same network where only ``groups`` can be pruned; all else is part of the floor."""
    names = [g.name for g in groups]
    costs = replace(
        space.costs,
        per_unit={name: space.costs.per_unit[name] for name in names},
        units={name: space.costs.units[name] for name in names},
    )
    return replace(space, structure=replace(space.structure, groups=tuple(groups)), costs=costs)


def transformer_part(module: nn.Module, space: PruningSpace) -> PruningSpace:
    """Only the groups that end in a linear projection; the rivals know no convolutions."""
    return part(space, [g for g in space.structure.groups if ends_linear(module, g)])


def check_met(plan: Plan, costs: Costs, flops: float, method: str) -> None:
    """Raise UserError unless the plan costs at most ``flops`` of the dense FLOPs and at most 0.01 less."""
    share = costs.of(plan) / costs.total
    if not flops - BUDGET_WINDOW - 1e-9 <= share <= flops + 1e-9:
        raise UserError(
            f"{method} cannot keep {flops:g} of the FLOPs of this network: the nearest that it finds is {share:.3f}"
        )


@torch.no_grad()
def projection_inputs(
    network: Network, structure: Structure, batches: Sequence[Batch]
) -> Iterator[tuple[Group, Tensor]]:
    """For every batch and group the dense activations behind the units, ``(valid tokens, features)`` in float64."""
    outputs = tuple(g.output for g in structure.groups)
    for batch in batches:
        with record_inputs(network.module, outputs) as seen:
            network.forward(batch)
        for group in structure.groups:
            yield group, valid_rows(seen.pop(group.output), network.valid_tokens(batch)).double()


def add_to_bias(linear: nn.Linear, change: Tensor) -> None:
    """Add ``(outputs,)`` to the bias, which the layer is given if it has none."""
    if linear.bias is None:
        linear.bias = nn.Parameter(torch.zeros_like(linear.weight[:, 0]), requires_grad=linear.weight.requires_grad)
    linear.bias.data += change.to(linear.bias)
