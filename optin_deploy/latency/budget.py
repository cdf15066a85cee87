"""Find a plan within a latency: search by the tables, build, measure, correct the tables, search again."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from torch import Tensor

from optin_deploy.latency.costs import LatencyCosts
from optin_deploy.latency.tables import LatencyModel
from optin_deploy.latency.target import write_network
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
from optin_deploy.structure.slicing import slice_network
from optin_deploy.tokens.costs import TokenCosts
from optin_deploy.tokens.merging import with_merging
from optin_deploy.utils.progress import track
from profilers import measure_files
from profilers.stats import paired_ratio

logger = logging.getLogger(__name__)
# A plan is taken when its network takes between these parts of the latency asked for; the search aims between them.
LOWEST, AIM = 0.98, 0.99
# Part of the latency asked for: plans so near below the aim need no finer sizes.
_WINDOW = 0.005
# FLOP budgets that are tried, at most, until the latency fits.
_FLOP_BUDGETS = 8
# Multiples of this number are candidates for step sizes, next to the sizes measured.
_ALIGN = 64
# Neurons in multiples of this number, where step sizes do not come near enough to the budget.
_FINE = 8
# Costs that differ by less than this part of what the whole group costs are one level.
_LEVEL = 0.002

Objective = Literal["latency", "FLOPs"]


@dataclass(frozen=True)
class Iteration:
    """One network that was built and measured.

    Attributes:
        objective: the cost by which its plan was searched.
        plan: without the schedule by which tokens merge.
        predicted_ms: by the tables as corrected so far.
        measured_ms: the measured ratio to the dense network times the dense network's latency.
        flops: as a part of the dense network's FLOPs.
        score: the score kept, which decides between networks of one latency.
    """

    objective: Objective
    plan: Plan
    predicted_ms: float
    measured_ms: float
    flops: float
    score: float

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_ms / self.measured_ms - 1


@dataclass(frozen=True)
class LatencySolution:
    """The plan taken, and all networks that were built; ``taken`` is the index of the plan's own iteration."""

    plan: Plan
    iterations: tuple[Iteration, ...]
    taken: int


@dataclass(frozen=True)
class LatencySearch:
    """A latency budget and all that is needed to search for a plan within it.

    Attributes:
        dense: the network; removed units are not compensated here, since compensation changes no shape.
        model: the latency of ``dense`` by tables.
        flop_costs: of the dense network.
        fraction: the part of the dense latency that is allowed.
        flops: the part of the dense FLOPs that is allowed, too; None for any.
        align: neurons are kept in multiples of this number; None takes the step sizes of the tables, and 64 in the
            search by FLOPs.
        tokens: the FLOPs at the schedule by which tokens merge; None where they do not merge.
    """

    dense: Network
    structure: Structure
    scores: Mapping[str, Tensor]
    model: LatencyModel
    flop_costs: Costs
    fraction: float
    flops: float | None = None
    align: int | None = None
    tokens: TokenCosts | None = None

    @property
    def all_flops(self) -> CostModel:
        """The FLOPs with merged tokens, where tokens merge."""
        return self.flop_costs if self.tokens is None else self.tokens

    @property
    def limit_ms(self) -> float:
        """The latency that is allowed, in milliseconds."""
        return self.fraction * self.model.costs.total

    def plan(self, objective: Objective, costs: LatencyCosts) -> Plan:
        """Return the plan with the largest score kept whose predicted latency is the aim."""
        return self._plan_by_latency(costs) if objective == "latency" else self._plan_by_flops(costs)

    def _plan_by_latency(self, costs: LatencyCosts) -> Plan:
        budgets = [Budget(costs, self._aim(costs), "latency", window=_WINDOW * self.fraction)]
        if self.flops is not None:
            budgets.append(Budget(self.all_flops, self.flops))
        step_sizes = find_step_sizes(self.structure, self.model.costs) if self.align is None else None
        return search_all(self.structure, self.scores, budgets, self.align or _FINE, step_sizes)

    def _plan_by_flops(self, costs: LatencyCosts) -> Plan:
        """Return the best plan under the FLOP budget at which the predicted latency is the aim, by regula falsi."""
        limit, window = self._aim(costs) * costs.total, _WINDOW * self.fraction * costs.total
        low, low_ms = lowest(self.structure, self.all_flops), costs.floor
        high = 1.0 if self.flops is None else self.flops
        plan = self._plan_within(high)
        best, high_ms = plan, costs.of(plan)
        for _ in range(_FLOP_BUDGETS):
            if limit - window <= costs.of(plan) <= limit or high_ms <= limit:
                return plan
            # Latency is nearly linear in FLOPs.
            share = (limit - window / 2 - low_ms) / (high_ms - low_ms)
            middle = low + min(max(share, 0.05), 0.95) * (high - low)
            plan = self._plan_within(middle)
            if costs.of(plan) <= limit:
                low, low_ms, best = middle, costs.of(plan), plan
            else:
                high, high_ms = middle, costs.of(plan)
        return best

    def _plan_within(self, flops: float) -> Plan:
        budget = Budget(self.all_flops, flops, window=BUDGET_WINDOW)
        return search_all(self.structure, self.scores, [budget], self.align or _ALIGN)

    def _aim(self, costs: LatencyCosts) -> float:
        return max(AIM * self.fraction, min(self.fraction, costs.floor / costs.total))

    def is_met_by(self, iteration: Iteration) -> bool:
        """Return whether the network is within the budget and near it, or as near as the FLOP budget allows."""
        relative = iteration.measured_ms / self.limit_ms
        at_flop_limit = self.flops is not None and iteration.flops > self.flops - BUDGET_WINDOW
        return LOWEST <= relative <= 1.0 or (relative < LOWEST and at_flop_limit)


def solve_latency_budget(search: LatencySearch) -> LatencySolution:
    """Find the plan whose network takes at most the latency asked for, and hardly less.

    Search, slice, export, measure against the dense network in one interleaved run, and correct the costs by the
    measurement; at most three times. The search is made by two objectives: by the latency tables, and by FLOPs, because
    tables carry the noise of their measurement. Of the networks within the budget, the one that keeps more score is
    taken. Where tokens merge, the network with all units is measured first: tables know what units cost when fewer
    tokens reach them, but not what merging costs.

    Raises:
        UserError: the budget is below the floor of the tables.
    """
    costs, tokens = search.model.costs, search.tokens
    with TemporaryDirectory(prefix="optin-budget-") as folder:
        dense = write_network(search.dense, search.dense.module, search.model.target, Path(folder, "dense"))
        if tokens is not None:
            (ratio,) = _measure_ratios(search, [Plan({})], dense)
            logger.info("built with all units: measured %.4g ms", ratio * costs.total)
            costs = costs.merging({name: tokens.factor(name) for name in costs.curves}, ratio * costs.total)
        check_budget(search.structure, costs, search.fraction, "latency")
        iterations = _iterate(search, costs, dense)
    taken = _best(iterations, search.limit_ms)
    plan = replace(iterations[taken].plan, tokens=() if tokens is None else tokens.schedule)
    return LatencySolution(plan, tuple(iterations), taken)


def _iterate(search: LatencySearch, costs: LatencyCosts, dense: Path) -> list[Iteration]:
    """Build and measure plans until each objective meets the budget; each has its own corrected costs."""
    unmet: dict[Objective, LatencyCosts] = {"latency": costs, "FLOPs": costs}
    iterations: list[Iteration] = []
    for _ in track(range(search.model.target.settings.iterations)):
        plans = _new_plans(search, unmet, [iteration.plan for iteration in iterations])
        if not plans:
            break
        ratios = _measure_ratios(search, list(plans.values()), dense)
        for (objective, plan), ratio in zip(plans.items(), ratios, strict=True):
            costs = unmet[objective]
            predicted_ms, measured_ms = costs.of(plan), ratio * costs.total
            logger.info("built by %s: predicted %.4g ms, measured %.4g ms", objective, predicted_ms, measured_ms)
            flops = search.all_flops.of(plan) / search.all_flops.total
            score = kept_score(search.structure, search.scores, plan)
            iteration = Iteration(objective, plan, predicted_ms, measured_ms, flops, score)
            iterations.append(iteration)
            if search.is_met_by(iteration):
                del unmet[objective]
            else:
                unmet[objective] = costs.corrected(plan, measured_ms)
    return iterations


def _new_plans(
    search: LatencySearch, unmet: Mapping[Objective, LatencyCosts], known: Sequence[Plan]
) -> dict[Objective, Plan]:
    """Return one plan per objective, without duplicates and without the known plans."""
    plans: dict[Objective, Plan] = {}
    for objective, costs in unmet.items():
        plan = search.plan(objective, costs)
        if plan not in [*known, *plans.values()]:
            plans[objective] = plan
    return plans


def _measure_ratios(search: LatencySearch, plans: Sequence[Plan], dense: Path) -> list[float]:
    """Return the latency of each plan's network as a part of the dense one's, from one interleaved run."""
    network, target, tokens = search.dense, search.model.target, search.tokens
    files = {"dense": dense}
    for number, plan in enumerate(plans):
        small = slice_network(network.module, search.structure, plan)
        if tokens is not None:
            with_merging(small, search.structure, tokens.stack, replace(plan, tokens=tokens.schedule))
        files[f"plan{number}"] = write_network(network, small, target, dense.with_name(f"plan{number}"))
    sample = {name: tensor[:1].numpy(force=True) for name, tensor in network.inputs.items()}
    names = [name for name in files if name != "dense"]
    case = target.case(target.settings.plan_seconds, files.values())
    samples = measure_files(files, sample, case, [("dense", name) for name in names]).samples_ms
    return [paired_ratio(samples[name], samples["dense"]) for name in names]


def _best(iterations: Sequence[Iteration], limit_ms: float) -> int:
    """Return the index of the network to take.

    That is the one with the largest score kept of those just below the limit, else the slowest one below the limit,
    else the fastest one.
    """
    within = [i for i, iteration in enumerate(iterations) if iteration.measured_ms <= limit_ms]
    near = [i for i in within if iterations[i].measured_ms >= LOWEST * limit_ms]
    if near:
        return max(near, key=lambda i: iterations[i].score)
    if within:
        return max(within, key=lambda i: iterations[i].measured_ms)
    return min(range(len(iterations)), key=lambda i: iterations[i].measured_ms)


def find_step_sizes(structure: Structure, costs: LatencyCosts) -> dict[str, list[int]]:
    """Return the numbers of neurons or channels worth keeping, by group.

    Of the multiples of 64 and the sizes measured, these are the largest of every level of cost: a smaller one of the
    same level would remove units and save no time.
    """
    step_sizes = {}
    for group in structure.groups:
        if group.kind in ("neuron", "channel"):
            curve = costs.curves[group.name]
            sizes = sorted({*candidate_sizes(group, _ALIGN), *(n for n in curve.units if n >= group.min_units)})
            cost = [curve.at(n, None) for n in sizes]
            level = _LEVEL * abs(cost[0])
            ends = [n for i, n in enumerate(sizes) if i + 1 == len(sizes) or cost[i + 1] - cost[i] > level]
            step_sizes[group.name] = sorted({group.min_units, *ends})
    return step_sizes
