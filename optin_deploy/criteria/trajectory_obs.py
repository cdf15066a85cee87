"""Trajectory-OBS: the cost of removing a unit when the units kept take over what they can imitate.

Optimal brain surgeon (Hassibi & Stork, 1993) with the trajectory loss as its metric. For a group with activations x
(rows of the projection's design, see ``nn.unfold``) and projection W, let g be the gradient of a probe of the loss
(``criteria.trajectory_loss``) at the projection's output, position by position, and

    M = Σ g gᵀ          metric of the output, summed over positions and probes
    C = Σ |g|² (x − x̄)(x − x̄)ᵀ / Σ |g|²          covariance, positions weighted by how much they matter

Removing the units b and refitting weights and bias of the rest costs tr(M W_b ([C⁻¹]_bb)⁻¹ W_bᵀ), if errors at
different positions are independent. In a map the errors at one sample's pixels are not. Let a_p = (x_p − x̄)ᵀ W_uᵀ g_p
be the contribution of channel u to the probe's derivative at pixel p. The costs of a group of channels are multiplied
by its coherence

    κ = Σ_u Σ_samples (Σ_p a_p)² / Σ_u Σ_samples Σ_p a_p²

which is 1 for independent errors, and the number of pixels for identical errors.

Greedy elimination removes the cheapest units of a group, updates W and C⁻¹, and repeats until none is left. A unit's
score is the running maximum of the costs so far, so one pass ranks all units, and scores compare across groups.

Dimensions of heads (``pruning.head_rotation``) are removed from the last to the first. Their cost is that of the
values, as above, plus that of the attention's logits: the squared derivative of a probe for a mask on one dimension of
all queries, summed over samples.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, fields, replace

import torch
from torch import Tensor, nn

from optin_deploy.criteria import packed_symmetric
from optin_deploy.criteria.trajectory_loss import (
    Batch,
    LossSettings,
    Trajectory,
    chunks,
    differentiable,
    gradients,
    probe_losses,
)
from optin_deploy.distributed.ranks import Ranks, own_indices, ranks_of
from optin_deploy.network import Network
from optin_deploy.nn.batches import PyTree
from optin_deploy.nn.hooks import Hook, forward_hooks
from optin_deploy.nn.unfold import (
    columns_of,
    columns_per_unit,
    design,
    design_rows,
    some_rows,
    valid_rows,
    weight_matrix,
)
from optin_deploy.structure.groups import Group, Structure, channels_last
from optin_deploy.structure.masking import mask_queries
from optin_deploy.utils.progress import track

_Runs = dict[str, list[Tensor]]

# Added to the covariance's diagonal, relative to its mean: units that never differ must not divide by zero.
DAMPING = 0.01
# Share of the remaining units removed at once, and at most a fortieth of all.
_STEP = 0.05
_LARGEST_STEP = 1 / 40
# Neighbouring positions are similar: moments use this many positions in all, and at least this many of each piece.
_ROWS, _LEAST_ROWS = 2**17, 256


@dataclass
class ProbeMoments:
    """Sums over positions, in float64, so that the order of the pieces of data does not matter.

    Attributes:
        second: Σ weight · [x, 1][x, 1]ᵀ, packed by ``packed_symmetric``. It takes most of the memory of scoring.
        metric: Σ g gᵀ.
        queries: for heads that can get narrower: squared derivatives for each dimension, summed over samples.
        whole, apart: for all channels of a map together: squared contributions of a channel to a probe's derivative, by
            sample and by pixel.
    """

    second: Tensor
    metric: Tensor
    queries: Tensor
    whole: Tensor = field(default_factory=lambda: torch.zeros(()))
    apart: Tensor = field(default_factory=lambda: torch.zeros(()))

    def all_reduce(self, ranks: Ranks) -> "ProbeMoments":
        """Return the sums over all processes."""
        return ProbeMoments(**ranks.all_reduce({each.name: getattr(self, each.name) for each in fields(self)}))

    @property
    def coherence(self) -> float:
        """How alike the errors at the pixels of a sample are, see above; 1 where there are no maps."""
        return float(self.whole / self.apart) if float(self.apart) > 0 else 1.0

    def covariance(self, features: int) -> Tensor:
        """Weighted covariance of the activations, ``(features, features)``, float64."""
        second = packed_symmetric.unpack(self.second, features + 1)
        weight = second[-1, -1].clamp_min(1e-300)
        mean = second[:-1, -1] / weight
        return second[:-1, :-1].div_(weight).sub_(torch.outer(mean, mean))


def probe_moments(
    network: Network,
    structure: Structure,
    batches: Sequence[Batch],
    settings: LossSettings,
    *,
    probes: int,
    samples_at_once: int | None = None,
) -> dict[str, ProbeMoments]:
    """Return `ProbeMoments` of every group from backward passes of random probes; widths share those of their heads.

    Args:
        probes: random draws per batch.
        samples_at_once: samples of a batch in one backward pass, which keeps the activations of every layer; None takes
            the whole batch.
    """
    moments: dict[str, ProbeMoments] = {}
    pieces = batches if samples_at_once is None else chunks(batches, samples_at_once)
    rows = max(_LEAST_ROWS, _ROWS // max(1, len(pieces)))
    for index in track(own_indices(pieces)):
        piece_settings = replace(settings, seed=settings.seed + index)
        backward = _Backward.of(network, structure, pieces[index], piece_settings.seed)
        weights = _add_probes(moments, backward, piece_settings, probes)
        _add_second_moments(moments, backward, weights, rows)
    return {name: sums.all_reduce(ranks_of(batches)) for name, sums in moments.items()}


@dataclass(frozen=True)
class _Backward:
    """A run of a piece of a batch whose graph is kept.

    Attributes:
        groups: all groups except widths.
        inputs, taps: see `_tap_projections`.
        masks: of the dimensions of queries, by the heads' name.
        blocks, outputs: of the run.
    """

    trajectory: Trajectory
    groups: Sequence[Group]
    inputs: _Runs
    taps: _Runs
    masks: Mapping[str | None, Tensor]
    blocks: Mapping[str, PyTree]
    outputs: Mapping[str, Tensor]

    @staticmethod
    def of(network: Network, structure: Structure, batch: Batch, seed: int) -> "_Backward":
        """Run the network with taps on the projections and masks on the queries of heads with widths."""
        trajectory = Trajectory(network, structure, batch, seed)
        groups = [g for g in structure.groups if g.kind != "width"]
        widths = [g for g in structure.groups if g.kind == "width"]
        size, device = trajectory.size, next(network.module.parameters()).device
        with differentiable(network), _tap_projections(network.module, groups) as (inputs, taps), ExitStack() as stack:
            masks = {g.parent: torch.ones(size, g.units, device=device, requires_grad=True) for g in widths}
            for group in widths:
                stack.enter_context(mask_queries(network.module, group, masks[group.parent]))
            blocks, outputs = trajectory.run()
        return _Backward(trajectory, groups, inputs, taps, masks, blocks, outputs)

    @property
    def module(self) -> nn.Module:
        return self.trajectory.network.module


def _add_probes(
    moments: dict[str, ProbeMoments], backward: _Backward, settings: LossSettings, probes: int
) -> dict[str, Tensor | float]:
    """Add the moments of gradients; return each group's mean |g|² of every position."""
    trajectory, groups, masks = backward.trajectory, backward.groups, backward.masks
    weights: dict[str, Tensor | float] = dict.fromkeys(backward.taps, 0.0)
    leaves = [tap for g in groups for tap in backward.taps[g.name]]
    with differentiable(trajectory.network):
        generator = torch.Generator(next(backward.module.parameters()).device).manual_seed(settings.seed)
        grams = trajectory.grams(backward.blocks) if settings.manifold else {}
        for probe in track(range(probes)):
            loss = probe_losses(trajectory, grams, backward.outputs, settings, generator)
            derivatives = gradients(loss, [*leaves, *masks.values()], keep=probe + 1 < probes)
            for name, gradient in zip(masks, derivatives[len(leaves) :], strict=True):
                _add(moments, str(name), "queries", gradient.double().square().sum(0) / probes)
            remaining = iter(derivatives)
            for group in groups:
                runs = [channels_last(next(remaining), group.axis) for _ in backward.taps[group.name]]
                g = torch.cat([valid_rows(run, trajectory.valid) for run in runs])
                weights[group.name] = weights[group.name] + g.square().sum(1) / probes
                _add(moments, group.name, "metric", g.T @ g / probes)
                if group.kind == "channel":
                    whole, apart = _effects(backward.module, group, torch.cat(backward.inputs[group.name]), g)
                    _add(moments, group.name, "whole", whole)
                    _add(moments, group.name, "apart", apart)
    return weights


@torch.no_grad()
def _add_second_moments(
    moments: dict[str, ProbeMoments], backward: _Backward, weights: Mapping[str, Tensor | float], most_rows: int
) -> None:
    """Add the weighted second moments of activations, of some rows."""
    for group in backward.groups:
        weight = torch.as_tensor(weights[group.name])
        rows = some_rows(len(weight), most_rows)
        runs, valid = backward.inputs[group.name], backward.trajectory.valid
        valid = valid if valid is None else valid.repeat(len(runs), 1)
        x = design_rows(backward.module.get_submodule(group.output), torch.cat(runs), rows, valid)
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        _add_second(moments, group.name, x, weight[rows])


@contextmanager
def _tap_projections(module: nn.Module, groups: Sequence[Group]) -> Iterator[tuple[_Runs, _Runs]]:
    """Collect, for each group and run of its projection, the input and a zero added to the output.

    The gradient of the zero is that of the output.
    """
    given: _Runs = {g.name: [] for g in groups}
    taps: _Runs = {g.name: [] for g in groups}

    def tap(name: str) -> Hook:
        def hook(_: str, __: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            given[name].append(args[0].detach())
            # Not the output itself: networks change theirs in place.
            taps[name].append(torch.zeros_like(output, requires_grad=True))
            return output + taps[name][-1]

        return hook

    with ExitStack() as stack:
        for group in groups:
            stack.enter_context(forward_hooks(module, [group.output], after=tap(group.name)))
        yield given, taps


@torch.no_grad()
def _effects(module: nn.Module, group: Group, given: Tensor, gradient: Tensor) -> tuple[Tensor, Tensor]:
    """`ProbeMoments.whole` and ``apart`` of one probe; ``gradient`` has a row for every pixel."""
    projection = module.get_submodule(group.output)
    x = design(projection, given).flatten(0, 1)
    effects = (x - x.mean(0)) * (gradient @ weight_matrix(projection))
    channels = effects.reshape(len(given), -1, group.units, effects.shape[1] // group.units).sum(3)
    return channels.sum(1).double().square().sum(), channels.double().square().sum()


def _add(moments: dict[str, ProbeMoments], name: str, field: str, value: Tensor) -> None:
    if name not in moments:
        nothing = value.new_zeros((), dtype=torch.float64)
        moments[name] = ProbeMoments(nothing, nothing, nothing, nothing, nothing)
    sum_so_far: Tensor = getattr(moments[name], field)
    setattr(moments[name], field, sum_so_far.add_(value) if sum_so_far.dim() else sum_so_far + value.double())


def _add_second(moments: dict[str, ProbeMoments], name: str, x: Tensor, weights: Tensor) -> None:
    if not moments[name].second.dim():
        moments[name].second = packed_symmetric.zeros(x.shape[1], x.device)
    packed_symmetric.add_gram(moments[name].second, x, weights)


def obs_scores(
    module: nn.Module,
    structure: Structure,
    moments: Mapping[str, ProbeMoments],
) -> dict[str, Tensor]:
    """Scores from `probe_moments`: group name -> float64 ``(units,)`` on the CPU."""
    scores = {}
    for group in track(structure.groups):
        projection = module.get_submodule(group.output)
        weight = weight_matrix(projection).detach().double()
        found = moments[(group.parent if group.kind == "width" else None) or group.name]
        covariance, metric = found.covariance(weight.shape[1]), found.metric
        if group.kind == "width":
            order = torch.arange(group.units).flip(0)
            costs = _width_costs(weight, covariance, metric, group.units) + found.queries.cpu().flip(0)
        else:
            order, costs = _eliminate_group(
                weight, covariance, metric, group, columns_per_unit(projection, group.width)
            )
            costs = found.coherence * costs
        # Those that left later score higher also where the running maximum stands still.
        ranked = costs.cummax(0).values.clamp_min(1e-300) * (1 + 1e-9 * torch.arange(len(costs), dtype=costs.dtype))
        score = torch.zeros(group.units, dtype=torch.float64)
        if group.together is None:
            score[order] = ranked
        else:
            # Units that leave together share what that costs.
            score[torch.tensor(group.tuples)[order]] = ranked[:, None] / group.step
        scores[group.name] = score
    return scores


def _eliminate_group(
    weight: Tensor, covariance: Tensor, metric: Tensor, group: Group, width: int
) -> tuple[Tensor, Tensor]:
    """`eliminate` of a group with ``width`` columns a unit; units that leave together count as one."""
    if group.together is None:
        return eliminate(weight, covariance, metric, width)
    columns = columns_of(torch.tensor(group.tuples, device=weight.device).reshape(-1), width)
    return eliminate(weight[:, columns], covariance[columns][:, columns], metric, width * group.step)


def _width_costs(weight: Tensor, covariance: Tensor, metric: Tensor, units: int) -> Tensor:
    """What the values lose with each dimension of all heads, from the last dimension to the first."""
    heads = weight.shape[1] // units
    # Dimension by dimension, the columns of all heads together.
    columns = torch.arange(heads * units, device=weight.device).reshape(heads, units).T.reshape(-1)
    order = torch.arange(units, device=weight.device).flip(0)
    ordered = covariance[columns][:, columns]
    return eliminate(weight[:, columns], ordered, metric, heads, order=order)[1]


@torch.no_grad()
def eliminate(
    weight: Tensor, covariance: Tensor, metric: Tensor, width: int, step: float = _STEP, order: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Greedy elimination of all units: ``(order, costs)``, both ``(units,)`` on the CPU.

    Args:
        weight: ``(outputs, units · width)``.
        covariance: ``(units · width, units · width)`` of the activations.
        metric: ``(outputs, outputs)``.
        width: columns per unit.
        step: part of the units left that is removed before costs are computed anew; 0 removes one at a time.
        order: in which units leave, one at a time, whatever they cost.
    """
    units = weight.shape[1] // width
    weight, alive = weight.clone(), torch.arange(units, device=weight.device)
    inverse = _damped_inverse(covariance)
    left_first, costs = [], []
    while len(alive):
        if order is None:
            each = unit_costs(weight, inverse, metric, width)
            out = each.argsort()[: max(1, min(int(step * len(alive)), int(_LARGEST_STEP * units)))]
        else:
            each = weight.new_ones(len(alive))
            out = (alive == order[units - len(alive)]).nonzero()[:, 0]
        columns = columns_of(out, width)
        removed = weight[:, columns]
        block = torch.linalg.inv(inverse[columns][:, columns])
        correction = block @ inverse[columns]
        together = torch.sum(block * (removed.T @ metric @ removed))
        # What removing them together costs is shared out as they cost one by one.
        share = each[out] / each[out].sum().clamp_min(1e-300)
        left_first.append(alive[out])
        costs.append((share * together).clamp_min(0.0))
        kept = torch.ones(len(alive), dtype=torch.bool, device=alive.device)
        kept[out] = False
        left = columns_of(kept.nonzero()[:, 0], width)
        weight = weight[:, left] - removed @ correction[:, left]
        inverse = inverse[left][:, left] - inverse[left][:, columns] @ correction[:, left]
        alive = alive[kept]
    return torch.cat(left_first).cpu(), torch.cat(costs).cpu()


def _damped_inverse(covariance: Tensor) -> Tensor:
    """Inverse of the covariance with `DAMPING`, or more where rounding has left it indefinite."""
    damping = DAMPING * covariance.diagonal().abs().mean().clamp_min(1e-290)
    while True:
        # In place, and let go of at once: no other matrices are as large.
        damped = covariance.clone()
        damped.diagonal().add_(damping)
        root, failed = torch.linalg.cholesky_ex(damped)
        del damped
        if not failed or not bool(damping.isfinite()):
            return torch.cholesky_inverse(root)
        damping = 10 * damping


def unit_costs(weight: Tensor, inverse: Tensor, metric: Tensor, width: int) -> Tensor:
    """tr(M W_u ([C⁻¹]_uu)⁻¹ W_uᵀ) of every unit u alone: ``(units,)``; ``inverse`` is C⁻¹."""
    if width == 1:
        return torch.einsum("on,on->n", weight, metric @ weight) / inverse.diagonal()
    units = weight.shape[1] // width
    own = inverse.reshape(units, width, units, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    columns = weight.reshape(-1, units, width).permute(1, 0, 2)
    quadratic = columns.transpose(1, 2) @ (metric @ columns)
    return torch.linalg.solve(own, quadratic).diagonal(dim1=1, dim2=2).sum(1)
