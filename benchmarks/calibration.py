"""How much calibration data, how diverse, of which domain: the default method at one budget, over all of these.

    python benchmarks/calibration.py --cases sst2,stsb,saliency --flops 0.5 --seeds 0,1,2

Writes ``results/DEVICE/calibration.json`` row by row and goes on where an earlier run has stopped; ``--table`` only
prints what is there. The defaults of ``--calibration-samples`` come from here.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any

import common
import torch
from accuracy import result_file
from cases import CASES, Batch, Case
from rich.console import Console
from rich.table import Table

from optin_deploy import load_calibration, prune

SAMPLES = {"sst2": (32, 64, 128, 256, 512, 1024, 2048), "stsb": (32, 64, 128, 256, 512, 1024, 2048),
           "saliency": (16, 32, 64, 128, 186)}  # fmt: skip
Row = dict[str, Any]


def variants(name: str, data: Path, seed: int) -> Iterator[tuple[str, Case]]:
    """Names of calibration sets, and the case calibrated on each."""
    build = CASES[name][0]
    for samples in SAMPLES[name]:
        yield f"{samples} samples", build(data, seed, samples)
    case = build(data, seed, 512)
    if name == "sst2":
        whole = build(data, seed, 2048)
        yield "512 samples of one class", replace(whole, batches=_of_class(whole, 1, 512))
        yield "512 samples, STS-B sentences", _elsewhere(case, data / "stsb" / "train.csv", "1,2", seed)
    if name == "stsb":
        yield "512 samples, SST-2 sentences", _elsewhere(case, data / "sst2" / "train.tsv", "1", seed)
    if name == "saliency":
        # The built-in crops of one photograph, and noise.
        yield "128 built-in pictures", _elsewhere(case, None, None, seed)
    else:
        yield "built-in sentences", _elsewhere(case, None, None, seed)


def _elsewhere(case: Case, path: Path | None, column: str | None, seed: int) -> Case:
    samples = 128 if case.name == "saliency" else 512
    return replace(
        case, batches=load_calibration(case.network, path, column=column, samples=samples, seed=seed).batches
    )


def _of_class(case: Case, wanted: int, samples: int) -> Sequence[Batch]:
    """The first ``samples`` of one class, batch by batch."""
    assert case.labels is not None
    batches, left = [], samples
    for batch, labels in zip(case.batches, case.labels, strict=True):
        rows = (labels == wanted).nonzero()[:left, 0]
        left -= len(rows)
        if len(rows):
            batches.append({name: t[rows] for name, t in batch.items()})
    return batches


def main() -> None:
    """Measure what is missing, print the table."""
    arguments = common.parser(__doc__ or "")
    arguments.add_argument("--flops", type=float, default=0.5)
    arguments.add_argument("--cases", default=",".join(SAMPLES), help="comma-separated")
    arguments.add_argument("--seeds", default="0,1,2", help="comma-separated")
    arguments.add_argument("--table", action="store_true", help="only print what was measured")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    path = result_file("x").with_name("calibration.json")
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["figures"] if path.is_file() else []
    for name in given.cases.split(",") if not given.table else ():
        for seed in (int(s) for s in given.seeds.split(",")):
            for told, case in variants(name, given.data_root, seed):
                key = {"case": name, "calibration": told, "seed": seed, "flops": given.flops}
                if any(key.items() <= row.items() for row in rows):
                    continue
                start = perf_counter()
                pruned = prune(case.network, case.batches, given.flops)
                seconds = perf_counter() - start
                rows.append({**key, "seconds": seconds, "figures": case.measure(pruned.network.module)})
                print(rows[-1], flush=True)
                common.write_results("calibration", rows)
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
