"""Which architectures can be pruned, exported and made faster, one process each: the table in ``docs/coverage.md``.

    python benchmarks/architectures.py                        # what is not there yet, of all
    python benchmarks/architectures.py --only ViT,BERT        # these again
    python benchmarks/architectures.py --fifth --again        # those that CI runs, again

torch-pruning runs over the same list (``pip install torch-pruning``; its columns are left out without it). peft is
needed for one row. Rows are kept in ``results/DEVICE/coverage.json``; ``--table`` only writes the page of what is
there. Times of ONNX Runtime are at batch 1 on one thread.
"""

import json
import multiprocessing
import os
import resource
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

# Before torch is loaded: processes are forked, and each is to take one core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import common
import torch
import torch_pruned
from coverage_cases import ARCHITECTURES, Architecture
from coverage_table import page
from coverage_worker import COLUMNS, FLOPS, PEER_COLUMNS, Row, examined, peer

from exporters import onnx_from_program, trace
from optin_deploy.utils.atomic_files import write_text

NAME = "coverage"
PAGE = Path(__file__).parents[1] / "docs" / "coverage.md"
_POLL_SECONDS = 0.05
Named = tuple[str, dict[str, Any]]


@dataclass(frozen=True)
class Limits:
    """Of one process: seconds of the processor, and by the clock, where a machine has other things to do; memory."""

    seconds: float = 240.0
    clock_seconds: float = 1200.0
    memory_bytes: int = 8 * 2**30


@dataclass
class _Running:
    process: BaseProcess
    result: Path
    end: float


def isolated(work: Mapping[str, Callable[[], Row]], limits: Limits, jobs: int) -> Iterator[tuple[str, Row | str]]:
    """What each of ``work`` gives in a process of its own, or why it gave nothing, as they end; ``jobs`` at a time."""
    context = multiprocessing.get_context("fork")
    waiting, running = list(work.items()), dict[str, _Running]()
    with tempfile.TemporaryDirectory(prefix="optin-coverage-") as folder:
        while waiting or running:
            while waiting and len(running) < jobs:
                name, call = waiting.pop(0)
                result = Path(folder, f"{len(waiting)}.json")
                process = context.Process(target=_in_process, args=(call, result, limits))
                process.start()
                running[name] = _Running(process, result, time.monotonic() + limits.clock_seconds)
            for name, one in list(running.items()):
                ended = _ended(one, limits)
                if ended is not None:
                    del running[name]
                    yield name, ended
            time.sleep(_POLL_SECONDS)


def _in_process(call: Callable[[], Row], result: Path, limits: Limits) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (limits.memory_bytes, limits.memory_bytes))
    resource.setrlimit(resource.RLIMIT_CPU, (int(limits.seconds) + 1, int(limits.seconds) + 2))
    torch.set_num_threads(1)
    # What libraries print is not the table's.
    with Path(os.devnull).open("w") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
        write_text(result, json.dumps(asdict(call())))


def _ended(one: _Running, limits: Limits) -> Row | str | None:
    """The row of a process that has ended, or why there is none; None while it runs."""
    if one.process.is_alive():
        if time.monotonic() < one.end:
            return None
        # With what it has started itself, which measures.
        os.killpg(one.process.pid or 0, signal.SIGKILL)
        one.process.join()
        return f"took more than {limits.clock_seconds:.0f} s by the clock"
    one.process.join()
    if one.process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL):
        return f"took more than {limits.seconds:.0f} s"
    if one.result.is_file():
        return Row(**json.loads(one.result.read_text(encoding="utf-8")))
    return f"its process ended with code {one.process.exitcode}: a crash, or not enough memory"


def run(architectures: Mapping[str, Architecture], limits: Limits, jobs: int, seconds: float) -> Iterator[Named]:
    """Rows by name as they are found, as JSON has them; ``seconds`` is the time limit of each measurement."""
    _warm_up()
    for name, found in isolated({n: _ours(each, seconds) for n, each in architectures.items()}, limits, jobs):
        row = Row(columns={COLUMNS[0]: found}) if isinstance(found, str) else found
        yield name, {"family": architectures[name].family, **asdict(row)}


def run_peers(rows: Mapping[str, Mapping[str, Any]], limits: Limits, jobs: int) -> Iterator[Named]:
    """What torch-pruning makes of the architectures of these rows, asked for the same budgets: ``peer`` and
    ``peer_reached`` by name, as they are found."""
    _warm_up()
    work = {name: _theirs(ARCHITECTURES[name], row["asked"] or FLOPS) for name, row in rows.items()}
    for name, found in isolated(work, limits, jobs):
        row = Row(peer={PEER_COLUMNS[0]: found}) if isinstance(found, str) else found
        yield name, {"peer": row.peer, "peer_reached": row.peer_reached}


def _warm_up() -> None:
    """Export something small: what torch and onnx load for that is then there in every process that is forked."""
    layer, inputs = torch.nn.Linear(2, 2), {"input": torch.ones(2, 2)}
    with tempfile.TemporaryDirectory(prefix="optin-coverage-") as folder:
        program = trace(layer, inputs, {"input": {0: "batch"}})
        path = Path(folder, "linear.onnx")
        onnx_from_program(program, path, output_names=("output",), dynamic_axes={"input": {0: "batch"}})


def _ours(architecture: Architecture, seconds: float) -> Callable[[], Row]:
    return lambda: examined(architecture, seconds)


def _theirs(architecture: Architecture, asked: float) -> Callable[[], Row]:
    return lambda: peer(architecture, asked)


def chosen(names: Sequence[str], fifth: bool) -> dict[str, Architecture]:
    """Those architectures whose name, or what stands behind its family, is among ``names``; all where there are none.

    Ends the program with a line when a name is unknown.
    """
    short = {name.partition(": ")[2]: name for name in ARCHITECTURES}
    unknown = [name for name in names if name not in ARCHITECTURES and name not in short]
    if unknown:
        sys.exit(f"--only {unknown[0]}: choose from {'; '.join(ARCHITECTURES)}")
    wanted = {name if name in ARCHITECTURES else short[name] for name in names}
    return {
        name: each
        for name, each in ARCHITECTURES.items()
        if (not wanted or name in wanted) and (each.fifth or not fifth)
    }


def read_rows() -> dict[str, dict[str, Any]]:
    """The rows found so far, in the order of the table."""
    path = common.RESULTS / common.device_name() / f"{NAME}.json"
    kept = json.loads(path.read_text(encoding="utf-8"))["figures"]["rows"] if path.is_file() else {}
    return {name: kept[name] for name in ARCHITECTURES if name in kept}


def write_rows(rows: Mapping[str, dict[str, Any]]) -> None:
    """The results as JSON, and the page."""
    ordered = {name: rows[name] for name in ARCHITECTURES if name in rows}
    common.write_results(NAME, {"rows": ordered})
    PAGE.parent.mkdir(exist_ok=True)
    write_text(PAGE, page(ordered))


def main() -> None:
    """Examine what is asked for, a few at a time, and write what is known so far after each."""
    arguments = common.parser(__doc__ or "")
    arguments.add_argument("--only", default="", help="architectures, separated by ';' or ','")
    arguments.add_argument("--fifth", action="store_true", help="only those that CI runs")
    arguments.add_argument("--again", action="store_true", help="also what was examined before")
    arguments.add_argument("--jobs", type=int, default=1, help="processes at a time")
    arguments.add_argument("--seconds", type=float, default=5.0, help="time limit of one measurement")
    arguments.add_argument("--limit-seconds", type=float, default=Limits.seconds, help="of one process")
    arguments.add_argument("--no-peers", action="store_true", help="leave out torch-pruning")
    arguments.add_argument("--table", action="store_true", help="only write the page of what was examined")
    given = arguments.parse_args()
    rows = read_rows()
    if not given.table:
        names = given.only.split(";") if ";" in given.only else _names(given.only)
        some = chosen([name.strip() for name in names if name.strip()], given.fifth)
        whole, limits = given.only or given.again, Limits(given.limit_seconds)
        todo = {n: each for n, each in some.items() if whole or _is_missing(rows.get(n), given.seconds > 0)}
        for name, row in run(todo, limits, given.jobs, given.seconds):
            # What is known of torch-pruning stays until it has run again.
            known = {key: rows[name][key] for key in ("peer", "peer_reached") if name in rows}
            rows[name] = {**row, **known}
            print(f"{name}: {_told(row)}", flush=True)
            write_rows(rows)
        peers = not given.no_peers and torch_pruned.installed()
        without = {n: rows[n] for n in some if peers and (whole or not rows[n]["peer"])}
        for name, found in run_peers(without, limits, given.jobs):
            rows[name] = {**rows[name], **found}
            print(f"{name}, torch-pruning: {found['peer']}", flush=True)
            write_rows(rows)
    write_rows(rows)
    print(f"written to {PAGE}")


def _is_missing(row: Mapping[str, Any] | None, speed: bool) -> bool:
    """Whether there is something to examine that was not."""
    return row is None or (speed and row["columns"].get("onnx", "") is None and "speed" not in row["columns"])


def _names(text: str) -> list[str]:
    """Names separated by commas; some have a comma of their own."""
    known = {*ARCHITECTURES, *(name.partition(": ")[2] for name in ARCHITECTURES)}
    names: list[str] = []
    for part in text.split(","):
        if names and names[-1] not in known:
            names[-1] += f",{part}"
        else:
            names.append(part)
    return names


def _told(row: Mapping[str, Any]) -> str:
    failed = {name: reason for name, reason in row["columns"].items() if reason is not None}
    took = f"{sum(row['seconds'].values()):.0f} s"
    reached = f"{row['prunable']:.0%} prunable, {row['reached'] or 0:.2f} of {row['asked'] or 0:.2f}"
    return f"{reached}, {took}" + "".join(f"\n    {name}: {reason}" for name, reason in failed.items())


if __name__ == "__main__":
    main()
