"""Whether latency budgets are met: measured ÷ asked for, and the error of the tables' predictions.

    python benchmarks/latency_budget.py --data-root ../shared/data

For every network and batch size tables are measured (or read from the cache), then every budget is met as
``prune-export --latency`` does it. A measurement of its own judges the result: dense, dense again and pruned take turns
in a new process. A budget is met when the measured latency is at most 3 % off what was asked for, and not above it by
more than the dense network differs from itself (A/A).

Rows are kept in ``results/DEVICE/latency-budget.json``, one by one; those of a network, batch size and budget are
replaced when they are measured again. ``--table`` only prints what is there, ``--markdown`` prints it for the README.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import common
import torch
from realised_ratio import load
from rich.console import Console
from rich.table import Table

from optin_deploy import Network
from optin_deploy.criteria.scoring import Scoring, score
from optin_deploy.latency.budget import LatencySearch, solve_latency_budget
from optin_deploy.latency.tables import LatencyModel, measure_latency_model
from optin_deploy.latency.target import Target, write_network
from optin_deploy.nn.batches import Batches
from optin_deploy.pruning.head_rotation import rotate_heads_to_pca
from optin_deploy.pruning.space import PruningSpace, analyze
from optin_deploy.structure.slicing import slice_network
from profilers import measure_files
from profilers.stats import Interval, ratio_interval

CLOSE = 0.03


@dataclass(frozen=True)
class Row:
    """One budget.

    Attributes:
        asked: part of the dense latency.
        measured: part of the dense latency that the result takes, with its 95 % interval, in a run of its own.
        noise: dense ÷ dense again in that run.
        errors: predicted ÷ measured, less 1, of every network built on the way by the search that led to the result.
        flops: part of the dense FLOPs that the result has.
        seconds: spent on searching, building and measuring, the tables left out.
        table_seconds: spent on the tables, shared by the budgets of this network and batch size.
    """

    model: str
    runtime: str
    batch_size: int
    asked: float
    measured: Interval
    noise: Interval
    errors: list[float]
    flops: float
    seconds: float
    table_seconds: float

    @property
    def relative(self) -> float:
        """Measured ÷ asked for."""
        return self.measured.value / self.asked

    @property
    def allowance(self) -> float:
        """How far above 1 `relative` may be: as far as the dense network's A/A interval reaches from 1."""
        return max(abs(self.noise.low - 1), abs(self.noise.high - 1))

    @property
    def close(self) -> bool:
        """Within 3 % of what was asked for."""
        return abs(self.relative - 1) <= CLOSE

    @property
    def held(self) -> bool:
        """Not above what was asked for by more than the noise."""
        return self.relative <= 1 + self.allowance


def _order(row: Row) -> tuple[str, str, int, float]:
    return row.model, row.runtime, row.batch_size, -row.asked


RESULT = common.ResultFile("latency-budget", Row, key=_order)


def scored(network: Network, space: PruningSpace, batches: Batches) -> tuple[Network, dict[str, torch.Tensor]]:
    """The network in its principal bases, and the default criterion's scores."""
    turned = rotate_heads_to_pca(network, space.structure, batches)
    return turned, score(turned, space.structure, space.costs, batches, Scoring())


def run(
    model: str, dense: Network, space: PruningSpace, scores: dict[str, torch.Tensor], measured: LatencyModel,
    target: Target, asked: float, seconds: float, table_seconds: float,
) -> Row:  # fmt: skip
    """Meet one budget and judge what came of it."""
    start = perf_counter()
    met = solve_latency_budget(LatencySearch(dense, space.structure, scores, measured, space.costs, asked))
    spent = perf_counter() - start
    with TemporaryDirectory(prefix="optin-benchmark-") as folder:
        small = slice_network(dense.module, space.structure, met.plan)
        file = write_network(dense, dense.module, target, Path(folder, "dense"))
        files = {"dense": file, "dense again": file, "pruned": write_network(dense, small, target, Path(folder, "p"))}
        sample = {n: t[:1].numpy() for n, t in dense.inputs.items()}
        pairs = [("dense", "pruned"), ("dense", "dense again")]
        samples = measure_files(files, sample, target.case(seconds, files.values()), pairs).samples_ms
    return Row(
        model=model,
        runtime=target.runtime,
        batch_size=target.batch_size,
        asked=asked,
        measured=ratio_interval(samples["pruned"], samples["dense"]),
        noise=ratio_interval(samples["dense"], samples["dense again"]),
        errors=[i.error for i in met.iterations if i.objective == met.iterations[met.taken].objective],
        flops=space.costs.of(met.plan) / space.costs.total,
        seconds=spent,
        table_seconds=table_seconds,
    )


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heading and one line per budget."""
    heading = ["Network", "Runtime", "batch", "asked for", "measured", "÷ asked", "noise", "FLOPs", "prediction errors"]
    lines = [
        [
            row.model, row.runtime, str(row.batch_size), f"{row.asked:g}",
            common.interval(row.measured, digits=3),
            f"{row.relative:.3f}{'' if row.close and row.held else ' (missed)'}", f"±{row.allowance:.1%}",
            f"{row.flops:.3f}", ", ".join(f"{error:+.1%}" for error in row.errors),
        ]
        for row in rows
    ]  # fmt: skip
    return heading, lines


def markdown(rows: Sequence[Row]) -> str:
    """The table for the README: measured latencies by what was asked for, and the first and last prediction's error."""
    budgets = sorted({row.asked for row in rows}, reverse=True)
    heading = ["Network", "Runtime", "batch", *(f"`--latency {asked:g}`" for asked in budgets)]
    lines = []
    for case in dict.fromkeys((row.model, row.runtime, row.batch_size) for row in rows):
        found = {row.asked: row for row in rows if (row.model, row.runtime, row.batch_size) == case}
        told = [
            f"{common.interval(row.measured, digits=3)}, {_first_and_last(row.errors)}" if row else "–"
            for row in (found.get(asked) for asked in budgets)
        ]
        lines.append([case[0], case[1], str(case[2]), *told])
    return common.markdown_table(heading, lines)


def _first_and_last(errors: Sequence[float]) -> str:
    told = errors if len(errors) == 1 else (errors[0], errors[-1])
    return " → ".join(f"{100 * error:+.1f} %".replace("-", "−") for error in told)


def table(rows: Sequence[Row]) -> Table:
    """The table for the terminal, with the counts of what was met."""
    heading, lines = cells(rows)
    close, held = sum(r.close for r in rows), sum(r.held for r in rows)
    title = f"{close} of {len(rows)} within {CLOSE:.0%} of the budget, {held} not above it"
    return common.terminal_table(heading, lines, title)


def measure(given: argparse.Namespace) -> None:
    """All cases, each row written as it comes."""
    for model in given.models.split(","):
        network, calibration = load(model, given.data_root, given.samples)
        space = analyze(network)
        dense, scores = scored(network, space, calibration.batches)
        for size in (int(s) for s in given.batch_sizes.split(",")):
            target = Target(given.runtime, size, given.threads)
            start = perf_counter()
            measured = measure_latency_model(network, space.structure, target)
            table_seconds = perf_counter() - start
            print(f"{model}, batch {size}: tables in {table_seconds:.0f} s, dense {measured.costs.total:.4g} ms, floor "
                  f"{measured.costs.floor:.4g} ms", flush=True)  # fmt: skip
            for asked in (float(f) for f in given.latency.split(",")):
                row = run(model, dense, space, scores, measured, target, asked, given.seconds, table_seconds)
                rows = sorted(RESULT.merge(RESULT.read(), [row]), key=_order)
                RESULT.write(rows, threads=given.threads, seconds_per_case=given.seconds)
                print(" | ".join(cells([row])[1][0]) + f" | {row.seconds:.0f} s", flush=True)


def main() -> None:
    """Measure what is asked for, print the table."""
    arguments = common.speed_parser(
        __doc__ or "", models="deit_small,deit_tiny,minilm", batch_sizes="1,8", seconds=30.0, samples=None
    )
    arguments.add_argument("--runtime", default="ort-cpu")
    arguments.add_argument("--latency", default="0.8,0.65,0.5", help="parts of the dense latency, comma-separated")
    arguments.add_argument("--markdown", action="store_true", help="only print what was measured, for the README")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    if not (given.table or given.markdown):
        measure(given)
    if given.markdown:
        print(markdown(RESULT.read()))
    else:
        Console(width=150).print(table(RESULT.read()))


if __name__ == "__main__":
    main()
