"""How long scores, search and repair take at half of the FLOPs, with the default settings.

    python benchmarks/pruning_time.py --data-root ../shared/data

Writes ``results/DEVICE/pruning-time.json``: seconds per step, of MiniLM on sentences and of deit_small on photographs.
"""

from itertools import pairwise
from time import perf_counter
from typing import Any

import common
import torch

from optin_deploy import load_calibration, load_network
from optin_deploy.pruning import examine, remove
from optin_deploy.rotation import in_principal_bases
from optin_deploy.scoring import score
from optin_deploy.search import search

FLOPS = 0.5


def main() -> None:
    """Prune both networks once, print and write the seconds."""
    given = common.parser(__doc__ or "").parse_args()
    torch.set_num_threads(given.threads)
    data, rows = given.data_root, []
    cases: tuple[tuple[str, str, dict[str, Any]], ...] = (
        ("MiniLM", "pretrained", {"path": data / "stsb" / "train.csv", "column": "1,2"}),
        ("deit_small", "random", {"path": data / "photos"}),
    )
    for name, weights, calibrated in cases:
        network = load_network(common.minilm_directory() if name == "MiniLM" else name, weights=weights)
        calibration = load_calibration(network, **calibrated)
        anatomy, batches = examine(network), calibration.batches
        times = [perf_counter()]
        dense = in_principal_bases(network, anatomy.structure, batches)
        scores = score(dense, anatomy.structure, anatomy.costs, batches)
        times.append(perf_counter())
        plan = search(anatomy.structure, scores, anatomy.costs, FLOPS, align=64)
        times.append(perf_counter())
        remove(dense, anatomy.structure, plan, batches, "auto")
        times.append(perf_counter())
        spent = [after - before for before, after in pairwise(times)]
        steps = dict(zip(("score", "search", "repair"), spent, strict=True))
        rows.append({"network": name, "samples": calibration.samples, "threads": given.threads, "seconds": steps})
        told = ", ".join(f"{step} {seconds:.1f} s" for step, seconds in steps.items())
        print(f"{name}, {calibration.samples} samples: {told}, together {times[-1] - times[0]:.1f} s", flush=True)
    print(f"written to {common.write_results('pruning-time', rows)}")


if __name__ == "__main__":
    main()
