"""Code that several baselines use: their groups, budgets, and the activations that enter output projections."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.nn.partial_forward import forward_until, record_inputs, record_outputs, replay_blocks
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
    """Only the groups that end in a linear projection; the baselines support no convolutions."""
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


@torch.no_grad()
def sublayer_moments(
    network: Network,
    pruned: nn.Module,
    structure: Structure,
    group: Group,
    batches: Sequence[Batch],
    done: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``XᵀX``, ``XᵀT`` and V for least squares on one sublayer, float64, summed over the valid tokens.

    X ``(tokens, features)`` are the activations that enter the group's output projection in ``pruned``. V
    ``(outputs, features)`` are its weights there times LayerScale. T ``(tokens, outputs)`` is the value of X Vᵀ that
    makes the residual stream after the sublayer equal to that of the dense network, bias aside; where the structure
    names no module whose input is the stream, T is the output of the dense sublayer. The group must end in a linear
    projection and have a unit left.

    Args:
        done: for each batch the outputs of the blocks before the group's, of the dense and of the pruned network;
            without them the networks run from their inputs.
    """
    projection = pruned.get_submodule(group.output)
    assert isinstance(projection, nn.Linear)
    block = structure.blocks[group.layer]
    residual = (group.stream.residual,) if group.stream.residual else ()
    scale = pruned.get_parameter(group.stream.scale).double().reshape(-1) if group.stream.scale else 1.0
    weight = projection.weight.double().T.mul(scale).T
    bias = projection.bias.double() * scale if projection.bias is not None else 0.0
    gram, cross = weight.new_zeros(2 * weight.shape[1:]), weight.new_zeros(weight.shape[::-1])
    for batch, (dense_done, pruned_done) in zip(batches, done or [({}, {})] * len(batches), strict=True):
        with (
            replay_blocks(network.module, dense_done),
            record_inputs(network.module, residual) as streams,
            record_outputs(network.module, (group.output,)) as outputs,
        ):
            forward_until(network.module, batch, block)
        with replay_blocks(pruned, pruned_done), record_inputs(pruned, (*residual, group.output)) as seen:
            forward_until(pruned, batch, block)
        target = outputs[group.output].double() * scale - bias
        for name in residual:
            target = target + (streams[name].double() - seen[name].double())
        valid = network.valid_tokens(batch)
        x, target = valid_rows(seen[group.output].double(), valid), valid_rows(target, valid)
        gram += x.T @ x
        cross += x.T @ target
    return gram, cross, weight


def ends_linear(module: nn.Module, group: Group) -> bool:
    """Return whether ``group`` ends in a linear projection."""
    return isinstance(module.get_submodule(group.output), nn.Linear)
