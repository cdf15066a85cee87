"""2:4 sparsity: of every four consecutive weights along the input two are zero, as sparse tensor cores want it.

Let H be the second moment of a layer's inputs, damped by the ridge, and w* a row of the ridge solution that
compensation would write. A row w loses (w − w*)ᵀ H (w − w*), in any metric of the outputs. Optimal brain surgeon
chooses the two weights of every four that are removed. Columns are decided from left to right. With R the undecided
ones, removing the pair p and letting the rest of R take over costs

    w_pᵀ ([H_R⁻¹]_pp)⁻¹ w_p,        and the rest moves by  − [H_R⁻¹]_Rp ([H_R⁻¹]_pp)⁻¹ w_p

and all six pairs of a group are compared. With U the upper triangular matrix for which H⁻¹ = Uᵀ U, that of H_R⁻¹ is the
part of U in R, so one factorisation serves all rows and columns (Frantar & Alistarh, Optimal Brain Compression, 2022,
and SparseGPT, 2023). When all pairs are chosen, every row is solved anew for the weights that stay.
"""

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Literal

import torch
from torch import Tensor, nn

from optin_deploy.compensation.classifier import logits_layer
from optin_deploy.compensation.pair import CompensationPair
from optin_deploy.compensation.refit import refit_layers
from optin_deploy.compensation.results import Sparsity
from optin_deploy.compensation.ridge import Moments, add_ridge, fit, solve
from optin_deploy.nn.flops import FlopCounts
from optin_deploy.nn.names import is_inside
from optin_deploy.structure.groups import Structure

GROUP, KEPT = 4, 2
PATTERN: Literal["2:4"] = "2:4"
_PAIRS = tuple(combinations(range(GROUP), GROUP - KEPT))
# Numbers in the systems of equations that are solved at once.
_MOST_NUMBERS = 2**25
# Damping where no ridge is asked for, relative to the mean squared feature.
_DAMPING = 0.01

Batch = Mapping[str, Tensor]


@torch.no_grad()
def sparsify(pair: CompensationPair, batches: Sequence[Batch], strengths: Sequence[float]) -> None:
    """Set the pattern in the layers of the pruned network's blocks, in place, and refit them.

    Layers are taken in order, each on its inputs after the sparse layers before it. A layer stays dense if its input
    features or channels are no multiple of four, if it shares its weights, runs more than once, or returns the class
    logits. Dense layers are refitted as by `refit.compensate`.

    Args:
        strengths: of the ridge, relative to the mean squared activation. If there are several, every layer gets the one
            that fits best on held-out batches. If there are none, the remaining weights keep their values.
    """
    logits = logits_layer(pair.dense, pair.pruned, batches[0])
    sparse = can_be_sparse(pair.pruned, pair.structure)
    layers = {name: layer for name, layer in sparse.items() if name != logits}
    orders = {name: _in_groups(layer) for name, layer in layers.items()}

    def refit(module: str | None, training: Moments, held_out: Moments | None, old: Tensor, *, bias: bool) -> Tensor:
        if module is None or module not in orders:
            return fit(training, held_out, old, strengths, bias=bias) if strengths else old
        order, solution = orders[module], torch.empty_like(old)
        held_out = held_out and _reorder(held_out, order)
        solution[order] = sparse_fit(_reorder(training, order), held_out, old[order], strengths, bias=bias)
        return solution

    several = len(strengths) > 1
    refit_layers(pair, batches, refit, hold_out=several, everywhere=True)


def can_be_sparse(module: nn.Module, structure: Structure) -> dict[str, nn.Linear | nn.Conv2d]:
    """Return the layers in the blocks whose input features or channels are a multiple of four."""
    found = _maps_in_blocks(module, structure)
    return {name: layer for name, layer in found.items() if _grouped_weights(layer).shape[-1] % GROUP == 0}


def measure_sparsity(module: nn.Module, structure: Structure, inputs: Mapping[str, Tensor]) -> Sparsity:
    """Return the `Sparsity` of the weights of ``module``."""
    maps = _maps_in_blocks(module, structure)
    sparse = {name: layer.weight for name, layer in maps.items() if has_pattern(_grouped_weights(layer))}
    zeros = sum(int((weight == 0).sum()) for weight in sparse.values())
    counts = FlopCounts(module, inputs)
    total, own = counts.total, [counts.of(name) for name in sparse]
    return Sparsity(
        pattern=PATTERN,
        maps=len(sparse),
        zeros=zeros / max(1, sum(weight.numel() for weight in sparse.values())),
        flops_share=sum(own) / total,
        left_dense=tuple(name for name in maps if name not in sparse),
    )


def sparse_fit(
    training: Moments, held_out: Moments | None, old: Tensor, strengths: Sequence[float], *, bias: bool
) -> Tensor:
    """Return weights ``(features + 1, outputs)`` with the pattern along the features; the last row is the bias.

    Arguments are those of `ridge.fit`. Without ``strengths``, the remaining weights keep their values in ``old``.
    """
    features = len(old) - 1
    free = slice(None) if bias else slice(features)

    def left(rows: Tensor) -> Tensor:
        return torch.cat([rows.T, old[len(rows.T) :]])

    def taken_over(strength: float) -> Tensor:
        optimum, hessian = solve(training, old, strength, bias=bias), add_ridge(training, strength)[free, free]
        return left(choose_mask(optimum[free].T, hessian, features)[1])

    if not strengths:
        mask, _ = choose_mask(old[free].T, add_ridge(training, _DAMPING)[free, free], features)
        return left(old[free].T * mask)
    strength = strengths[len(strengths) // 2]
    if held_out is not None:
        errors = [held_out.error(taken_over(strength)) for strength in strengths]
        strength = strengths[min(range(len(errors)), key=errors.__getitem__)]
    moments = training if held_out is None else training + held_out
    optimum, hessian = solve(moments, old, strength, bias=bias), add_ridge(moments, strength)[free, free]
    mask, _ = choose_mask(optimum[free].T, hessian, features)
    return left(solve_masked(hessian, optimum[free].T @ hessian, mask))


def has_pattern(weights: Tensor) -> bool:
    """Return whether at least two of every four consecutive weights along the last axis are zero."""
    if weights.shape[-1] % GROUP:
        return False
    return bool(((weights.unflatten(-1, (-1, GROUP)) != 0).sum(-1) <= KEPT).all())


def choose_mask(weights: Tensor, hessian: Tensor, columns: int) -> tuple[Tensor, Tensor]:
    """Choose the weights to keep, and refit them for the removed ones.

    Args:
        weights: ``(rows, n)``, the minimum of the quadratic loss.
        hessian: of the loss in each row, ``(n, n)``, positive definite.
        columns: number of columns to prune, a multiple of four; later columns stay.

    Returns:
        a bool mask ``(rows, n)`` and weights ``(rows, n)``.
    """
    # H = R Rᵀ with R upper triangular, so H⁻¹ = Uᵀ U with U = R⁻¹.
    upper = torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
    identity = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
    factor = torch.linalg.solve_triangular(upper, identity, upper=True)
    pairs = torch.tensor(_PAIRS, device=weights.device)
    weights, mask = weights.clone(), torch.ones_like(weights, dtype=torch.bool)
    for first in range(0, columns, GROUP):
        group = slice(first, first + GROUP)
        inverse = factor[group, group].T @ factor[group, first:]
        blocks = inverse[pairs[:, :, None], pairs[:, None, :]]
        given = weights[:, group][:, pairs]
        taken = torch.linalg.solve(blocks, given[..., None]).squeeze(-1)
        best = (given * taken).sum(-1).argmin(1)
        removed = torch.zeros_like(weights[:, group])
        removed.scatter_(1, pairs[best], taken[torch.arange(len(best), device=best.device), best])
        weights[:, first:] -= removed @ inverse
        mask[:, group].scatter_(1, pairs[best], False)
    return mask, weights * mask


def solve_masked(hessian: Tensor, cross: Tensor, mask: Tensor) -> Tensor:
    """Return the minimum of the quadratic loss in every row over the kept weights, with the others zero.

    Args:
        hessian: ``(n, n)``, positive definite.
        cross: ``(rows, n)``; without a mask the minimum is ``cross @ hessian⁻¹``.
        mask: bool ``(rows, n)``, with equally many True in every row.
    """
    places = mask.nonzero()[:, 1].reshape(len(mask), -1)
    solution = torch.zeros_like(cross)
    at_once = max(1, _MOST_NUMBERS // max(1, places.shape[1] ** 2))
    for some in torch.arange(len(mask), device=mask.device).split(at_once):
        where = places[some]
        systems = hessian[where[:, :, None], where[:, None, :]]
        asked = cross[some].gather(1, where)[..., None]
        found = torch.cholesky_solve(asked, torch.linalg.cholesky(systems)).squeeze(-1)
        solution[some] = solution[some].scatter(1, where, found)
    return solution


def _maps_in_blocks(module: nn.Module, structure: Structure) -> dict[str, nn.Linear | nn.Conv2d]:
    return {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d) and any(is_inside(name, block) for block in structure.blocks)
    }


def _grouped_weights(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """Return the weights with the input features or channels last; groups of four are along them."""
    return layer.weight.movedim(1, -1)


def _in_groups(layer: nn.Linear | nn.Conv2d) -> Tensor:
    """Return an order of the rows of a solution, the bias last, in which groups of four are consecutive.

    The rows of `nn.unfold.design` are ordered by channel, kernel row and kernel column.
    """
    rows = layer.weight[0].numel()
    inside = torch.arange(rows, device=layer.weight.device).reshape(layer.weight.shape[1], -1).T.reshape(-1)
    return torch.cat([inside, inside.new_tensor([rows])])


def _reorder(moments: Moments, order: Tensor) -> Moments:
    return Moments(moments.gram[order][:, order], moments.cross[order], moments.targets)
