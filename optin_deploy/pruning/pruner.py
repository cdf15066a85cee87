"""The pruning stage: from a network and calibration data to a smaller network, in memory."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Literal

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
from optin_deploy.models.intake import validate
from optin_deploy.models.intake.inputs import check_batches
from optin_deploy.network import Network
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
from optin_deploy.utils.display import html_of, kept_view
from optin_deploy.utils.progress import part, track

Batches = Sequence[Mapping[str, Tensor]]
# Strength of the ridge: chosen on held-out batches, fixed, or None for no repair.
Ridge = float | Literal["auto"] | None
# Tokens that enter each block: as the search finds it, all of them, or so many.
Tokens = Literal["auto", "off"] | Sequence[int]
# Modules that are named where nothing is prunable.
_LARGEST = 3


@dataclass(frozen=True)
class Anatomy:
    """What can be removed from a network and what it costs, in FLOPs; the blocks between which tokens may merge, where
    they may."""

    structure: Structure
    costs: Costs
    stack: TokenStack | None = None


@dataclass(frozen=True)
class Pruned:
    """A smaller network, and how it came about.

    ``plan`` counts units of the network that was pruned, ``scores`` is empty where the plan was given.
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
        kept = {group.name: len(self.plan.kept.get(group.name, range(group.units))) for group in self._groups}
        return html_of(kept_view(repr(self)[1:-1], [(g.name, g.kind, g.units, kept[g.name]) for g in self._groups]))

    @property
    def _groups(self) -> tuple[Group, ...]:
        return self.anatomy.structure.groups


def examine(network: Network, *, narrow: bool = True, tokens: bool = False) -> Anatomy:
    """Find and count the prunable groups; UserError when there are none.

    Args:
        narrow: whether heads may also get narrower.
        tokens: whether tokens are to merge; UserError where they cannot.
    """
    structure = describe(network.module, network.inputs)
    if not narrow:
        structure = structure.without_widths()
    if not structure.groups:
        raise UserError(_nothing_prunable(network, structure))
    stack = token_stack(network.module, network.inputs, structure, network.token_mask) if tokens else None
    return Anatomy(structure, flop_costs(network.module, structure, network.inputs), stack)


def ready(network: Network, batches: Batches) -> Network:
    """The network as `Network.checked` puts it right; UserError where it cannot be pruned, or not on ``batches``."""
    found = validate(network)
    check_batches(found.module, found.inputs, batches)
    if len(batches):
        with torch.no_grad():
            outputs = found.forward({name: tensor[:1].clone() for name, tensor in batches[0].items()})
        bad = next((name for name, output in outputs.items() if not output.isfinite().all()), None)
        if bad is not None:
            raise UserError(f"the network gives NaN or infinity in {bad} on the first sample of batch 0")
    return found


def examine_as(network: Network, groups: Collection[str], *, tokens: bool = False) -> Anatomy:
    """`examine`, narrow where ``groups``, by their names, are those of a network whose heads may get narrower."""
    anatomy = examine(network, tokens=tokens)
    if any(group.kind == "width" and group.name in groups for group in anatomy.structure.groups):
        return anatomy
    structure = anatomy.structure.without_widths()
    return replace(anatomy, structure=structure, costs=flop_costs(network.module, structure, network.inputs))


def check_share(flops: float) -> None:
    """Raise UserError unless ``flops`` is a part of the FLOPs."""
    if not 0 < flops < 1:
        raise UserError(f"flops={flops:g}: give the part of the FLOPs to keep, above 0 and below 1, like 0.5")


def _nothing_prunable(network: Network, structure: Structure) -> str:
    """What was looked for, and where the FLOPs are."""
    largest = unpruned(network.module, structure, network.inputs)[:_LARGEST]
    parts = [f"{each.module} ({100 * each.flops_share:.1f} %: {each.reason})" for each in largest]
    told = {each.module for each in largest}
    uncounted = [(n, m) for n, m in network.module.named_modules() if isinstance(m, UNCOUNTED) and n not in told]
    parts += [f"{name or 'the network'} (not counted: {never_pruned(m)})" for name, m in uncounted[:_LARGEST]]
    return (
        f"nothing prunable found in {network.source.name}; its FLOPs are in {', '.join(parts) or 'no layer'}; "
        f"looked for: {' '.join(prunable())}"
    )


@torch.inference_mode(False)
def prune(
    network: Network,
    batches: Batches,
    flops: float,
    *,
    scoring: Scoring | None = None,
    labels: Sequence[Tensor] | None = None,
    align: int = 64,
    ridge: Ridge = "auto",
    rounds: int = 1,
    narrow: bool | None = None,
    tokens: Tokens = "off",
    tokens_share: float | None = None,
) -> Pruned:
    """Score, search, slice and repair in one call.

    Args:
        batches: calibration inputs on the network's device.
        flops: part of the network's FLOPs to keep, above 0 and below 1.
        scoring: how units are scored.
        labels: class numbers for each batch, for the criterion "fisher".
        align: see `search.search`.
        ridge: strength of the repair's ridge (see ``compensation``), "auto" to choose it on held-out batches, None for
            no repair but new statistics of batch norms.
        rounds: in how many steps the budget is approached; each scores what the one before has left.
        narrow: whether heads may also get narrower; None leaves it to the criterion.
        tokens: how many tokens enter each block; "auto" finds it together with the units.
        tokens_share: the part of the FLOPs removed that merging tokens is to remove alone, in place of what "auto"
            finds.

    Raises:
        UserError: nothing is prunable, tokens cannot merge, or the budget is out of range or below the floor.
        GateError: what the plan leaves computes something else than the masked network.
    """
    check_share(flops)
    if rounds < 1:
        raise UserError(f"rounds={rounds}: at least 1 is needed")
    scoring = scoring or Scoring()
    if rounds > 1 and tokens != "off":
        raise UserError(f"rounds={rounds}: tokens merge in one round")
    network = ready(network, batches)
    anatomy = examine(network, narrow=scoring.narrows_heads if narrow is None else narrow, tokens=tokens != "off")
    check_budget(anatomy.structure, anatomy.costs, flops)
    dense = in_principal_bases(network, anatomy.structure, batches)
    scores = score(dense, anatomy.structure, anatomy.costs, batches, scoring, labels=labels)
    damage = None
    if anatomy.stack is not None and tokens == "auto":
        damage = token_damages(dense, anatomy.structure, anatomy.stack, batches, scoring)
    schedule = token_schedule(dense, anatomy, scores, flops, align, tokens, tokens_share, damage)
    plan, small = remove_in_rounds(
        dense,
        anatomy,
        scores,
        batches,
        flops,
        scoring=scoring,
        labels=labels,
        align=align,
        ridge=ridge,
        rounds=rounds,
        schedule=schedule,
    )
    return Pruned(network.with_module(small), plan, scores, anatomy)


@torch.inference_mode(False)
def prune_to(network: Network, batches: Batches, plan: Plan, ridge: Ridge = "auto") -> Pruned:
    """Slice by ``plan`` and repair, as `prune` does once there is one; there are no scores then.

    Raises:
        UserError: the plan does not fit the network.
        GateError: what the plan leaves computes something else than the masked network.
    """
    network = ready(network, batches)
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
    flops: float,
    align: int,
    tokens: Tokens,
    share: float | None = None,
    damage: Damages | None = None,
) -> tuple[int, ...]:
    """How many tokens enter each block, for `remove_in_rounds`; empty where none merge.

    Arguments are those of `prune`; ``damage`` is what `scoring.token_damages` gives, needed where tokens are "auto".
    """
    stack, structure = anatomy.stack, anatomy.structure
    if tokens == "off" or stack is None:
        return ()
    if tokens != "auto":
        schedule = tuple(int(n) for n in tokens)
        stack.check(schedule)
        return schedule
    assert damage is not None
    costs = token_costs(dense.module, structure, anatomy.costs, stack, dense.inputs)
    if share is not None:
        return share_schedule(structure, costs, 1 - share * (1 - flops), damage)
    return best_schedule(structure, scores, costs, flops, align, damage)


def remove_in_rounds(
    dense: Network,
    anatomy: Anatomy,
    scores: Mapping[str, Tensor],
    batches: Batches,
    flops: float,
    *,
    scoring: Scoring,
    labels: Sequence[Tensor] | None,
    align: int,
    ridge: Ridge,
    rounds: int,
    edges: Mapping[str, Sequence[int]] | None = None,
    schedule: tuple[int, ...] = (),
) -> tuple[Plan, nn.Module]:
    """Search, slice and repair, as `prune` does once there are ``scores``.

    Args:
        edges: numbers of units worth keeping, see `search.search_all`.
        schedule: tokens that enter each block, in one round only; empty where all do.

    Returns:
        the plan, in the dense network's units, and the module.
    """
    costs: CostModel = anatomy.costs
    if schedule and anatomy.stack is not None:
        costs = token_costs(dense.module, anatomy.structure, anatomy.costs, anatomy.stack, dense.inputs).at(schedule)
    budget = Budget(costs, flops ** (1 / rounds))
    plan = told_plan(batches, lambda: search_all(anatomy.structure, scores, [budget], align, edges))
    plan = replace(plan, tokens=schedule)
    with part(1 / rounds):
        small = remove(dense, anatomy.structure, plan, batches, ridge, anatomy.stack)
    for number in track(range(2, rounds + 1)):
        left = flops ** (number / rounds)
        step = next_step(dense.with_module(small), anatomy, left, batches, scoring, labels, align)
        plan, small = remove_more(dense, anatomy, plan, small, step, batches, ridge)
    return plan, small


def next_step(
    small: Network,
    anatomy: Anatomy,
    flops: float,
    batches: Batches,
    scoring: Scoring,
    labels: Sequence[Tensor] | None,
    align: int,
) -> tuple[Structure, Plan]:
    """What leaves a pruned network next, so that ``flops`` of the dense one's are left: its structure, and the plan in
    its units.

    Args:
        anatomy: of the dense network.
    """
    narrow = any(g.kind == "width" for g in anatomy.structure.groups)
    rest = examine(small, narrow=narrow)
    scores = score(small, rest.structure, rest.costs, batches, scoring, labels=labels)
    part = flops * anatomy.costs.total / rest.costs.total
    return rest.structure, told_plan(batches, lambda: search(rest.structure, scores, rest.costs, part, align))


def told_plan(batches: Batches, make: Callable[[], Plan]) -> Plan:
    """The plan that the main one of those who share ``batches`` makes, so that all have the same."""
    found = ranks_of(batches).told(lambda: asdict(make()))
    return Plan({name: tuple(units) for name, units in found["kept"].items()}, tuple(found["tokens"]))


def remove(
    dense: Network,
    structure: Structure,
    plan: Plan,
    batches: Batches,
    ridge: Ridge,
    stack: TokenStack | None = None,
) -> nn.Module:
    """Slice by ``plan`` and repair. With ``ridge`` None, statistics of batch
    norms are taken anew instead.

    Tokens merge from then on, where the plan says so: what they are merged into has no counterpart in the dense
    network that it could be refitted to. Class logits have, and the map that gives them is fitted behind merging.

    Raises:
        GateError: what is sliced is not what is masked, see `cut_check.check_cut`. Not checked without ``batches``.
    """
    small = sliced(dense.module, structure, plan)
    if batches:
        check_cut(dense, small, structure, plan, batches)
    _repair(dense, small, structure, plan, batches, ridge)
    if plan.tokens and stack is not None:
        with_merging(small, structure, stack, plan)
    _refit_classifier(dense, small, batches, ridge)
    return small


def remove_more(
    dense: Network,
    anatomy: Anatomy,
    plan: Plan,
    small: nn.Module,
    step: tuple[Structure, Plan],
    batches: Batches,
    ridge: Ridge,
) -> tuple[Plan, nn.Module]:
    """Slice ``small``, which ``plan`` has left of the dense network, by a `next_step`; repair it against the dense one.

    Returns:
        the plan of both steps together, in the dense network's units, and the module.

    Raises:
        GateError: what is sliced is not what is masked.
    """
    together = step[1].after(plan)
    smaller = sliced(small, *step)
    check_cut(dense.with_module(small), smaller, *step, batches)
    _repair(dense, smaller, anatomy.structure, together, batches, ridge)
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
    """Give what ``plan`` has left of the dense network, ``small``, the 2:4 pattern in place, following the dense one.

    With ``ridge`` None, weights that stay keep their values.
    """
    strengths = STRENGTHS if ridge == "auto" else () if ridge is None else (ridge,)
    sparsify(dense, small, structure, plan, batches, strengths)
    # The classifier stays dense.
    _refit_classifier(dense, small, batches, ridge)


def _repair(
    dense: Network,
    small: nn.Module,
    structure: Structure,
    plan: Plan,
    batches: Batches,
    ridge: Ridge,
) -> None:
    """All maps but that which gives class logits, see `_refit_classifier`."""
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
