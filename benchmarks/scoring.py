"""The sketch scorer against masking every neuron one by one, on the real MiniLM: agreement and time.

    python benchmarks/scoring.py --neurons 240

Both scorers see the same batch. The time of masking every neuron is extrapolated from those masked.
"""

from time import perf_counter

import common
import torch

from optin_deploy import load_calibration, load_network
from optin_deploy.criteria.trajectory import exact_scores, sketch_scores, task_factors
from optin_deploy.criteria.trajectory_loss import LossSettings
from optin_deploy.evaluation.metrics import spearman
from optin_deploy.pruning.space import analyze


def main() -> None:
    """Score a random sample of neurons both ways, print and write the comparison."""
    arguments = common.parser(__doc__ or "")
    arguments.add_argument("--neurons", type=int, default=240, help="masked exactly, drawn from all layers")
    arguments.add_argument("--probes", default="4,8,16,32", help="comma-separated")
    arguments.add_argument("--seed", type=int, default=0)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)

    network = load_network(common.minilm_directory())
    structure = analyze(network, narrow=False).structure
    batch = load_calibration(network, None, samples=32, seed=given.seed).batches[0]
    factors = task_factors(network, structure, [batch], 1.0, given.seed)
    neurons = [(g.name, i) for g in structure.groups if g.kind == "neuron" for i in range(g.units)]
    order = torch.randperm(len(neurons), generator=torch.Generator().manual_seed(given.seed)).tolist()
    chosen: dict[str, list[int]] = {}
    for name, unit in (neurons[i] for i in order[: given.neurons]):
        chosen.setdefault(name, []).append(unit)

    start = perf_counter()
    groups = [structure.group(name) for name in chosen]
    exact = exact_scores(
        network, structure, groups, [batch], LossSettings(factors=factors, seed=given.seed), only=chosen
    )
    exact_seconds = (perf_counter() - start) / given.neurons * len(neurons)
    expected = torch.cat([exact[name][units] for name, units in chosen.items()])

    rows = []
    for probes in (int(p) for p in given.probes.split(",")):
        start = perf_counter()
        sketched = sketch_scores(
            network, structure, [batch], LossSettings(factors=factors, seed=given.seed), probes=probes
        )
        seconds = perf_counter() - start
        found = torch.cat([sketched[name][units] for name, units in chosen.items()])
        rows.append(
            {
                "probes": probes,
                "seconds": seconds,
                "spearman": spearman(found, expected),
                "median_sketch_over_exact": float((found / expected.clamp_min(1e-300)).median()),
                "times_faster": exact_seconds / seconds,
            }
        )
        print("{probes:3d} probes: {seconds:6.1f} s, Spearman {spearman:.3f}, median sketch/exact "
              "{median_sketch_over_exact:.2f}, {times_faster:.0f} times faster".format(**rows[-1]))  # fmt: skip
    print(f"exact: {given.neurons} neurons masked, {exact_seconds:.0f} s for all {len(neurons)} (extrapolated)")
    path = common.write_results("scoring", {"exact_seconds": exact_seconds, "neurons": given.neurons, "rows": rows})
    print(f"written to {path}")


if __name__ == "__main__":
    main()
