"""K-prune (Park, Choi & Kang, "Accurate Retraining-free Pruning for Pretrained Encoder-based Language Models", ICLR
2024, arXiv 2308.03449).

Sublayer by sublayer, from the bottom to the top, on the network as pruned so far:

1. *Knowledge measurement*, of every unit u of this and all later sublayers. Predictive knowledge is, with the KL
   divergence of the logits softened by T = 2 from the dense network's as loss, ½ mean_s (∂ T² KL_s / ∂ mask_u)² over
   samples s. Representational knowledge is the mean over tokens and features of the square of what u adds to its
   sublayer's output. The importance of u is K_pred + λ K_rep per FLOP, λ = 2.5e-4.
2. *Knowledge-preserving mask search*: over all these sublayers together, keep the units of most importance per FLOP
   that fit into what is left of the budget; of that mask only the current sublayer's part is used.
3. *Knowledge-preserving weight tuning*: prune this sublayer and replace the weights of its output projection (not the
   bias) by the least-squares solution that brings the residual stream behind it to the dense network's.

T, λ and T² KL are those of the released code's example. A network without class logits has no predictive term, one
with a single logit has the squared difference in place of the KL. At the first sublayer the network is still the dense
one, where the KL has no gradient; there, as in the paper, only representational knowledge counts.

Where we differ: gradients are per sample, not per mini-batch. Heads are measured whole, so that the paper's extra
factor for them (64, for sums that its code turns into means over the 64 features of a head) is not needed. The
threshold on importance per FLOP is a knapsack here, which it solves up to one unit, so that numbers of neurons can be
aligned.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from optin_deploy.criteria.fisher import sample_gradients
from optin_deploy.network import Network
from optin_deploy.nn.partial_forward import record_inputs
from optin_deploy.nn.unfold import valid_rows
from optin_deploy.pruning.space import PruningSpace
from optin_deploy.search.costs import Costs
from optin_deploy.search.knapsack import check_budget, search
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

from .shared import Batch, check_met, sublayer_moments, transformer_part

TEMPERATURE = 2.0
REPRESENTATION = 2.5e-4


def prune(
    network: Network,
    space: PruningSpace,
    batches: Sequence[Batch],
    flops: float,
    *,
    align: int = 64,
    seed: int = 0,
    representation: float = REPRESENTATION,
) -> tuple[Plan, nn.Module]:
    """Measure, search, prune and tune sublayer by sublayer; see the package.

    Args:
        representation: λ, the weight of representational knowledge.

    Raises:
        UserError: the budget cannot be reached.
    """
    linear = transformer_part(network.module, space)
    check_budget(linear.structure, linear.costs, flops)
    groups = linear.structure.groups
    dense = dense_logits(network, batches)
    module, kept = network.module, dict[str, tuple[int, ...]]()
    for position, group in enumerate(groups):
        rest = replace(linear.structure, groups=groups[position:])
        scores = importance(network, module, rest, batches, dense, representation)
        kept[group.name] = searched(rest, scores, linear.costs, Plan(dict(kept)), flops, align).kept[group.name]
        module = slice_network(module, rest, Plan({group.name: kept[group.name]}))
        if kept[group.name] and any(len(kept[g.name]) < g.units for g in groups[: position + 1]):
            tune(network, module, linear.structure, group, batches)
    plan = Plan(kept)
    check_met(plan, space.costs, flops, "K-prune")
    return plan, module


@torch.no_grad()
def dense_logits(network: Network, batches: Sequence[Batch]) -> list[Tensor | None]:
    """The dense network's logits for each batch, None where it has none."""
    return [network.forward(batch)[network.logits] if network.logits else None for batch in batches]


def importance(
    network: Network,
    module: nn.Module,
    structure: Structure,
    batches: Sequence[Batch],
    dense: Sequence[Tensor | None],
    representation: float,
) -> dict[str, Tensor]:
    """K_pred + λ K_rep of every unit of ``structure`` in ``module``: group name -> float64 ``(units,)`` on the CPU.

    Args:
        module: the network as pruned so far, in which the groups of ``structure`` are still whole.
        dense: from `dense_logits`.
        representation: λ.
    """
    scores = {name: representation * k for name, k in representational(network, module, structure, batches).items()}
    samples = sum(len(next(iter(batch.values()))) for batch in batches)
    for batch, logits in zip(batches, dense, strict=True):
        if logits is not None:
            gradients = sample_gradients(network, structure, batch, partial(divergence, logits), module)
            for name, gradient in gradients.items():
                scores[name] += 0.5 * gradient.square().sum(0) / samples
    return scores


def divergence(dense: Tensor, logits: Tensor) -> Tensor:
    """T² KL of the softened logits from the ``dense`` ones, classes on the last axis, or the squared difference of
    single logits; summed over samples."""
    if logits.shape[-1] == 1:
        return (logits - dense).square().sum()
    log_p, log_q = (torch.log_softmax(x / TEMPERATURE, dim=-1) for x in (dense, logits))
    return TEMPERATURE**2 * (log_p.exp() * (log_p - log_q)).sum()


@torch.no_grad()
def representational(
    network: Network, module: nn.Module, structure: Structure, batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """Mean square, over valid tokens and outputs, of what each unit adds to its sublayer's output (with LayerScale):
    group name -> float64 ``(units,)`` on the CPU."""
    # For unit u with activations X_u and weights V_u this is tr(X_uᵀX_u V_uᵀV_u), so small matrices are all there is
    # to keep.
    blocks: dict[str, Tensor] = {}
    rows: dict[str, int] = {}
    for batch in batches:
        with record_inputs(module, tuple(g.output for g in structure.groups)) as seen:
            network.forward(batch, module)
        for group in structure.groups:
            x = valid_rows(seen.pop(group.output), network.valid_tokens(batch)).double()
            units = x.reshape(len(x), group.units, group.width).transpose(0, 1)
            blocks[group.name] = blocks.get(group.name, 0.0) + units.transpose(1, 2) @ units
            rows[group.name] = rows.get(group.name, 0) + len(x)
    found = {}
    for group in structure.groups:
        weight = module.get_parameter(f"{group.output}.weight").double()
        if group.stream.scale:
            weight = module.get_parameter(group.stream.scale).double()[:, None] * weight
        units = weight.T.reshape(group.units, group.width, -1)
        energy = (blocks[group.name] * (units @ units.transpose(1, 2))).sum((1, 2))
        found[group.name] = (energy / (rows[group.name] * len(weight))).cpu()
    return found


def searched(rest: Structure, scores: dict[str, Tensor], costs: Costs, decided: Plan, flops: float, align: int) -> Plan:
    """The best plan for the groups of ``rest`` within what the groups of ``decided`` leave of the budget."""
    names = [g.name for g in rest.groups]
    now = replace(
        costs,
        total=costs.of(decided),
        per_unit={name: costs.per_unit[name] for name in names},
        units={name: costs.units[name] for name in names},
    )
    # Where nothing is left of the budget, rounding must not put it below the floor.
    fraction = max(flops * costs.total, now.floor) / now.total * (1 + 1e-12)
    return search(rest, scores, now, fraction, align)


@torch.no_grad()
def tune(network: Network, module: nn.Module, structure: Structure, group: Group, batches: Sequence[Batch]) -> None:
    """Least-squares weights for the output projection of ``group`` in ``module``, in place.

    Of the solutions that are equally good, the smallest. Directions that single precision would not resolve in the
    normal equations, in which the released code solves them, are left out.
    """
    gram, cross, _ = sublayer_moments(network, module, structure, group, batches)
    weight = module.get_parameter(f"{group.output}.weight")
    found = (torch.linalg.pinv(gram, rtol=torch.finfo(torch.float32).eps, hermitian=True) @ cross).T
    if group.stream.scale:
        scale = module.get_parameter(group.stream.scale).double()[:, None]
        # An output that LayerScale turns off can have any weights: it keeps its own.
        found = torch.where(scale == 0, weight.double(), found / scale)
    weight.copy_(found)
