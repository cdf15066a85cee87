"""A plan that meets a latency on the real artefact: search by the table, build, measure, correct, search again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from optin_deploy.latency.costs import LatencyCosts
from optin_deploy.latency.measure import Measured, Target, export_network
from optin_deploy.network import Network
from optin_deploy.plan import Plan
from optin_deploy.search import Budget, candidate_sizes, check_budget, search_all
from optin_deploy.slicing import sliced
from optin_deploy.structure.groups import Structure
from profilers import measure_files
from profilers.statistics import paired_ratio

MOST_ROUNDS = 3
# A plan is taken when its network takes between these parts of the latency asked for; the search aims between them.
LOWEST, AIM = 0.98, 0.99
# Of the latency asked for: plans so near below the aim need no finer sizes.
_WINDOW = 0.005
_SECONDS = 60.0
# Sizes that an edge is looked for among, beside those measured.
_ALIGN = 64
# Costs that differ by less than this part of what the whole group costs are one level.
_LEVEL = 0.002


@dataclass(frozen=True)
class Round:
    """One network built and measured: ``predicted_ms`` by the table as corrected so far, ``measured_ms`` on the same
    scale, i.e. the measured ratio to the dense network times the dense network's latency."""

    predicted_ms: float
    measured_ms: float
    flops: float

    @property
    def error(self) -> float:
        """Predicted over measured, less 1."""
        return self.predicted_ms / self.measured_ms - 1


@dataclass(frozen=True)
class Met:
    """The plan taken, the rounds that led to it (its own is ``taken``), and the corrected costs."""

    plan: Plan
    rounds: tuple[Round, ...]
    taken: int
    costs: LatencyCosts


def meet(
    dense: Network,
    structure: Structure,
    scores: Mapping[str, Tensor],
    measured: Measured,
    fraction: float,
    others: Sequence[Budget],
    target: Target,
    align: int | None,
    progress: Callable[[float], None] = lambda _: None,
) -> Met:
    """Find the plan whose network takes at most ``fraction`` of the dense latency, and hardly less.

    At most three rounds of: search by the costs as they are, slice, export, measure against the dense network in one
    interleaved run, correct the costs by what was measured. Repair changes no shape, so that it is not needed here.

    Args:
        measured: tables and the dense latency, by `measure.measure_network`.
        others: further budgets that hold beside.
        align: neurons in multiples of this number; None takes the edges that the tables found.

    Raises:
        UserError: the budget is below the floor of the table.
    """
    check_budget(structure, measured.costs, fraction, "latency")
    costs, tried = measured.costs, []
    edges = edges_of(structure, measured) if align is None else None
    with TemporaryDirectory(prefix="optin-budget-") as name:
        folder = Path(name)
        files = {"dense": export_network(dense, dense.module, target, folder / "dense")}
        sample = {n: t[:1].numpy(force=True) for n, t in dense.inputs.items()}
        for number in range(MOST_ROUNDS):
            aim = max(AIM * fraction, min(fraction, costs.floor / costs.total))
            wanted = Budget(costs, aim, "latency", window=_WINDOW * fraction)
            plan = search_all(structure, scores, [wanted, *others], align or 8, edges)
            files["pruned"] = export_network(dense, sliced(dense.module, structure, plan), target, folder / "pruned")
            found = measure_files(files, sample, target.case(_SECONDS, files.values()), [("dense", "pruned")])
            on_scale = costs.total * paired_ratio(found.samples_ms["pruned"], found.samples_ms["dense"])
            flops = [b.costs.of(plan) / b.costs.total for b in others if b.what == "FLOPs"]
            tried.append((plan, Round(costs.of(plan), on_scale, flops[0] if flops else 0.0), costs))
            progress((number + 1) / MOST_ROUNDS)
            relative = on_scale / (fraction * costs.total)
            within = any(b.costs.of(plan) > (b.fraction - 0.01) * b.costs.total for b in others)
            # Another budget may be what holds the latency down.
            if LOWEST <= relative <= 1.0 or (relative < LOWEST and within):
                break
            costs = costs.corrected(plan, on_scale)
    taken = _best([r.measured_ms for _, r, _ in tried], fraction * measured.costs.total)
    plan, _, costs = tried[taken]
    return Met(plan, tuple(r for _, r, _ in tried), taken, costs)


def _best(latencies_ms: Sequence[float], limit_ms: float) -> int:
    """The slowest of those within the limit; the fastest where none is."""
    within = [i for i, ms in enumerate(latencies_ms) if ms <= limit_ms]
    if within:
        return max(within, key=latencies_ms.__getitem__)
    return min(range(len(latencies_ms)), key=latencies_ms.__getitem__)


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
