"""What precisions and 2:4 sparsity cost: ONNX files of dense, pruned and sparse networks in ONNX Runtime on the CPU.

    python benchmarks/precision.py --cases stsb,sst2,saliency --flops 0.5

bfloat16 has no kernels there and is emulated, rounded after every operator; fp8 rounds inputs and weights of the linear
maps, which is all it does anywhere, and multiplies in float32. Writes ``results/DEVICE/precision.json`` row by row and
goes on where an earlier run has stopped; ``--table`` only prints.
"""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args

import common
import torch
from cases import CASES, Case
from rich.console import Console
from rich.table import Table

from exporters import OnnxModule, OnnxSpec, Precision, in_precision, onnx_in_precision, runnable_on_cpu, trace
from optin_deploy import Network, prune
from optin_deploy.network import TensorOutputs
from optin_deploy.pruning.removal import Remover
from optin_deploy.pruning.space import analyze
from optin_deploy.structure.plan import Plan

# tf32 is a file in fp32.
PRECISIONS = tuple(p for p in get_args(Precision) if p != "tf32")
OPSET = 20
Row = dict[str, Any]
RESULT = common.ResultFile("precision", Row)


def measured(case: Case, network: Network, precision: Precision, threads: int) -> dict[str, Any]:
    """The case's figures for ``network`` exported in ``precision``, and the file's size in MiB."""
    exact = trace(TensorOutputs(network.module, network.outputs), network.inputs, network.dynamic_axes)
    program = in_precision(exact, precision, OPSET)
    with TemporaryDirectory() as folder:
        path = Path(folder, "network.onnx")
        spec = OnnxSpec(tuple(network.outputs), network.dynamic_axes, OPSET)
        onnx_in_precision(program, path, spec, precision, case.batches)
        size_mib = path.stat().st_size / 2**20
        with runnable_on_cpu(path, precision) as file:
            return {"figures": case.measure(OnnxModule(file, network.outputs, threads)), "size_mib": size_mib}


def sparse(case: Case) -> Network:
    """The network with nothing removed, and two of every four weights zero."""
    space, small = analyze(case.network), deepcopy(case.network.module)
    whole = Plan({group.name: tuple(range(group.units)) for group in space.structure.groups})
    Remover(case.network, space, case.batches, "auto").make_sparse(small, whole)
    return case.network.with_module(small)


VARIANTS: dict[str, Callable[[Case, float], Network]] = {
    "dense": lambda case, _: case.network,
    "pruned": lambda case, flops: prune(case.network, case.batches, flops).network,
    "2:4 sparse": lambda case, _: sparse(case),
}


def run(name: str, rows: list[Row], given: Any) -> None:
    """Measure what is missing of a case."""
    wanted = [(variant, p) for variant in VARIANTS for p in PRECISIONS]
    missing = [w for w in wanted if (name, *w, given.flops) not in {_key(row) for row in rows}]
    if not missing:
        return
    case = CASES[name][0](given.data_root, given.seed, None)
    networks: dict[str, Network] = {}
    for variant, precision in missing:
        if variant not in networks:
            networks[variant] = VARIANTS[variant](case, given.flops)
        found = measured(case, networks[variant], precision, given.threads)
        where = {"case": name, "variant": variant, "precision": precision, "flops": given.flops, "seed": given.seed}
        rows.append({**where, **found})
        print(rows[-1], flush=True)
        RESULT.write(rows)


def _key(row: Row) -> tuple[str, str, str, float]:
    return row["case"], row["variant"], row["precision"], row["flops"]


def table(rows: list[Row]) -> Table:
    """All figures, one row for each file."""
    made = Table("case", "variant", "precision", "MiB", "figures")
    for row in rows:
        figures = ", ".join(f"{n} {v:.4g}" for n, v in row["figures"].items() if "standard error" not in n)
        made.add_row(row["case"], row["variant"], row["precision"], f"{row['size_mib']:.1f}", figures)
    return made


def main() -> None:
    """Measure what is missing, print the table."""
    arguments = common.parser(__doc__ or "")
    arguments.add_argument("--flops", type=float, default=0.5)
    arguments.add_argument("--cases", default="stsb,sst2,saliency", help="comma-separated")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--table", action="store_true", help="only print what was measured")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    rows = RESULT.read()
    for name in given.cases.split(",") if not given.table else ():
        run(name, rows, given)
    Console(width=150).print(table(rows))


if __name__ == "__main__":
    main()
