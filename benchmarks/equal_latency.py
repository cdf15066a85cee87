"""FLOP budget against latency budget at the same measured latency: which keeps more accuracy?

    python benchmarks/equal_latency.py --data-root ../shared/data

MiniLM is pruned to a FLOP budget as ``prune-export --flops`` does it, and measured; then to a latency budget of just
that latency (the budget asked for is the one whose aim it is), as ``--latency`` does it. Both are compensated, judged
on STS-B dev, and measured against each other in one interleaved run. Writes ``results/DEVICE/equal-latency.json``,
seed by seed, beside those of earlier runs; ``--table`` only prints what is there.
"""

import argparse
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from tempfile import TemporaryDirectory

import common
import torch
from cases import stsb
from latency_budget import scored
from rich.console import Console
from rich.table import Table
from torch import nn

from optin_deploy import Network
from optin_deploy.latency.budget import AIM, LatencySearch, solve_latency_budget
from optin_deploy.latency.tables import measure_latency_model
from optin_deploy.latency.target import Target, write_network
from optin_deploy.pruning.removal import Remover
from optin_deploy.pruning.space import analyze
from optin_deploy.search.knapsack import search
from profilers import measure_files
from profilers.stats import Interval, ratio_interval

_METRIC, _LIKENESS = "Spearman × 100", "similarity correlation"


@dataclass(frozen=True)
class Row:
    """One FLOP budget (``flops``) and the latency budget of what it takes; figures of the two in this order.

    ``latency`` is the part of the dense latency that each takes, ``ratio`` latency-budgeted ÷ FLOP-budgeted time, with
    its interval.
    """

    batch_size: int
    seed: int
    flops: float
    latency: tuple[float, float]
    ratio: Interval
    flops_left: tuple[float, float]
    spearman: tuple[float, float]
    likeness: tuple[float, float]


RESULT = common.ResultFile("equal-latency", Row, key=lambda row: (row.batch_size, row.seed, row.flops))


def latencies(
    dense: Network, modules: dict[str, nn.Module], target: Target, seconds: float
) -> dict[str, list[list[float]]]:
    """Milliseconds of all modules in one interleaved run, by name."""
    with TemporaryDirectory(prefix="optin-benchmark-") as folder:
        files = {name: write_network(dense, module, target, Path(folder, name)) for name, module in modules.items()}
        sample = {n: t[:1].numpy() for n, t in dense.inputs.items()}
        pairs = [("dense", name) for name in modules if name != "dense"]
        return dict(measure_files(files, sample, target.case(seconds, files.values()), pairs).samples_ms)


def run(given: argparse.Namespace, size: int, seed: int) -> list[Row]:
    """All FLOP budgets at one batch size."""
    case = stsb(given.data_root, seed, given.samples)
    network, space = case.network, analyze(case.network)
    in_bases, scores = scored(network, space, case.batches)
    target = Target(given.runtime, size, given.threads, seed=seed)
    structure, total = space.structure, space.costs.total
    measured = measure_latency_model(network, structure, target)
    rows = []
    for flops in (float(f) for f in given.flops.split(",")):
        plan = search(structure, scores, space.costs, flops, 64)
        first = Remover(in_bases, space, case.batches, "auto").remove(plan)
        taken = latencies(network, {"dense": network.module, "flops": first}, target, given.seconds)
        part = ratio_interval(taken["flops"], taken["dense"]).value
        # Budgets are aimed at from a little below: asked for so much that the two take equally long.
        search_at = LatencySearch(in_bases, structure, scores, measured, space.costs, part / AIM)
        other = solve_latency_budget(search_at).plan
        second = Remover(in_bases, space, case.batches, "auto").remove(other)
        modules = {"dense": network.module, "flops": first, "latency": second}
        found = latencies(network, modules, target, given.seconds)
        figures = [case.measure(module) for module in (first, second)]
        rows.append(
            Row(
                batch_size=size,
                seed=seed,
                flops=flops,
                latency=tuple(ratio_interval(found[n], found["dense"]).value for n in ("flops", "latency")),
                ratio=ratio_interval(found["latency"], found["flops"]),
                flops_left=tuple(space.costs.of(p) / total for p in (plan, other)),
                spearman=tuple(f[_METRIC] for f in figures),
                likeness=tuple(f[_LIKENESS] for f in figures),
            )
        )
        Console(width=140).print(table(rows[-1:]))
    return rows


def table(rows: list[Row]) -> Table:
    """FLOP-budgeted → latency-budgeted."""
    heading = ("batch", "seed", "--flops", "latency", "time ratio", "FLOPs", _METRIC, _LIKENESS)

    def both(pair: tuple[float, float], digits: int) -> str:
        return f"{pair[0]:.{digits}f} → {pair[1]:.{digits}f}"

    lines = [
        (str(row.batch_size), str(row.seed), f"{row.flops:g}", both(row.latency, 3),
         common.interval(row.ratio, digits=3), both(row.flops_left, 3), both(row.spearman, 2), both(row.likeness, 4))
        for row in rows
    ]  # fmt: skip
    return common.terminal_table(heading, lines)


def at_equal_time(rows: list[Row], figure: str) -> list[float]:
    """Latency-budgeted less FLOP-budgeted in one ``figure``, for every row: the FLOP-budgeted network's is moved to the
    time that the other takes, along the line through the two nearest FLOP budgets of the same seed and batch size."""
    gains = []
    for row in rows:
        same = [r for r in rows if (r.batch_size, r.seed) == (row.batch_size, row.seed)]
        near = sorted(same, key=lambda r: abs(r.latency[0] - row.latency[1]))[:2]
        if len(near) < 2:
            continue
        (x0, y0), (x1, y1) = ((r.latency[0], getattr(r, figure)[0]) for r in near)
        expected = y0 + (y1 - y0) * (row.latency[1] - x0) / (x1 - x0)
        gains.append(getattr(row, figure)[1] - expected)
    return gains


def verdict(rows: list[Row]) -> str:
    """Means over the rows and their standard errors."""
    found = {told: at_equal_time(rows, name) for name, told in (("spearman", _METRIC), ("likeness", _LIKENESS))}
    parts = [f"{told} {mean(g):+.4f} ± {stdev(g) / len(g) ** 0.5:.4f}" for told, g in found.items() if len(g) > 1]
    return f"at equal time, latency budget less FLOP budget: {', '.join(parts)}" if parts else ""


def main() -> None:
    """Measure, write, print."""
    arguments = common.speed_parser(__doc__ or "", batch_sizes="8", seconds=30.0, samples=256)
    arguments.add_argument("--flops", default="0.6,0.5,0.4", help="comma-separated")
    arguments.add_argument("--runtime", default="ort-cpu")
    arguments.add_argument("--seeds", default="0", help="comma-separated")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    if not given.table:
        for size, seed in product(given.batch_sizes.split(","), given.seeds.split(",")):
            rows = run(given, int(size), int(seed))
            RESULT.add(rows, samples=given.samples, threads=given.threads, seconds_per_case=given.seconds)
    Console(width=140).print(table(RESULT.read()))
    print(verdict(RESULT.read()))


if __name__ == "__main__":
    main()
