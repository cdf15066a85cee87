"""A plan that meets a latency on the real artefact: search by the table, build, measure, correct, search again."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal, TypeVar

from torch import Tensor

from optin_deploy.latency.costs import LatencyCosts
from optin_deploy.latency.tables import Measured, Target, export_network
from optin_deploy.network import Network
from optin_deploy.search.costs import CostModel, Costs
from optin_deploy.search.knapsack import (
    BUDGET_WINDOW,
    Budget,
    candidate_sizes,
    check_budget,
    kept_score,
    lowest,
    search_all,
)
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import sliced
from optin_deploy.tokens.costs import TokenCosts
from optin_deploy.tokens.merging import with_merging
from optin_deploy.utils.progress import track
from profilers import measure_files
from profilers.stats import paired_ratio

logger = logging.getLogger(__name__)
MOST_ROUNDS = 3
# A plan is taken when its network takes between these parts of the latency asked for; the search aims between them.
LOWEST, AIM = 0.98, 0.99
# Of the latency asked for: plans so near below the aim need no finer sizes.
_WINDOW = 0.005
_SECONDS = 60.0
# FLOP budgets are tried at most so often until the latency fits.
_STEPS = 8
# Sizes that an edge is looked for among, beside those measured.
_ALIGN = 64
# Neurons in multiples of this number, where edges do not come near enough to the budget.
_FINE = 8
# Costs that differ by less than this part of what the whole group costs are one level.
_LEVEL = 0.002


Way = Literal["latency", "FLOPs"]
_Name = TypeVar("_Name", bound=str)


@dataclass(frozen=True)
class Round:
    """One network built and measured.

    Attributes:
        by: the cost by which its plan was searched.
        predicted_ms: by the tables as corrected so far.
        measured_ms: on the same scale, i.e. the measured ratio to the dense network times the dense network's latency.
        flops: part of the dense network's FLOPs.
        score: the score kept, by which networks of one latency are told apart.
    """

    by: Way
    predicted_ms: float
    measured_ms: float
    flops: float
    score: float

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_ms / self.measured_ms - 1


@dataclass(frozen=True)
class Met:
    """The plan taken, and the networks built on the way; ``taken`` is the place of its own among ``rounds``."""

    plan: Plan
    rounds: tuple[Round, ...]
    taken: int


@dataclass(frozen=True)
class _Search:
    """What both ways of searching share. ``limit`` is the part of the dense latency that holds, ``flops`` that of the
    FLOPs, if any; ``edges`` as for `search.search_all`."""

    structure: Structure
    scores: Mapping[str, Tensor]
    flop_costs: CostModel
    limit: float
    flops: float | None
    align: int
    edges: Mapping[str, Sequence[int]] | None

    def by_latency(self, costs: LatencyCosts) -> Plan:
        """The plan with the largest score kept whose predicted latency is the aim."""
        wanted = Budget(costs, self._aim(costs), "latency", window=_WINDOW * self.limit)
        others = [] if self.flops is None else [Budget(self.flop_costs, self.flops)]
        return search_all(self.structure, self.scores, [wanted, *others], self.align, self.edges)

    def by_flops(self, costs: LatencyCosts) -> Plan:
        """The plan with the largest score kept of those with so few FLOPs that its predicted latency is the aim."""
        limit, window = self._aim(costs) * costs.total, _WINDOW * self.limit * costs.total
        low, low_ms = lowest(self.structure, self.flop_costs), costs.floor
        high = 1.0 if self.flops is None else self.flops
        plan = self._within(high)
        best, high_ms = plan, costs.of(plan)
        for _ in range(_STEPS):
            if limit - window <= costs.of(plan) <= limit or high_ms <= limit:
                return plan
            # Latency is nearly linear in FLOPs.
            share = (limit - window / 2 - low_ms) / (high_ms - low_ms)
            middle = low + min(max(share, 0.05), 0.95) * (high - low)
            plan = self._within(middle)
            if costs.of(plan) <= limit:
                low, low_ms, best = middle, costs.of(plan), plan
            else:
                high, high_ms = middle, costs.of(plan)
        return best

    def _within(self, flops: float) -> Plan:
        budget = Budget(self.flop_costs, flops, window=_WINDOW)
        return search_all(self.structure, self.scores, [budget], self.align)

    def _aim(self, costs: LatencyCosts) -> float:
        return max(AIM * self.limit, min(self.limit, costs.floor / costs.total))


def meet(
    dense: Network,
    structure: Structure,
    scores: Mapping[str, Tensor],
    measured: Measured,
    flop_costs: Costs,
    fraction: float,
    target: Target,
    *,
    flops: float | None = None,
    align: int | None = None,
    tokens: TokenCosts | None = None,
) -> Met:
    """Find the plan whose network takes at most ``fraction`` of the dense latency, and hardly less.

    At most three rounds of: search, slice, export, measure against the dense network in one interleaved run, correct
    the costs by what was measured. The search is made twice, by the latency tables and, because tables carry the noise
    of what they were measured from, by FLOPs; of the networks that meet the budget the one that keeps more score is
    taken. Where tokens merge, the network with all its units is built and measured first: tables know what units take
    when fewer tokens come to them, but not what merging takes. Repair changes no shape, so that it is not needed here.

    Args:
        measured: tables and the dense latency, by `measure.measure_network`.
        flop_costs: of the dense network.
        flops: part of the dense FLOPs that is not exceeded either.
        align: neurons in multiples of this number; None takes the edges that the tables found, and by FLOPs 64.
        tokens: the FLOPs at the schedule by which tokens merge; None where they do not.

    Raises:
        UserError: the budget is below the floor of the table.
    """
    edges = edges_of(structure, measured) if align is None else None
    all_flops: CostModel = flop_costs if tokens is None else tokens
    by_latency = _Search(structure, scores, all_flops, fraction, flops, align or _FINE, edges)
    by_flops = replace(by_latency, align=align or _ALIGN)
    ways: dict[Way, Callable[[LatencyCosts], Plan]] = {"latency": by_latency.by_latency, "FLOPs": by_flops.by_flops}
    first = measured.costs
    tried: list[tuple[Plan, Round]] = []
    if tokens is None:
        check_budget(structure, first, fraction, "latency")
    with TemporaryDirectory(prefix="optin-budget-") as name:
        folder = Path(name)
        dense_file = export_network(dense, dense.module, target, folder / "dense")
        if tokens is not None:
            first = _merging(first, dense, structure, dense_file, target, tokens)
            check_budget(structure, first, fraction, "latency")
        costs: dict[Way, LatencyCosts] = dict.fromkeys(ways, first)
        for _ in track(range(MOST_ROUNDS)):
            plans = {way: search(costs[way]) for way, search in ways.items()}
            plans = {way: plan for way, plan in plans.items() if plan not in [p for p, _ in tried]}
            if plans.get("FLOPs") == plans.get("latency"):
                plans.pop("FLOPs", None)
            parts = _built(dense, structure, plans, dense_file, target, tokens)
            for way, plan in plans.items():
                on_scale = parts[way] * costs[way].total
                part = all_flops.of(plan) / all_flops.total
                kept = kept_score(structure, scores, plan)
                tried.append((plan, Round(way, costs[way].of(plan), on_scale, part, kept)))
                logger.info("built by %s: predicted %.4g ms, measured %.4g ms", way, costs[way].of(plan), on_scale)
                relative = on_scale / (fraction * costs[way].total)
                # The FLOPs may be what holds the latency down.
                held_down = flops is not None and part > flops - BUDGET_WINDOW
                if LOWEST <= relative <= 1.0 or (relative < LOWEST and held_down):
                    del ways[way]
                costs[way] = costs[way].corrected(plan, on_scale)
            if not ways:
                break
    taken = _best([r for _, r in tried], fraction * measured.costs.total)
    plan = replace(tried[taken][0], tokens=tokens.schedule if tokens is not None else ())
    return Met(plan, tuple(r for _, r in tried), taken)


def _merging(
    costs: LatencyCosts, dense: Network, structure: Structure, dense_file: Path, target: Target, tokens: TokenCosts
) -> LatencyCosts:
    """The costs where tokens merge, by what the network with all its units then takes."""
    found = _built(dense, structure, {"whole": Plan({})}, dense_file, target, tokens)
    whole_ms = found["whole"] * costs.total
    logger.info("built with all units: measured %.4g ms", whole_ms)
    return costs.merging({name: tokens.factor(name) for name in costs.curves}, whole_ms)


def _built(
    dense: Network,
    structure: Structure,
    plans: Mapping[_Name, Plan],
    dense_file: Path,
    target: Target,
    tokens: TokenCosts | None,
) -> dict[_Name, float]:
    """Latency of the network of each plan, as a part of the dense one's; all in one interleaved run."""
    if not plans:
        return {}
    files: dict[str, Path] = {"dense": dense_file}
    for way, plan in plans.items():
        small = sliced(dense.module, structure, plan)
        if tokens is not None:
            with_merging(small, structure, tokens.stack, replace(plan, tokens=tokens.schedule))
        files[way] = export_network(dense, small, target, dense_file.parent / way.lower())
    sample = {n: t[:1].numpy(force=True) for n, t in dense.inputs.items()}
    pairs: list[tuple[str, str]] = [("dense", way) for way in plans]
    found = measure_files(files, sample, target.case(_SECONDS, files.values()), pairs).samples_ms
    return {way: paired_ratio(found[way], found["dense"]) for way in plans}


def _best(rounds: Sequence[Round], limit_ms: float) -> int:
    """Of those that hardly stay below the limit the one with the largest score kept; or else the slowest of those
    within the limit; the fastest where there are none."""
    within = [i for i, r in enumerate(rounds) if r.measured_ms <= limit_ms]
    near = [i for i in within if rounds[i].measured_ms >= LOWEST * limit_ms]
    if near:
        return max(near, key=lambda i: rounds[i].score)
    if within:
        return max(within, key=lambda i: rounds[i].measured_ms)
    return min(range(len(rounds)), key=lambda i: rounds[i].measured_ms)


def edges_of(structure: Structure, measured: Measured) -> dict[str, list[int]]:
    """Group name -> numbers of neurons or channels worth keeping: of all multiples of the default alignment and the
    sizes measured, the largest of every level of cost. A smaller one on a level would give up units for no time."""
    found = {}
    for group in structure.groups:
        if group.kind in ("neuron", "channel"):
            curve = measured.costs.curves[group.name]
            sizes = sorted({*candidate_sizes(group, _ALIGN), *(n for n in curve.units if n >= group.least)})
            cost = [curve.at(n, None) for n in sizes]
            level = _LEVEL * abs(cost[0])
            found[group.name] = [n for i, n in enumerate(sizes) if i + 1 == len(sizes) or cost[i + 1] - cost[i] > level]
            found[group.name] = sorted({group.least, *found[group.name]})
    return found
