"""Accuracy of real networks, dense and pruned, over budgets: the README's table.

    python benchmarks/accuracy.py --data-root ../shared/data --flops 0.75,0.6,0.5

Cases whose data is absent are skipped with a line. Nothing is trained, and no label is used except to evaluate.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any

import common
import saliency
import torch
from rich.console import Console
from rich.table import Table

from optin_deploy import Network, load_calibration, load_network
from optin_deploy.calibration import image_files, read_images
from optin_deploy.costs import count_flops
from optin_deploy.evaluation import load_dataset
from optin_deploy.pruning import examine, remove
from optin_deploy.scoring import score
from optin_deploy.search import search


@dataclass(frozen=True)
class Case:
    """One network, its calibration data, and ``measure``: a module in the network's place -> figures by name."""

    name: str
    network: Network
    batches: tuple[dict[str, torch.Tensor], ...]
    measure: Callable[[torch.nn.Module], dict[str, float]]


def stsb(data: Path) -> Case:
    """all-MiniLM-L6-v2 on STS-B dev, calibrated on unlabelled STS-B train sentences."""
    network = load_network(common.minilm_directory())
    return _text_case("MiniLM, STS-B dev", network, data / "stsb" / "train.csv", "1,2", data / "stsb" / "dev.csv")


def sst2(data: Path) -> Case:
    """MiniLM fine-tuned on SST-2, on its dev set, calibrated on unlabelled SST-2 train sentences."""
    network = load_network(str(data / "minilm_sst2"))
    return _text_case("minilm_sst2, SST-2 dev", network, data / "sst2" / "train.tsv", "1", data / "sst2" / "dev.tsv")


def _text_case(name: str, network: Network, calibration: Path, column: str, evaluation: Path) -> Case:
    dataset = load_dataset(network, evaluation)
    batches = load_calibration(network, calibration, column=column).batches
    return Case(name, network, batches, lambda m: {dataset.metric: dataset.measure(m, lambda _: None)})


def saliency_maps(data: Path) -> Case:
    """ViT-S/14 with a saliency decoder; calibrated on 64 photographs, judged on 48 others by its own dense maps."""
    network = saliency.saliency_network(data)
    calibration = load_calibration(network, data / "photos")
    used = set(calibration_files(data / "photos", calibration.samples))
    others = [f for f in image_files(data / "photos") if f not in used][:48]
    judged = [network.preprocessing(read_images(others[i : i + 16])) for i in range(0, 48, 16)]

    def measure(module: torch.nn.Module) -> dict[str, float]:
        correlation, difference = saliency.map_agreement(network.module, module, judged)
        return {"correlation": correlation, "mean abs. difference": difference}

    return Case("vit_small_saliency", network, calibration.batches, measure)


def calibration_files(folder: Path, samples: int, seed: int = 0) -> list[Path]:
    """The pictures that ``load_calibration`` draws for this seed."""
    files = image_files(folder)
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed)).tolist()
    return [files[i] for i in order[:samples]]


CASES: dict[str, tuple[Callable[[Path], Case], str]] = {
    "stsb": (stsb, "stsb"),
    "sst2": (sst2, "minilm_sst2"),
    "saliency": (saliency_maps, "vit_small_saliency"),
}


def run(case: Case, budgets: list[float]) -> list[dict[str, Any]]:
    """Score once, then search, slice, repair and measure for every budget."""
    start = perf_counter()
    anatomy = examine(case.network)
    scores = score(case.network, anatomy.structure, case.batches)
    scored = perf_counter() - start
    rows = [{"case": case.name, "flops": 1.0, "repair": "-", **case.measure(case.network.module)}]
    for budget in budgets:
        plan = search(anatomy.structure, scores, anatomy.costs, budget, align=64)
        for ridge in (None, 0.1):
            start = perf_counter()
            small = remove(case.network, anatomy.structure, plan, case.batches, ridge)
            repaired = perf_counter() - start
            flops = count_flops(small, case.network.inputs) / anatomy.costs.total
            kept = [len(plan.kept[g.name]) for g in anatomy.structure.groups]
            figures = case.measure(small)
            rows.append(
                {
                    "case": case.name,
                    "flops": flops,
                    "repair": "ridge" if ridge else "none",
                    **figures,
                    "score_seconds": scored,
                    "repair_seconds": repaired if ridge else 0.0,
                    "kept": kept,
                }
            )
            print(f"{case.name}: {flops:.3f} of the FLOPs, repair {rows[-1]['repair']}: {figures}", flush=True)
    return rows


def main() -> None:
    """Run the cases whose data is there, print the table, write the JSON."""
    arguments = common.parser(__doc__ or "")
    arguments.add_argument("--flops", default="0.75,0.6,0.5", help="budgets, comma-separated")
    arguments.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    rows: list[dict[str, Any]] = []
    for name in given.cases.split(","):
        build, needed = CASES[name]
        if not (given.data_root / needed).exists():
            print(f"{name}: skipped, {given.data_root / needed} is absent")
            continue
        measured = run(build(given.data_root), [float(f) for f in given.flops.split(",")])
        print(f"written to {common.write_results(f'accuracy-{name}', measured)}")
        rows += measured
    table = Table("case", "FLOPs kept", "repair", "figures")
    for row in rows:
        named = {k: v for k, v in row.items() if isinstance(v, float) and k != "flops" and not k.endswith("seconds")}
        figures = ", ".join(f"{k} {v:.3f}" if v < 2 else f"{k} {v:.2f}" for k, v in named.items())
        table.add_row(row["case"], f"{row['flops']:.3f}", row["repair"], figures)
    Console(width=110).print(table)


if __name__ == "__main__":
    main()
