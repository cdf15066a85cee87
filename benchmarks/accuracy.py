"""Accuracy of real networks, dense and pruned, by every criterion and rival, over budgets and seeds.

    python benchmarks/accuracy.py --cases stsb,sst2 --methods trajectory-obs,trajectory --flops 0.6,0.5 --seeds 0,1,2

Rows are kept in ``results/DEVICE/accuracy-CASE.json`` one by one (``accuracy-CASE-N.json`` with ``--samples N``
calibration samples in place of the default), and a run goes on where an earlier one has stopped. ``--compensated``
leaves out what is not compensated; ``--table`` only prints what is there. Cases whose data is absent are skipped with
a line. Nothing is trained; labels are used to evaluate, and by Fisher scores.
"""

from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import common
import matplotlib
import torch
from cases import CASES, Case
from methods import METHODS, Outcome
from rich.console import Console
from rich.table import Table

from optin_deploy.nn.flops import count_flops

matplotlib.use("Agg")
import matplotlib.pyplot as plt

Row = dict[str, Any]
# Figures of which less is better.
_LESS_IS_BETTER = ("KL", "difference")


def result_name(case: str, samples: int | None) -> str:
    """What the rows of a case are kept under."""
    return f"accuracy-{case}" if samples is None else f"accuracy-{case}-{samples}"


def result_of(name: str) -> common.ResultFile[Row]:
    """The file of the rows that `result_name` names."""
    return common.ResultFile(name, Row)


def run(
    name: str,
    data: Path,
    methods: list[str],
    budgets: list[float],
    seeds: list[int],
    samples: int | None,
    *,
    compensated: bool = False,
) -> None:
    """Measure what is missing of a case; if ``compensated``, nothing without compensation."""
    kept = result_name(name, samples)
    rows = result_of(kept).read()
    for seed in seeds:
        missing = {m: [b for b in budgets if (m, b, seed) not in _done(rows)] for m in methods}
        if not any(missing.values()):
            continue
        case = CASES[name][0](data, seed, samples)
        total = count_flops(case.network.module, case.network.inputs)
        if not any(row["method"] == "dense" and row["seed"] == seed for row in rows):
            rows.append({"method": "dense", "name": "dense", "repair": "-", "budget": 1.0, "flops": 1.0, "seed": seed,
                         "figures": case.measure(case.network.module)})  # fmt: skip
        for method, wanted in missing.items():
            for outcome in METHODS[method](case, wanted, seed) if wanted else ():
                if compensated and outcome.repair == "none":
                    continue
                rows.append({"method": method, "seed": seed, **_measured(case, outcome, total)})
                result_of(kept).write(rows)
                print(f"{name} seed {seed}: {_line(rows[-1])}", flush=True)


def _done(rows: list[Row]) -> set[tuple[str, float, int]]:
    return {(row["method"], row["budget"], row["seed"]) for row in rows}


def _measured(case: Case, outcome: Outcome, total: int) -> Row:
    row: Row = {"name": outcome.method, "repair": outcome.repair, "budget": outcome.budget, "seconds": outcome.seconds}
    if outcome.module is None or outcome.plan is None:
        return {**row, "flops": None, "figures": None, "reason": outcome.reason}
    kept = {name: len(units) for name, units in outcome.plan.kept.items()}
    flops = count_flops(outcome.module, case.network.inputs) / total
    return {**row, "flops": flops, "figures": case.measure(outcome.module), "kept": kept}


def _line(row: Row) -> str:
    figures = row["figures"]
    told = ", ".join(f"{n} {v:.4g}" for n, v in figures.items()) if figures else row["reason"]
    return f"{row['name']}, compensation {row['repair']}, {row['budget']}: {told} ({row['seconds']:.0f} s)"


def summary(rows: list[Row], figure: str) -> dict[tuple[str, str], dict[float, tuple[float, float, int]]]:
    """(name, compensation) -> budget -> mean, standard deviation and number of seeds of one figure."""
    values: dict[tuple[str, str], dict[float, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if row["figures"]:
            values[row["name"], row["repair"]][row["budget"]].append(row["figures"][figure])
    return {
        key: {b: (mean(v), stdev(v) if len(v) > 1 else 0.0, len(v)) for b, v in of_budget.items()}
        for key, of_budget in values.items()
    }


def table(case: str, rows: list[Row], figure: str) -> Table:
    """Mean over seeds of one figure by method and budget, the best of each budget in bold."""
    found = summary(rows, figure)
    budgets = sorted({b for of_budget in found.values() for b in of_budget if b < 1}, reverse=True)
    dense = next(iter(found.get(("dense", "-"), {1.0: (float("nan"), 0.0, 0)}).values()))[0]
    made = Table("method", "compensation", *(f"{b:g}" for b in budgets), title=f"{case}: {figure}, dense {dense:.4g}")
    sign = -1 if any(word in figure for word in _LESS_IS_BETTER) else 1
    best = {b: max(sign * v[b][0] for k, v in found.items() if b in v and k[0] != "dense") for b in budgets}
    for (name, repair), of_budget in found.items():
        if name == "dense":
            continue
        cells = []
        for b in budgets:
            if b not in of_budget:
                cells.append("-")
                continue
            value, spread, seeds = of_budget[b]
            told = f"{value:.4g}" + (f" ± {spread:.2g}" if seeds > 1 else "")
            cells.append(f"[bold]{told}[/bold]" if sign * value >= best[b] else told)
        made.add_row(name, repair, *cells)
    return made


def plot(case: str, rows: list[Row]) -> Path:
    """Headline figure over FLOPs, one line per method with its compensation; an SVG beside the JSON."""
    figure = next(iter(next(row["figures"] for row in rows if row["figures"])))
    found = summary(rows, figure)
    drawing, axes = plt.subplots(figsize=(6.4, 4.0))
    for (name, repair), of_budget in found.items():
        if name == "dense":
            axes.axhline(next(iter(of_budget.values()))[0], color="0.6", linestyle=":", label="dense")
        elif repair != "none" or name == "trajectory":
            points = sorted((b, v[0]) for b, v in of_budget.items())
            label = name if repair != "none" else f"{name} (OPTIN), no compensation"
            wide = 2.4 if name == "trajectory-obs" else 1.2
            axes.plot(*zip(*points, strict=True), marker="o", markersize=3, linewidth=wide, label=label)
    axes.set(xlabel="part of the FLOPs kept", ylabel=figure, title=case)
    axes.legend(fontsize=7)
    path = result_of(case).path.with_suffix(".svg")
    drawing.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(drawing)
    return path


def main() -> None:
    """Run the cases whose data is there, print the tables, draw the plots."""
    arguments = common.parser(__doc__ or "")
    arguments.add_argument("--flops", default="0.8,0.7,0.6,0.5,0.4", help="budgets, comma-separated")
    arguments.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    arguments.add_argument("--methods", default=",".join(METHODS), help="comma-separated")
    arguments.add_argument("--seeds", default="0,1,2", help="comma-separated")
    arguments.add_argument("--samples", type=int, help="calibration samples, in place of the defaults")
    arguments.add_argument("--compensated", action="store_true", help="measure nothing without compensation")
    arguments.add_argument("--table", action="store_true", help="only print and draw what was measured")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    budgets, seeds = ([kind(v) for v in text.split(",")] for kind, text in ((float, given.flops), (int, given.seeds)))
    for name in given.cases.split(","):
        needed = given.data_root / CASES[name][1]
        if not given.table and not needed.exists():
            print(f"{name}: skipped, {needed} is absent")
        elif not given.table:
            methods, numbers = given.methods.split(","), [int(s) for s in seeds]
            run(name, given.data_root, methods, budgets, numbers, given.samples, compensated=given.compensated)
        kept = result_name(name, given.samples)
        rows = result_of(kept).read()
        if not rows:
            continue
        for figure in next(row["figures"] for row in rows if row["figures"]):
            if "standard error" not in figure:
                Console(width=150).print(table(name, rows, figure))
        print(f"rows in {result_of(kept).path}, plot in {plot(kept, rows)}")


if __name__ == "__main__":
    main()
