"""From a network and calibration batches to a smaller network, in memory."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn

from optin_deploy.compensation.batchnorm import reestimate
from optin_deploy.compensation.classifier import refit_classifier
from optin_deploy.compensation.refit import compensate
from optin_deploy.compensation.ridge import STRENGTHS
from optin_deploy.compensation.sparsity import sparsify
from optin_deploy.criteria.scoring import Scoring, score
from optin_deploy.distributed.ranks import ranks_of
from optin_deploy.errors import UserError
from optin_deploy.models.validation.adopt import validate
from optin_deploy.models.validation.inputs import check_batches
from optin_deploy.network import Network
from optin_deploy.nn.batches import Batches
from optin_deploy.nn.flops import count_flops
from optin_deploy.pruning.head_rotation import in_principal_bases
from optin_deploy.pruning.verify_plan import check_cut
from optin_deploy.search.costs import CostModel, Costs, flop_costs
from optin_deploy.search.knapsack import Budget, check_budget, search, search_all
from optin_deploy.structure.describe import describe, prunable
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import sliced
from optin_deploy.structure.unpruned import UNCOUNTED, never_pruned, unpruned
from optin_deploy.tokens.costs import token_costs
from optin_deploy.tokens.damage import Damages, token_damages
from optin_deploy.tokens.find_stack import token_stack
from optin_deploy.tokens.merging import with_merging
from optin_deploy.tokens.schedule import best_schedule, share_schedule
from optin_deploy.tokens.stack import TokenStack
from optin_deploy.utils.display import html_of, render_kept
from optin_deploy.utils.progress import progress_until, track

# Strength of the ridge: chosen on held-out batches, fixed, or None for no compensation.
Ridge = float | Literal["auto"] | None
# Tokens that enter each block: found by the search, all of them, or these numbers.
Tokens = Literal["auto", "off"] | Sequence[int]
# How many modules the message names when nothing is prunable.
_LARGEST = 3


@dataclass(frozen=True)
class Anatomy:
    """The prunable groups of a network and their FLOPs; ``stack`` is the blocks between which tokens may merge."""

    structure: Structure
    costs: Costs
    stack: TokenStack | None = None


@dataclass(frozen=True)
class PruneSettings:
    """How units are removed.

    Attributes:
        flops: part of the network's FLOPs to keep, above 0 and below 1.
        scoring: how units are scored; by the default criterion when None.
        labels: class numbers for each batch, for the criterion "fisher".
        align: neurons are kept in multiples of this number (see `search.knapsack.search`).
        ridge: strength of the ridge, "auto" to choose it on held-out batches. None turns compensation off; batch norms
            get new statistics instead.
        rounds: number of steps to the budget. Each scores the network that the last one left.
        narrow: whether heads may also get narrower; None leaves it to the criterion.
        tokens: how many tokens enter each block; "auto" finds it together with the units.
        tokens_share: part of the removed FLOPs that merging tokens removes, in place of the one that "auto" finds.
        edges: numbers of units worth keeping, by group (see `search.knapsack.search_all`).
    """

    flops: float
    scoring: Scoring | None = None
    labels: Sequence[Tensor] | None = None
    align: int = 64
    ridge: Ridge = "auto"
    rounds: int = 1
    narrow: bool | None = None
    tokens: Tokens = "off"
    tokens_share: float | None = None
    edges: Mapping[str, Sequence[int]] | None = None

    def check(self) -> None:
        """Raise UserError for values out of their range."""
        check_share(self.flops)
        if self.rounds < 1:
            raise UserError(f"rounds={self.rounds}: at least 1 is needed")
        if self.rounds > 1 and self.tokens != "off":
            raise UserError(f"rounds={self.rounds}: tokens merge in one round")


class PruneOptions(TypedDict, total=False):
    """Options of `prune` for scoring and search.

    Attributes:
        scoring: the criterion and its settings; `Scoring()` by default.
        labels: class numbers ``(samples,)`` for each batch, for the criterion "fisher".
        align: neurons are kept in multiples of this number, finer in narrow layers; 64 by default.
        rounds: number of steps to the budget, each scored again; 1 by default.
        narrow: whether heads may also get narrower; by default the criterion decides.
        tokens: how many tokens enter each block, "auto" to search for it together with the units, "off" by default.
        tokens_share: share of the removed FLOPs that merging tokens removes; searched by default.
    """

    scoring: Scoring | None
    labels: Sequence[Tensor] | None
    align: int
    rounds: int
    narrow: bool | None
    tokens: Tokens
    tokens_share: float | None


@dataclass(frozen=True)
class Pruned:
    """A smaller network, and how it was made.

    ``plan`` counts units of the network that was pruned. ``scores`` is empty where the plan was given.
    """

    network: Network
    plan: Plan
    scores: Mapping[str, Tensor]
    anatomy: Anatomy

    def __repr__(self) -> str:
        share = count_flops(self.network.module, self.network.inputs) / self.anatomy.costs.total
        parameters = sum(p.numel() for p in self.network.module.parameters())
        return f"<Pruned {self.network.source.name}: {share:.3f} of its FLOPs, {parameters:,} parameters>"

    def _repr_html_(self) -> str:
        kept = {group.name: len(self.plan.units(group)) for group in self._groups}
        return html_of(render_kept(repr(self)[1:-1], [(g.name, g.kind, g.units, kept[g.name]) for g in self._groups]))

    @property
    def _groups(self) -> tuple[Group, ...]:
        return self.anatomy.structure.groups


def examine(network: Network, *, narrow: bool = True, tokens: bool = False) -> Anatomy:
    """Find the prunable groups and count their FLOPs.

    Args:
        narrow: whether heads may also get narrower.
        tokens: whether tokens are to merge.

    Raises:
        UserError: nothing is prunable, or tokens cannot merge.
    """
    structure = describe(network.module, network.inputs)
    if not narrow:
        structure = structure.without_widths()
    if not structure.groups:
        raise UserError(_nothing_prunable(network, structure))
    stack = token_stack(network.module, network.inputs, structure, network.token_mask) if tokens else None
    return Anatomy(structure, flop_costs(network.module, structure, network.inputs), stack)


def validate_on(network: Network, batches: Batches) -> Network:
    """Return the network as `validate` does; UserError if it cannot be pruned, or not on ``batches``."""
    network = validate(network)
    check_batches(network.module, network.inputs, batches)
    if len(batches):
        with torch.no_grad():
            outputs = network.forward({name: tensor[:1].clone() for name, tensor in batches[0].items()})
        bad = next((name for name, output in outputs.items() if not output.isfinite().all()), None)
        if bad is not None:
            raise UserError(f"the network gives NaN or infinity in {bad} on the first sample of batch 0")
    return network


def examine_as(network: Network, groups: Collection[str], *, tokens: bool = False) -> Anatomy:
    """Return `examine` with narrower heads exactly if ``groups``, names of groups, include widths of heads."""
    anatomy = examine(network, tokens=tokens)
    if any(group.kind == "width" and group.name in groups for group in anatomy.structure.groups):
        return anatomy
    structure = anatomy.structure.without_widths()
    return replace(anatomy, structure=structure, costs=flop_costs(network.module, structure, network.inputs))


def check_share(flops: float) -> None:
    """Raise UserError unless ``flops`` is above 0 and below 1."""
    if not 0 < flops < 1:
        raise UserError(f"flops={flops:g}: give the part of the FLOPs to keep, above 0 and below 1, like 0.5")


def _nothing_prunable(network: Network, structure: Structure) -> str:
    """Return the message that says where the FLOPs are and which modules could be pruned."""
    largest = unpruned(network.module, structure, network.inputs)[:_LARGEST]
    parts = [f"{left.module} ({100 * left.flops_share:.1f} %: {left.reason})" for left in largest]
    named = {left.module for left in largest}
    uncounted = [(n, m) for n, m in network.module.named_modules() if isinstance(m, UNCOUNTED) and n not in named]
    parts += [f"{name or 'the network'} (not counted: {never_pruned(m)})" for name, m in uncounted[:_LARGEST]]
    return (
        f"nothing prunable found in {network.source.name}; its FLOPs are in {', '.join(parts) or 'no layer'}; "
        f"looked for: {' '.join(prunable())}"
    )


@torch.inference_mode(False)
def prune(
    network: Network, batches: Batches, flops: float, *, ridge: Ridge = "auto", **options: Unpack[PruneOptions]
) -> Pruned:
    """Score, search, slice and compensate in one call.

    Args:
        batches: calibration inputs on the network's device.
        flops: part of the network's FLOPs to keep, above 0 and below 1.
        ridge, options: see `PruneSettings` and `PruneOptions`.

    Raises:
        UserError: nothing is prunable, tokens cannot merge, or the budget is out of range or below the floor.
        GateError: the sliced network does not compute what the masked one does.
    """
    settings = PruneSettings(flops, ridge=ridge, **options)
    settings.check()
    scoring, tokens = settings.scoring or Scoring(), settings.tokens
    network = validate_on(network, batches)
    narrow = scoring.narrows_heads if settings.narrow is None else settings.narrow
    anatomy = examine(network, narrow=narrow, tokens=tokens != "off")
    check_budget(anatomy.structure, anatomy.costs, flops)
    dense = in_principal_bases(network, anatomy.structure, batches)
    scores = score(dense, anatomy.structure, anatomy.costs, batches, scoring, labels=settings.labels)
    damage = None
    if anatomy.stack is not None and tokens == "auto":
        damage = token_damages(dense, anatomy.structure, anatomy.stack, batches, scoring)
    schedule = token_schedule(dense, anatomy, scores, settings, damage)
    plan, small = remove_in_rounds(dense, anatomy, scores, batches, settings, schedule)
    return Pruned(network.with_module(small), plan, scores, anatomy)


@torch.inference_mode(False)
def prune_to(network: Network, batches: Batches, plan: Plan, ridge: Ridge = "auto") -> Pruned:
    """Slice by ``plan`` and compensate; the result has no scores.

    Raises:
        UserError: the plan does not fit the network.
        GateError: the sliced network does not compute what the masked one does.
    """
    network = validate_on(network, batches)
    anatomy = examine_as(network, plan.kept, tokens=bool(plan.tokens))
    plan.check(anatomy.structure)
    if anatomy.stack is not None:
        anatomy.stack.check(plan.tokens)
    dense = in_principal_bases(network, anatomy.structure, batches)
    small = remove(dense, anatomy.structure, plan, batches, ridge, stack=anatomy.stack)
    return Pruned(network.with_module(small), plan, {}, anatomy)


def token_schedule(
    dense: Network,
    anatomy: Anatomy,
    scores: Mapping[str, Tensor],
    settings: PruneSettings,
    damage: Damages | None = None,
) -> tuple[int, ...]:
    """Return how many tokens enter each block; empty if none merge.

    Args:
        damage: the cost of merging, by `token_damages`; needed if ``settings.tokens`` is "auto".
    """
    stack, structure = anatomy.stack, anatomy.structure
    if settings.tokens == "off" or stack is None:
        return ()
    if settings.tokens != "auto":
        schedule = tuple(int(n) for n in settings.tokens)
        stack.check(schedule)
        return schedule
    assert damage is not None
    costs = token_costs(dense.module, structure, anatomy.costs, stack, dense.inputs)
    if settings.tokens_share is not None:
        return share_schedule(structure, costs, 1 - settings.tokens_share * (1 - settings.flops), damage)
    return best_schedule(structure, scores, costs, settings.flops, settings.align, damage)


def remove_in_rounds(
    dense: Network,
    anatomy: Anatomy,
    scores: Mapping[str, Tensor],
    batches: Batches,
    settings: PruneSettings,
    schedule: tuple[int, ...] = (),
) -> tuple[Plan, nn.Module]:
    """Search, slice and compensate, in as many rounds as ``settings`` say.

    Args:
        schedule: tokens that enter each block, in one round only; empty if all do.

    Returns:
        the plan, in units of the dense network, and the pruned module.
    """
    costs: CostModel = anatomy.costs
    if schedule and anatomy.stack is not None:
        costs = token_costs(dense.module, anatomy.structure, anatomy.costs, anatomy.stack, dense.inputs).at(schedule)
    rounds, structure = settings.rounds, anatomy.structure
    budget = Budget(costs, settings.flops ** (1 / rounds))
    plan = ranks_of(batches).broadcast_object(
        lambda: search_all(structure, scores, [budget], settings.align, settings.edges)
    )
    plan = replace(plan, tokens=schedule)
    with progress_until(1 / rounds):
        small = remove(dense, structure, plan, batches, settings.ridge, anatomy.stack)
    for number in track(range(2, rounds + 1)):
        flops = settings.flops ** (number / rounds)
        step = next_step(dense.with_module(small), anatomy, batches, replace(settings, flops=flops))
        plan, small = remove_more(dense, anatomy, (plan, small), step, batches, settings.ridge)
    return plan, small


def next_step(small: Network, anatomy: Anatomy, batches: Batches, settings: PruneSettings) -> tuple[Structure, Plan]:
    """Score a pruned network again and search what it loses next.

    Args:
        anatomy: of the dense network, of whose FLOPs ``settings.flops`` are to be left.

    Returns:
        the structure of ``small``, and the plan in its units.
    """
    narrow = any(g.kind == "width" for g in anatomy.structure.groups)
    rest = examine(small, narrow=narrow)
    structure = rest.structure
    scores = score(small, structure, rest.costs, batches, settings.scoring, labels=settings.labels)
    flops = settings.flops * anatomy.costs.total / rest.costs.total
    return structure, ranks_of(batches).broadcast_object(
        lambda: search(structure, scores, rest.costs, flops, settings.align)
    )


def remove(
    dense: Network,
    structure: Structure,
    plan: Plan,
    batches: Batches,
    ridge: Ridge,
    stack: TokenStack | None = None,
) -> nn.Module:
    """Slice by ``plan``, compensate, and merge tokens if the plan says so.

    Merged tokens have no counterpart in the dense network, so linear layers are refitted before tokens merge. Class
    logits have one: the classifier is refitted after.

    Args:
        ridge: None re-estimates batch norms instead of compensating.

    Raises:
        GateError: the sliced network does not compute what the masked one does. Not checked without ``batches``.
    """
    small = sliced(dense.module, structure, plan)
    if batches:
        check_cut(dense, small, structure, plan, batches)
    _compensate(dense, small, structure, plan, batches, ridge)
    if plan.tokens and stack is not None:
        with_merging(small, structure, stack, plan)
    _refit_classifier(dense, small, batches, ridge)
    return small


def remove_more(
    dense: Network,
    anatomy: Anatomy,
    before: tuple[Plan, nn.Module],
    step: tuple[Structure, Plan],
    batches: Batches,
    ridge: Ridge,
) -> tuple[Plan, nn.Module]:
    """Slice the module that the plan ``before`` left by a `next_step`, and compensate towards the dense network.

    Returns:
        the plan of both steps together, in units of the dense network, and the module.

    Raises:
        GateError: the sliced network does not compute what the masked one does.
    """
    plan, small = before
    together = step[1].after(plan)
    smaller = sliced(small, *step)
    check_cut(dense.with_module(small), smaller, *step, batches)
    _compensate(dense, smaller, anatomy.structure, together, batches, ridge)
    _refit_classifier(dense, smaller, batches, ridge)
    return together, smaller


def make_sparse(
    dense: Network,
    small: nn.Module,
    structure: Structure,
    plan: Plan,
    batches: Batches,
    ridge: Ridge,
) -> None:
    """Set half of the weights of ``small`` to zero in the 2:4 pattern, in place, and refit the others.

    Args:
        small: the dense network sliced by ``plan``.
        ridge: None keeps the values of the remaining weights.
    """
    strengths = STRENGTHS if ridge == "auto" else () if ridge is None else (ridge,)
    sparsify(dense, small, structure, plan, batches, strengths)
    # The classifier stays dense.
    _refit_classifier(dense, small, batches, ridge)


def _compensate(
    dense: Network,
    small: nn.Module,
    structure: Structure,
    plan: Plan,
    batches: Batches,
    ridge: Ridge,
) -> None:
    """Refit all linear layers but the classifier, see `_refit_classifier`."""
    if ridge is None:
        reestimate(small, batches)
    elif ridge == "auto":
        compensate(dense, small, structure, plan, batches)
    else:
        compensate(dense, small, structure, plan, batches, (ridge,))


def _refit_classifier(dense: Network, small: nn.Module, batches: Batches, ridge: Ridge) -> None:
    if ridge == "auto":
        refit_classifier(dense, small, batches)
    elif ridge is not None:
        refit_classifier(dense, small, batches, (ridge,))
