"""How much calibration data, how diverse, of which domain: the default method at one budget, over all of these.

    python benchmarks/calibration.py --cases sst2,stsb,saliency --flops 0.5 --seeds 0,1,2

Writes ``results/DEVICE/calibration.json`` row by row and goes on where an earlier run has stopped; ``--table`` only
prints what is there. The defaults of ``--calibration-samples`` come from here.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import common
import torch
from cases import CASES, Batch, Case
from rich.console import Console
from rich.table import Table

from optin_deploy import load_calibration, prune

SAMPLES = {"sst2": (32, 64, 128, 256, 512, 1024, 2048), "stsb": (32, 64, 128, 256, 512, 1024, 2048),
           "saliency": (16, 32, 64, 128, 186)}  # fmt: skip
# As many sentences are compared by class and domain, and as many photographs.
_SENTENCES, _PHOTOGRAPHS = 512, 128
# Where a case's own samples are below the data folder, and in which columns.
_OWN = {"sst2": ("sst2/train.tsv", "1"), "stsb": ("stsb/train.csv", "1,2")}
_ELSEWHERE = {"sst2": ("STS-B sentences", *_OWN["stsb"]), "stsb": ("SST-2 sentences", *_OWN["sst2"])}
Row = dict[str, Any]
RESULT = common.ResultFile("calibration", Row)


def variants(name: str, data: Path, seed: int, most: int) -> Iterator[tuple[str, Callable[[], Case]]]:
    """Names of calibration sets of at most ``most`` samples, and what makes the case calibrated on each.

    All of a seed are judged on the same samples, which none of them calibrates on: those that the largest set leaves.
    """
    build = CASES[name][0]
    if name == "saliency":
        # Its own photographs are few, and judged on others by the case itself.
        for samples in SAMPLES[name]:
            yield f"{samples} samples", partial(build, data, seed, samples)
        own = build(data, seed, _PHOTOGRAPHS)
        yield f"{_PHOTOGRAPHS} built-in pictures", partial(_elsewhere, own, None, None, seed, _PHOTOGRAPHS)
        return
    largest = build(data, seed, max(SAMPLES[name]))
    path, column = _OWN[name]
    for samples in SAMPLES[name]:
        if samples <= most:
            yield f"{samples} samples", partial(_elsewhere, largest, data / path, column, seed, samples)
    if name == "sst2":
        yield f"{_SENTENCES} samples of one class", partial(_of_class, largest, 1, _SENTENCES)
    told, path, column = _ELSEWHERE[name]
    yield f"{_SENTENCES} samples, {told}", partial(_elsewhere, largest, data / path, column, seed, _SENTENCES)
    yield "built-in sentences", partial(_elsewhere, largest, None, None, seed, _SENTENCES)


def _elsewhere(case: Case, path: Path | None, column: str | None, seed: int, samples: int) -> Case:
    drawn = load_calibration(case.network, path, column=column, samples=samples, seed=seed)
    return replace(case, batches=drawn.batches, labels=None)


def _of_class(case: Case, wanted: int, samples: int) -> Case:
    """The case calibrated on the first ``samples`` of one class, batch by batch."""
    assert case.labels is not None
    batches: list[Batch] = []
    left = samples
    for batch, labels in zip(case.batches, case.labels, strict=True):
        rows = (labels == wanted).nonzero()[:left, 0]
        left -= len(rows)
        if len(rows):
            batches.append({name: t[rows] for name, t in batch.items()})
    return replace(case, batches=batches, labels=None)


def main() -> None:
    """Measure what is missing, print the table."""
    arguments = common.parser(__doc__ or "")
    arguments.add_argument("--flops", type=float, default=0.5)
    arguments.add_argument("--cases", default=",".join(SAMPLES), help="comma-separated")
    arguments.add_argument("--seeds", default="0,1,2", help="comma-separated")
    arguments.add_argument("--most", type=int, default=2048, help="sets of more samples are left out")
    arguments.add_argument("--table", action="store_true", help="only print what was measured")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    rows = RESULT.read()
    for name in given.cases.split(",") if not given.table else ():
        for seed in (int(s) for s in given.seeds.split(",")):
            for told, make in variants(name, given.data_root, seed, given.most):
                key = {"case": name, "calibration": told, "seed": seed, "flops": given.flops}
                if any(key.items() <= row.items() for row in rows):
                    continue
                case = make()
                start = perf_counter()
                pruned = prune(case.network, case.batches, given.flops)
                seconds = perf_counter() - start
                rows.append({**key, "seconds": seconds, "figures": case.measure(pruned.network.module)})
                print(rows[-1], flush=True)
                RESULT.write(rows)
    Console(width=150).print(table(rows))


def table(rows: list[Row]) -> Table:
    """Mean of every figure over seeds."""
    made = Table("case", "calibration", "seeds", "figures", "seconds")
    for case, told in dict.fromkeys((row["case"], row["calibration"]) for row in rows):
        same = [row for row in rows if (row["case"], row["calibration"]) == (case, told)]
        names = [n for n in same[0]["figures"] if "standard error" not in n]
        figures = ", ".join(f"{n} {mean(row['figures'][n] for row in same):.4g}" for n in names)
        made.add_row(case, told, str(len(same)), figures, f"{mean(row['seconds'] for row in same):.0f}")
    return made


if __name__ == "__main__":
    main()
