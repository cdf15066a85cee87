"""Dense against dense: how often the 95 % interval of a ratio that is 1 contains 1.

    python benchmarks/noise.py --runs 20

Each run loads the ONNX file of deit_tiny twice in a new process and measures the two against each other, as every run
of ``prune-export`` does. With intervals that say what they promise, 19 of 20 contain 1 on average. Writes
``results/DEVICE/noise.json``; ``--table`` only prints what is there.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common
import torch
from realised_ratio import export, load
from rich.console import Console
from rich.table import Table

from profilers.isolated import Case, loads_for, measure_files
from profilers.stats import Interval, ratio_interval

MODEL, RUNTIME = "deit_tiny", "ort-cpu"
NAMES = ("dense", "dense again")


@dataclass(frozen=True)
class Run:
    """One process: dense ÷ dense again with its interval, rounds made, and whether it had settled."""

    batch_size: int
    ratio: Interval
    rounds: int
    converged: bool


RESULT = common.ResultFile("noise", Run)


def run(file: Path, sample: dict[str, Any], case: Case) -> Run:
    """Measure ``file`` against itself, until the ratio has settled or time is up, in a new process."""
    case = replace(case, loads=loads_for(RUNTIME, [file] * len(NAMES)))
    result = measure_files(dict.fromkeys(NAMES, file), sample, case, [NAMES])
    first, second = (result.samples_ms[name] for name in NAMES)
    return Run(case.batch_size, ratio_interval(first, second), len(first), result.converged)


def table(runs: list[Run]) -> Table:
    """By batch size: how many intervals contain 1, how wide they are, how far off 1 the ratios are."""
    lines = []
    for size in sorted({r.batch_size for r in runs}):
        own = [r for r in runs if r.batch_size == size]
        hits = sum(r.ratio.contains(1.0) for r in own)
        width = sorted(r.ratio.high - r.ratio.low for r in own)[len(own) // 2]
        furthest = max(abs(r.ratio.value - 1) for r in own)
        rounds = f"{min(r.rounds for r in own)}–{max(r.rounds for r in own)}"
        lines.append((str(size), str(len(own)), f"{hits} of {len(own)}", f"{width:.3f}", f"{furthest:.3f}", rounds))
    heading = ("batch", "runs", "contain 1", "median width", "largest |ratio − 1|", "rounds")
    return common.terminal_table(heading, lines, f"{MODEL}, {RUNTIME}: dense ÷ dense")


def main() -> None:
    """Measure, write, print."""
    arguments = common.speed_parser(__doc__ or "", batch_sizes="1,8", seconds=10.0)
    arguments.add_argument("--runs", type=int, default=20, help="processes for each batch size")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    if not given.table:
        measure(given.data_root, given.runs, [int(s) for s in given.batch_sizes.split(",")], given.threads,
                given.seconds)  # fmt: skip
    Console(width=120).print(table(RESULT.read()))


def measure(data: Path, count: int, sizes: list[int], threads: int, seconds: float) -> None:
    """``count`` runs of each batch size, written when all are done."""
    network, calibration = load(MODEL, data, 8)
    sample = {name: tensor[:1].numpy() for name, tensor in network.inputs.items()}
    runs = []
    with TemporaryDirectory(prefix="optin-benchmark-") as folder:
        export(network, Path(folder, "dense"), calibration.held_out)
        for number in range(count):
            for size in sizes:
                case = Case(RUNTIME, size, threads, seconds, seed=number)
                runs.append(run(Path(folder, "dense.onnx"), sample, case))
                print(f"run {number}, batch {size}: {common.interval(runs[-1].ratio, digits=3)}", flush=True)
    print(f"written to {RESULT.write(runs, model=MODEL, runtime=RUNTIME, threads=threads, seconds=seconds)}")


if __name__ == "__main__":
    main()
