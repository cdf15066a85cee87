"""Closed-form repair: refit each output projection so that the pruned network follows the dense residual stream.

Sequential ridge regression, no labels and no gradients. With X the activations that enter the sliced projection in the
already pruned network, r̃ the residual stream there, and s the dense network's stream after the sublayer, the weights
and bias that give X Wᵀ + b ≈ (s − r̃) / γ in the least-squares sense are folded into the projection (γ: LayerScale).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.network import Network
from optin_deploy.plan import Plan
from optin_deploy.replay import recorded_inputs, recorded_outputs, resumed, run_until
from optin_deploy.slicing import output_bias
from optin_deploy.structure.groups import Group, Structure

Batch = Mapping[str, Tensor]


@dataclass
class _Moments:
    """Second moments of ``[X, 1]`` and of ``[X, 1]`` with the targets, in float64."""

    gram: Tensor | None = None
    cross: Tensor | None = None

    def add(self, x: Tensor, target: Tensor) -> None:
        """Add rows: ``x`` of shape ``(rows, features)``, ``target`` of shape ``(rows, outputs)``."""
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        gram, cross = (x.T @ x).double(), (x.T @ target).double()
        self.gram = gram if self.gram is None else self.gram + gram
        self.cross = cross if self.cross is None else self.cross + cross


@torch.no_grad()
def compensate(
    network: Network,
    pruned: nn.Module,
    structure: Structure,
    plan: Plan,
    batches: Sequence[Batch],
    ridge: float,
    advance: Callable[[int], None],
) -> None:
    """Refit the output projections of every pruned group of ``pruned`` (a sliced copy of ``network``), in place.

    Args:
        structure: of the dense network.
        ridge: penalty on the change of the weights, relative to the mean squared activation.
        advance: called with 1 after every block.
    """
    dense_done: list[dict[str, Any]] = [{} for _ in batches]
    pruned_done: list[dict[str, Any]] = [{} for _ in batches]
    for layer, block in enumerate(structure.blocks):
        groups = [g for g in structure.groups if g.layer == layer and _is_pruned(g, plan)]
        targets = [
            _dense_streams(network.module, batch, block, groups, done)
            for batch, done in zip(batches, dense_done, strict=True)
        ]
        for group in groups:
            moments = _Moments()
            for batch, done, dense in zip(batches, pruned_done, targets, strict=True):
                x, stream = _pruned_inputs(pruned, batch, block, group, plan, done)
                target = dense[group.name] if stream is None else dense[group.name] - stream
                if group.scale:
                    target = target / pruned.get_parameter(group.scale)
                if x is None:
                    x = target[..., :0]
                valid = network.valid_tokens(batch)
                moments.add(_rows(x, valid), _rows(target, valid))
            _refit(pruned, group, plan, moments, ridge)
        for batch, done in zip(batches, pruned_done, strict=True):
            with resumed(pruned, done):
                _remember(done, block, run_until(pruned, batch, block))
        advance(1)


def _is_pruned(group: Group, plan: Plan) -> bool:
    return group.name in plan.kept and len(plan.kept[group.name]) < group.units


def _dense_streams(
    module: nn.Module, batch: Batch, block: str, groups: Sequence[Group], done: dict[str, Any]
) -> dict[str, Tensor]:
    """Run the next dense block; for each group the stream after its sublayer, or its output where no stream is known.

    In the units of the stream: the output is multiplied by LayerScale where the stream is known.
    """
    residuals = tuple(g.residual for g in groups if g.residual)
    with (
        resumed(module, done),
        recorded_inputs(module, residuals) as streams,
        recorded_outputs(module, tuple(g.output for g in groups)) as outputs,
    ):
        _remember(done, block, run_until(module, batch, block))
    after = {}
    for group in groups:
        update = outputs[group.output]
        if group.scale:
            update = update * module.get_parameter(group.scale)
        after[group.name] = streams[group.residual] + update if group.residual else update
    return after


def _pruned_inputs(
    module: nn.Module, batch: Batch, block: str, group: Group, plan: Plan, done: dict[str, Any]
) -> tuple[Tensor | None, Tensor | None]:
    """Activations behind the units kept, ``(batch, tokens, features)``, if any are kept, and the residual stream if it
    is known."""
    vanished = not plan.kept[group.name]
    wanted = (*((group.residual,) if group.residual else ()), *(() if vanished else (group.output,)))
    with resumed(module, done), recorded_inputs(module, wanted) as seen:
        run_until(module, batch, block)
    return seen.get(group.output), seen.get(group.residual or "")


def _remember(done: dict[str, Any], block: str, output: Any) -> None:
    """Keep ``output``; of earlier blocks, which only have to be skipped, no more than the shapes."""
    for name, earlier in done.items():
        done[name] = _hollow(earlier)
    done[block] = output


def _hollow(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output.new_zeros(()).expand(output.shape)
    return tuple(_hollow(o) for o in output) if isinstance(output, tuple) else output


def _rows(x: Tensor, valid: Tensor | None) -> Tensor:
    rows = x.flatten(0, -2)
    return rows[valid.flatten()] if valid is not None and valid.numel() == len(rows) else rows


def _refit(module: nn.Module, group: Group, plan: Plan, moments: _Moments, ridge: float) -> None:
    """Solve for the change of weights and bias; the ridge pulls the change, not the weights, towards zero."""
    assert moments.gram is not None and moments.cross is not None
    gram, cross = moments.gram, moments.cross
    bias = output_bias(module, group)
    weight = module.get_parameter(f"{group.output}.weight") if plan.kept[group.name] else None
    features = len(gram) - 1
    old = torch.zeros_like(cross)
    if weight is not None:
        old[:features] = weight.T.double()
    if bias is not None:
        old[features] = bias.double()
    penalty = torch.zeros(features + 1, dtype=gram.dtype, device=gram.device)
    penalty[:features] = ridge * gram.diagonal()[:features].mean() if features else 0.0
    free = slice(None) if bias is not None else slice(features)
    change = torch.linalg.solve((gram + penalty.diag())[free, free], (cross - gram @ old)[free])
    if weight is not None:
        weight.copy_((old[:features] + change[:features]).T)
    if bias is not None:
        bias.copy_(old[features] + change[features])
