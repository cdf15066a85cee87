"""What alignment is worth: networks of the same FLOPs whose layers keep multiples of other numbers, in one run.

    python benchmarks/alignment.py --data-root ../shared/data

Every network is cut to half of its FLOPs with neurons in multiples of 1, 8, 16 and 64, and on the edges of its latency
tables (``--align auto``). Compensation changes no shape and is left out. Dense and all cut networks take turns in a
process; "worth" is what is kept of the scores' sum, relative to multiples of 1. Writes
``results/DEVICE/alignment.json``; ``--table`` only prints what is there.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import common
import torch
from latency_budget import scored
from realised_ratio import load
from rich.console import Console
from rich.table import Table

from optin_deploy.latency.budget import find_step_sizes
from optin_deploy.latency.tables import measure_latency_model
from optin_deploy.latency.target import Target, write_network
from optin_deploy.pruning.space import analyze
from optin_deploy.search.knapsack import Budget, search_all
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network
from profilers import measure_files
from profilers.stats import Interval, ratio_interval

FLOPS = 0.5
STEPS = (1, 8, 16, 64)


@dataclass(frozen=True)
class Row:
    """One alignment: "auto" or a number; ``worth`` is the part kept of the score's sum, relative to alignment 1."""

    model: str
    runtime: str
    batch_size: int
    align: str
    flops: float
    worth: float
    speedup: Interval

    @property
    def realised(self) -> float:
        """Speed-up ÷ factor by which the FLOPs fell."""
        return self.speedup.value * self.flops


RESULT = common.ResultFile("alignment", Row)


def kept_score(plan: Plan, scores: dict[str, torch.Tensor]) -> float:
    """The sum of the scores of what stays; widths, whose worth depends on their heads', are counted like units."""
    return sum(float(scores[name][list(kept)].sum()) for name, kept in plan.kept.items())


def run(model: str, given: argparse.Namespace, size: int) -> list[Row]:
    """All alignments of one network at one batch size."""
    network, calibration = load(model, given.data_root, given.samples)
    space = analyze(network)
    dense, scores = scored(network, space, calibration.batches)
    target = Target(given.runtime, size, given.threads)
    step_sizes = find_step_sizes(space.structure, measure_latency_model(network, space.structure, target).costs)
    budget = [Budget(space.costs, FLOPS)]
    plans = {str(step): search_all(space.structure, scores, budget, step) for step in STEPS}
    plans["auto"] = search_all(space.structure, scores, budget, 8, step_sizes)
    with TemporaryDirectory(prefix="optin-benchmark-") as name:
        files = {"dense": write_network(dense, dense.module, target, Path(name, "dense"))}
        for align, plan in plans.items():
            small = slice_network(dense.module, space.structure, plan)
            files[align] = write_network(dense, small, target, Path(name, align))
        sample = {n: t[:1].numpy() for n, t in dense.inputs.items()}
        pairs = [("dense", align) for align in plans]
        samples = measure_files(files, sample, target.case(given.seconds, files.values()), pairs).samples_ms
    best = kept_score(plans["1"], scores)
    return [
        Row(model, given.runtime, size, align, space.costs.of(plan) / space.costs.total,
            kept_score(plan, scores) / best, ratio_interval(samples["dense"], samples[align]))
        for align, plan in plans.items()
    ]  # fmt: skip


def table(rows: list[Row]) -> Table:
    """By network and batch size."""
    heading = ("Network", "Runtime", "batch", "align", "FLOPs", "worth kept", "speed-up", "realised")
    lines = [
        (row.model, row.runtime, str(row.batch_size), row.align, f"{row.flops:.3f}", f"{row.worth:.4f}",
         common.interval(row.speedup, "×"), f"{row.realised:.2f}")
        for row in rows
    ]  # fmt: skip
    return common.terminal_table(heading, lines)


def main() -> None:
    """Measure, write, print."""
    arguments = common.speed_parser(
        __doc__ or "", models="deit_small,minilm", batch_sizes="1,8", seconds=60.0, samples=None
    )
    arguments.add_argument("--runtime", default="ort-cpu")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    if not given.table:
        rows = [row for model in given.models.split(",") for size in given.batch_sizes.split(",")
                for row in run(model, given, int(size))]  # fmt: skip
        RESULT.write(rows, flops=FLOPS, threads=given.threads, seconds_per_case=given.seconds)
    Console(width=120).print(table(RESULT.read()))


if __name__ == "__main__":
    main()
