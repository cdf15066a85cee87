"""What a GPU gives, in one call: how long scoring and pruning take on it, and how much of the FLOPs turns up as speed.

    sh benchmarks/gpu.sh                 # --tiny is a trial on the CPU; --table only prints what was measured

In the order of importance, as far as the time goes: deit_small and a network of BERT base's size are scored by sketch
and exactly; deit_small, deit_base and a network of MiniLM's size are pruned to half of their FLOPs and exported; dense,
dense again and pruned take turns in every runtime that is there, at every precision and batch size. The next call goes
on where this one stopped, unless the device or torch is another one. Weights and inputs are random.

Rows are kept in ``results/DEVICE/gpu.json``, what failed and what was not reached beside them.
"""

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import common
import torch

from gpu import table
from gpu.cases import FULL, TINY, Case, Setup, available, cases, narrowed, planned
from gpu.latency import export, latency
from gpu.networks import METHODS, Pair, pruned_pair, scoring_row
from gpu.record import Outcome, Record, attempt, opened
from profilers import RUNTIMES, usable_cores

# Most seconds of one case.
SCORING_S, PRUNING_S, EXPORT_S, LATENCY_S = 60.0, 90.0, 150.0, 120.0
_FIX = 2


def run(setup: Setup, record: Record) -> None:
    """Measure what is still to be measured, until the time is up."""
    for name in setup.scored:
        for method in METHODS:
            _score(setup, record, name, method)
    pairs: dict[str, Pair] = {}
    for name in setup.pruned:
        _prune(setup, record, name, pairs)
    with TemporaryDirectory(prefix="optin-gpu-") as folder:
        for _, group in groupby(cases(setup), key=lambda case: case.precision):
            _measure(setup, record, pairs, list(group), Path(folder))


def _score(setup: Setup, record: Record, name: str, method: str) -> None:
    key = f"scoring/{name}/{method}"
    if not record.open([key]):
        return

    def work(_: float) -> dict[str, Outcome]:
        return {key: scoring_row(name, method, setup.device, setup.samples, setup.batch, setup.exact_units)}

    attempt(record, [key], SCORING_S, work)
    _tell(record, [key])


def _prune(setup: Setup, record: Record, name: str, pairs: dict[str, Pair]) -> None:
    """Put the network into ``pairs``, where something of it is still to be measured."""
    key = f"pruning/{name}"
    keys = record.open([key, *(k for case in cases(setup) if case.network == name for k in case.sizes)])
    if not keys:
        return

    def work(_: float) -> dict[str, Outcome]:
        pairs[name], row = pruned_pair(name, setup.device, setup.samples, setup.batch, setup.align)
        return {key: row}

    attempt(record, keys, PRUNING_S, work)
    _tell(record, [key])


def _measure(setup: Setup, record: Record, pairs: Mapping[str, Pair], group: Sequence[Case], folder: Path) -> None:
    """Export what ``group``, which is of one precision, still needs; then measure, while nothing else runs."""
    wanted = [case for case in group if case.network in pairs and record.open(case.sizes)]
    if not wanted:
        return
    needed = {case.network: pairs[case.network] for case in wanted}
    onnx = any(RUNTIMES[case.runtime] != "program" for case in wanted)

    def work(_: float) -> dict[str, Outcome]:
        failed = export(needed, wanted[0].precision, folder, onnx=onnx, workers=max(1, usable_cores().physical // 2))
        return {k: f"export: {failed[c.network]}" for c in wanted if c.network in failed for k in record.open(c.sizes)}

    attempt(record, [key for case in wanted for key in record.open(case.sizes)], EXPORT_S, work)
    for case in wanted:
        if keys := record.open(case.sizes):
            measured = partial(latency, case, keys, pairs[case.network], folder, setup.seconds)
            attempt(record, keys, LATENCY_S, measured)
            _tell(record, keys)


def _tell(record: Record, keys: Iterable[str]) -> None:
    for key in keys:
        told = table.in_a_line(record.rows[key]) if key in record.rows else record.failed.get(key, "not measured")
        print(f"[{max(0.0, record.left_s):3.0f} s left] {key}: {told}", flush=True)


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--minutes", type=float, default=8.5, help="after these, what runs is cut short")
    made.add_argument("--results", type=Path, help="folder for DEVICE/gpu.json, in place of benchmarks/results")
    made.add_argument("--networks", help="comma-separated, in place of all; so are the following")
    made.add_argument("--precisions")
    made.add_argument("--runtimes")
    made.add_argument("--batch-sizes")
    made.add_argument("--tiny", action="store_true", help="a trial with tiny networks on the CPU; needs --results")
    made.add_argument("--table", action="store_true", help="only print what was measured on GPUs, for the README")
    return made.parse_args(arguments)


def _stop(reason: str) -> None:
    print(reason, file=sys.stderr)
    sys.exit(_FIX)


def main(arguments: Sequence[str] | None = None) -> int:
    """Measure what is asked for, write it, print the tables; 1 where nothing was measured, 2 where something is to be
    fixed first."""
    given = _options(arguments)
    results = given.results or common.RESULTS
    if given.table:
        print(table.of_folder(results))
        return 0
    deadline = perf_counter() + 60 * given.minutes
    if given.tiny and not given.results:
        _stop("--tiny measures nothing that is worth keeping: give --results DIR")
    if not given.tiny and not torch.cuda.is_available():
        _stop("torch sees no CUDA device: run this on a machine with one, or --tiny for a trial on the CPU")
    try:
        setup, lacking = available(narrowed(TINY if given.tiny else FULL, vars(given)))
    except ValueError as error:
        _stop(str(error))
    basis = {"device": common.device_name(), "torch": torch.__version__, "tiny": given.tiny}
    facts = {"setup": asdict(setup), "unavailable": lacking}
    record = opened(results, basis, facts, planned(setup), deadline)
    run(setup, record)
    path = record.save()
    print(f"\n{table.markdown(path)}\n\nwritten to {path}")
    return 0 if record.rows else 1


if __name__ == "__main__":
    sys.exit(main())
