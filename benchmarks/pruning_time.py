"""How long scores, search and compensation take at half of the FLOPs with the default settings, and how much memory.

    python benchmarks/pruning_time.py --data-root ../shared/data

Every network is pruned in processes of its own, MiniLM on sentences, deit_small on photographs: one is timed; in the
other, which that makes slower, what is freed goes back to the system at once, or peaks would count it. Memory is that
of the weights and the peak of what is resident beyond the loaded network and calibration data, relative to the same of
inference on the largest calibration batch. Linux only. Writes ``results/DEVICE/pruning-time.json``.
"""

import argparse
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter
from typing import Any

import common
import torch

from optin_deploy import load_calibration, load_network
from optin_deploy.criteria.scoring import score
from optin_deploy.pruning.head_rotation import rotate_heads_to_pca
from optin_deploy.pruning.removal import Remover
from optin_deploy.pruning.space import analyze
from optin_deploy.search.knapsack import search

FLOPS = 0.5
# glibc reads these when a process starts: what is freed goes back to the system at once.
_GIVES_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}


@dataclass(frozen=True)
class Step:
    """One step: its duration, and the peak of its memory beyond what was resident before the first."""

    name: str
    seconds: float
    peak_mib: float


def resident_mib(field: str) -> float:
    """``VmRSS``, what is resident now, or ``VmHWM``, its peak since `forget_peak`."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def forget_peak() -> None:
    """Let ``VmHWM`` start again."""
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")


def run(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Prune one network once."""
    torch.set_num_threads(given.threads)
    sentences = {"path": given.data_root / "stsb" / "train.csv", "column": "1,2"}
    own: dict[str, Any] = sentences if name == "MiniLM" else {"path": given.data_root / "photos"}
    weights = "pretrained" if name == "MiniLM" else "random"
    network = load_network(common.minilm_directory() if name == "MiniLM" else name, weights=weights)
    calibration = load_calibration(network, **own)
    space, batches = analyze(network), calibration.batches
    structure, before = space.structure, resident_mib("VmRSS")
    steps: list[Step] = []

    def step(what: str, work: Callable[[], Any]) -> Any:
        forget_peak()
        start = perf_counter()
        result = work()
        steps.append(Step(what, perf_counter() - start, resident_mib("VmHWM") - before))
        return result

    with torch.inference_mode():
        step(
            "inference", lambda: network.forward(max(batches, key=lambda batch: max(map(torch.numel, batch.values()))))
        )
    dense = step("turn", lambda: rotate_heads_to_pca(network, structure, batches))
    scores = step("score", lambda: score(dense, structure, space.costs, batches))
    plan = step("search", lambda: search(structure, scores, space.costs, FLOPS, align=64))
    step("repair", lambda: Remover(dense, space, batches, "auto").remove(plan))
    return {
        "network": name,
        "samples": calibration.samples,
        "threads": given.threads,
        "weights_mib": sum(t.numel() * t.element_size() for t in network.module.parameters()) / 2**20,
        "steps": [asdict(s) for s in steps],
    }


def timed_and_watched(name: str, given: argparse.Namespace) -> dict[str, Any]:
    """Prune one network twice, each time in a new process: durations of the first, memory of the second."""
    timed, watched = (in_process(name, given, environment) for environment in ({}, _GIVES_BACK))
    steps = [
        {**step, "peak_mib": twin["peak_mib"]} for step, twin in zip(timed["steps"], watched["steps"], strict=True)
    ]
    return {**timed, "steps": steps}


def in_process(name: str, given: argparse.Namespace, environment: Mapping[str, str]) -> dict[str, Any]:
    """`run` in a process that starts with these environment variables too."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        before = dict(os.environ)
        os.environ.update(environment)
        try:
            return pool.submit(run, name, given).result()
        finally:
            os.environ.clear()
            os.environ.update(before)


def told(row: dict[str, Any]) -> str:
    """One line."""
    inference, *steps = row["steps"]
    whole = row["weights_mib"] + inference["peak_mib"]
    parts = ", ".join(
        f"{s['name']} {s['seconds']:.1f} s, {(row['weights_mib'] + s['peak_mib']) / whole:.1f} × the memory"
        for s in steps
    )
    seconds = sum(s["seconds"] for s in steps)
    return f"{row['network']}, {row['samples']} samples: {parts}; together {seconds:.1f} s; inference {whole:.0f} MiB"


def main() -> None:
    """Prune the networks once each, print and write the figures."""
    arguments = common.parser(__doc__ or "")
    arguments.add_argument("--models", default="MiniLM,deit_small", help="comma-separated")
    given = arguments.parse_args()
    rows = []
    for name in given.models.split(","):
        rows.append(timed_and_watched(name, given))
        print(told(rows[-1]), flush=True)
    print(f"written to {common.write_results('pruning-time', rows)}")


if __name__ == "__main__":
    main()
