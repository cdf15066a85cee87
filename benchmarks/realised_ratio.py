"""How much of the FLOPs that pruning removes turns up as speed: ours beside torch-pruning, in one interleaved run.

    python benchmarks/realised_ratio.py --data-root ../shared/data

Every network is pruned to half of its FLOPs, by us and by torch-pruning (see ``torch_pruned``; ``pip install
torch-pruning``, without which its column is left out). FLOPs of all are counted alike. Dense, dense again and both
pruned networks then take turns in one process per runtime and batch size. The realised ratio is the speed-up divided by
the factor by which the FLOPs fell. Vision networks have random weights, which do not change their speed.

Rows are kept in ``results/DEVICE/realised-ratio.json``; those of a network, runtime and batch size are replaced when
they are measured again. ``--table`` only prints what is there, ``--markdown`` prints it for the README.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import common
import torch
import torch_pruned
from rich.console import Console
from rich.table import Table

import optin_deploy
from exporters import check_parity, onnx_from_program, save_program, trace
from optin_deploy import Network
from optin_deploy.export.onnx_file import parity_batches
from optin_deploy.network import TensorOutputs
from optin_deploy.nn.flops import count_flops
from optin_deploy.tokens.near_ties import alternatives
from profilers import RUNTIMES
from profilers.isolated import Case, loads_for, measure_files
from profilers.stats import Interval, ratio_interval, summarise

FLOPS = 0.5
OURS, THEIRS = "ours", "torch-pruning"
# What the table tells of each of them.
_COLUMNS = ("speed-up", "realised")
# Name -> folder or file with calibration data, column of texts, number of samples. Shapes need few.
MODELS: dict[str, tuple[str, str | None, int]] = {
    "deit_small": ("photos", None, 64),
    "deit_tiny": ("photos", None, 64),
    "minilm": ("stsb/train.csv", "1,2", 256),
}


@dataclass(frozen=True)
class Row:
    """One way of pruning, at one runtime and batch size.

    Attributes:
        flops: part of the dense FLOPs that is left.
        dense_p50_ms: median latency of the dense network in the same run.
        p50_ms: that of the pruned one.
        speedup: dense ÷ pruned with its 95 % interval.
        noise: the same of dense ÷ dense again.
        realised: speed-up ÷ factor by which the FLOPs fell.
        ours: of other methods, median(theirs) ÷ median(ours) in the same run: above 1 where ours is faster.
        rounds: of the interleaved run.
        converged: the ratios had settled when the time was up.
    """

    model: str
    method: str
    runtime: str
    batch_size: int
    flops: float
    dense_p50_ms: float
    p50_ms: float
    speedup: Interval
    noise: Interval
    realised: float
    rounds: int
    converged: bool
    ours: Interval | None = None


def _case(row: Row) -> tuple[str, str, int]:
    return row.model, row.runtime, row.batch_size


RESULT = common.ResultFile("realised-ratio", Row, key=_case)


def load(model: str, data: Path, samples: int | None) -> tuple[Network, optin_deploy.Calibration]:
    """The dense network and its calibration data; the built-in samples where the data folder lacks them."""
    if model not in MODELS:
        sys.exit(f"--models {model}: choose from {', '.join(MODELS)}")
    where, column, few = MODELS[model]
    if model == "minilm":
        network = optin_deploy.load_network(common.minilm_directory(), sequence_length=128)
    else:
        network = optin_deploy.load_network(model, weights="random")
    path: Path | None = data / where
    if path is not None and not path.exists():
        print(f"{model}: {path} is absent, calibrated on the built-in samples")
        path = column = None
    return network, optin_deploy.load_calibration(network, path, column=column, samples=samples or few)


def pruned_by_all(network: Network, calibration: optin_deploy.Calibration) -> dict[str, Network]:
    """The networks to compare by name: ours, and torch-pruning's where it is installed."""
    networks = {OURS: optin_deploy.prune(network, calibration.batches, flops=FLOPS).network}
    if torch_pruned.installed():
        try:
            networks[THEIRS] = network.with_module(torch_pruned.prune(network, FLOPS)[0])
        except ValueError as error:
            sys.exit(str(error))
    return networks


def export(network: Network, path: Path, held_out: tuple[dict[str, torch.Tensor], ...]) -> None:
    """Write ``path`` with the suffixes .onnx and .pt2; ends the program with a line when the ONNX file differs from
    torch on ``held_out`` batches."""
    tensors, outputs = TensorOutputs(network.module, network.outputs), tuple(network.outputs)
    program = trace(tensors, network.inputs, network.dynamic_axes)
    save_program(program, path.with_suffix(".pt2"))
    onnx = path.with_suffix(".onnx")
    onnx_from_program(program, onnx, output_names=outputs, dynamic_axes=network.dynamic_axes)
    batches, others = parity_batches(network, held_out), alternatives(network)
    for parity in check_parity(tensors, onnx, batches, outputs, alternatives=others):
        if not parity.passed:
            sys.exit(f"{onnx.name}: {parity.output} is off by {parity.max_abs_error:.1e}, so nothing was measured")


def measure(
    model: str, dense: Path, pruned: Mapping[str, tuple[Path, float]], sample: Mapping[str, Any], case: Case
) -> list[Row]:
    """One interleaved run of dense, dense again and all pruned networks.

    Args:
        dense: its file, the suffix left out.
        pruned: method -> file, the suffix left out, and the part of the FLOPs left.
        sample: input name -> array with leading dimension 1.
    """
    suffix = ".onnx" if RUNTIMES[case.runtime] == "onnx" else ".pt2"
    stems = {"dense": dense, "dense again": dense, **{name: stem for name, (stem, _) in pruned.items()}}
    files = {name: stem.with_suffix(suffix) for name, stem in stems.items()}
    case = replace(case, loads=loads_for(case.runtime, files.values()))
    result = measure_files(files, dict(sample), case, [("dense", name) for name in files if name != "dense"])
    samples = result.samples_ms
    noise = ratio_interval(samples["dense"], samples["dense again"])
    rows = []
    for method, (_, flops) in pruned.items():
        speedup = ratio_interval(samples["dense"], samples[method])
        p50_ms, dense_p50_ms = (
            summarise([t for turn in samples[name] for t in turn]).p50_ms for name in (method, "dense")
        )
        rows.append(
            Row(
                model=model,
                method=method,
                runtime=case.runtime,
                batch_size=case.batch_size,
                flops=flops,
                dense_p50_ms=dense_p50_ms,
                p50_ms=p50_ms,
                speedup=speedup,
                noise=noise,
                realised=speedup.value * flops,
                rounds=len(samples["dense"]),
                converged=result.converged,
                ours=None if method == OURS else ratio_interval(samples[method], samples[OURS]),
            )
        )
    return rows


def run(model: str, data: Path, samples: int | None, cases: Sequence[Case]) -> list[Row]:
    """Prune, export, check and measure one model."""
    network, calibration = load(model, data, samples)
    total = count_flops(network.module, network.inputs)
    rows = []
    with TemporaryDirectory(prefix="optin-benchmark-") as folder:
        dense, pruned = Path(folder, "dense"), {}
        export(network, dense, calibration.held_out)
        for method, small in pruned_by_all(network, calibration).items():
            stem = Path(folder, method)
            export(small, stem, calibration.held_out)
            pruned[method] = (stem, count_flops(small.module, network.inputs) / total)
        sample = {name: tensor[:1].numpy() for name, tensor in network.inputs.items()}
        for case in cases:
            found = measure(model, dense, pruned, sample, case)
            rows += found
            for row in found:
                speedup = common.interval(row.speedup, "×")
                print(f"{model}, {case.name}, {row.method}: {speedup}, realised {row.realised:.2f}", flush=True)
    return rows


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heading and one line per network, runtime and batch size; a method that no row has gets no columns."""
    methods = [method for method in (OURS, THEIRS) if any(row.method == method for row in rows)]
    heading = ["Network", "Runtime", "batch", "dense p50 ms", *(f"{m}: {w}" for m in methods for w in _COLUMNS)]
    cases: dict[tuple[str, str, int], dict[str, Row]] = {}
    for row in rows:
        cases.setdefault(_case(row), {})[row.method] = row
    lines = []
    for (model, runtime, batch), by_method in cases.items():
        first = next(iter(by_method.values()))
        line = [model, runtime, str(batch), f"{float(f'{first.dense_p50_ms:.3g}'):g}"]
        for method in methods:
            found = by_method.get(method)
            line += [common.interval(found.speedup, "×"), f"{found.realised:.2f}"] if found else ["–"] * len(_COLUMNS)
        if THEIRS in methods:
            direct = by_method[THEIRS].ours if THEIRS in by_method else None
            line.append(common.interval(direct) if direct else "–")
        lines.append([*line, common.interval(first.noise)])
    if THEIRS in methods:
        heading.append(f"{THEIRS} ÷ ours, time")
    return [*heading, "dense ÷ dense again"], lines


def markdown(rows: Sequence[Row]) -> str:
    """The table for the README."""
    heading, lines = cells(rows)
    return common.markdown_table(heading, lines)


def table(rows: Sequence[Row]) -> Table:
    """The table for the terminal."""
    heading, lines = cells(rows)
    return common.terminal_table(heading, lines, f"At {FLOPS:g} of the FLOPs (± {torch_pruned.WINDOW}); 95 % intervals")


def main() -> None:
    """Measure what is asked for, write it, print the table."""
    arguments = common.speed_parser(
        __doc__ or "", models=",".join(MODELS), batch_sizes="1,8", seconds=30.0, samples=None
    )
    arguments.add_argument("--runtimes", default="ort-cpu,torch", help="comma-separated")
    arguments.add_argument("--markdown", action="store_true", help="only print what was measured, for the README")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    sizes = [int(size) for size in given.batch_sizes.split(",")]
    runtimes = given.runtimes.split(",")
    known = [name for name, file in RUNTIMES.items() if file != "engine"]
    unknown = [name for name in runtimes if name not in known]
    if unknown:
        sys.exit(f"--runtimes {unknown[0]}: choose from {', '.join(known)}")
    rows = RESULT.read()
    if not (given.table or given.markdown):
        if not torch_pruned.installed():
            print("torch-pruning is not installed, its column is left out: pip install torch-pruning")
        cases = [Case(runtime, size, given.threads, given.seconds) for runtime in runtimes for size in sizes]
        for model in given.models.split(","):
            new = run(model, given.data_root, given.samples, cases)
            rows = RESULT.add(new, flops=FLOPS, threads=given.threads, seconds_per_case=given.seconds)
            print(f"written to {RESULT.path}")
    if given.markdown:
        print(markdown(rows))
    else:
        Console(width=150).print(table(rows))


if __name__ == "__main__":
    main()
