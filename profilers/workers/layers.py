"""The isolated process that profiles one file by layer: `python -m profilers.workers.layers SPEC.json`.

The spec holds `runtime`, `batch_size`, `threads`, `seconds`, `seed`, `tf32`, `file`, `onnx` (what an engine was built
of, or null), `modules` (dotted names), `feeds` (an `.npz` with one sample, leading dimension 1, arrays in the order of
`inputs`), `inputs` (their names), `folder` (for files on the way), and `result`, the JSON file to write: `rows`,
`total_ms`, `profiled_ms`. Progress and errors are told as by `profilers.workers.latency`.
"""

import gc
import os
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, median
from typing import Any

from profilers.interleave import WARM_UP_RUNS, Samples, interleave
from profilers.layer_profilers import Operator, ProfiledRuns
from profilers.layer_times import OTHER
from profilers.runners import ORT_PROVIDERS, RUNTIMES, open_runner
from profilers.runners.base import Feeds
from profilers.workers.latency import answer, load_feeds, print_progress

# A median over so many runs moves no more, and a profile of thousands of runs takes long to read.
_RUNS = 100


def main(arguments: list[str]) -> int:
    """Profiles what the spec describes; the exit status."""
    return answer(arguments, measure)


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Runs the file plainly and profiled, in turns, and returns what goes into the result file."""
    if spec["runtime"] == "ort-cuda":
        # Read when CUDA starts: ONNX Runtime's profiler times the host, which otherwise does not wait for the GPU.
        os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    feeds = load_feeds(Path(spec["feeds"]), spec["inputs"], spec["batch_size"])
    profiled = _open_profiled(spec, feeds)
    with open_runner(spec["runtime"], Path(spec["file"]), spec["threads"], tf32=spec["tf32"]) as runner:
        variants = {"plain": [runner.prepare(feeds)], "profiled": [profiled.run]}
        gc.collect()
        gc.disable()
        samples, *_ = interleave(variants, _enough, spec["seconds"], spec["seed"], print_progress)
        gc.enable()
    record = profiled.finish()
    runs = typical(record.times_ms, skip=WARM_UP_RUNS)
    times_ms = [fmean(times) for times in zip(*(record.times_ms[run] for run in runs), strict=True)]
    return {
        "rows": summed(record.operators, times_ms, spec["modules"]),
        "total_ms": median(ms for turn in samples["plain"] for ms in turn),
        "profiled_ms": fmean(record.whole_ms[run] for run in runs),
    }


def typical(times_ms: Sequence[Sequence[float]], skip: int) -> list[int]:
    """Which runs to average over: past the first ``skip``, the middle half by their total.

    An operator's median over all runs would not do: interruptions hit another operator in every run, and what is in
    no median would be lost from the sum.

    Args:
        times_ms: runs × operators.
    """
    ordered = sorted(range(skip, len(times_ms)), key=lambda run: sum(times_ms[run]))
    return ordered[len(ordered) // 4 : len(ordered) - len(ordered) // 4]


def summed(operators: Sequence[Operator], times_ms: Sequence[float], modules: Sequence[str]) -> list[dict[str, Any]]:
    """Rows by module and operator type, in the order of ``operators``."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for operator, ms in zip(operators, times_ms, strict=True):
        key = innermost(operator.path, modules), operator.type
        row = rows.setdefault(key, {"module": key[0], "operator": key[1], "calls": 0, "ms": 0.0})
        row["calls"] += 1
        row["ms"] += ms
    return list(rows.values())


def innermost(path: str, modules: Sequence[str]) -> str:
    """The innermost of the modules that ``path`` is in, or `OTHER`. The first part may be a wrapper's, and there may be
    more wrappers, each of which calls what it wraps "module"."""
    candidates = [path, path.partition(".")[2]]
    while candidates[-1].startswith("module."):
        candidates.append(candidates[-1].removeprefix("module."))
    inside = [name for name in modules if any(f"{place}.".startswith(f"{name}.") for place in candidates)]
    return max(inside, key=len, default=OTHER)


def _open_profiled(spec: dict[str, Any], feeds: Feeds) -> ProfiledRuns:
    path, threads, folder = Path(spec["file"]), spec["threads"], Path(spec["folder"])
    if spec["runtime"].startswith("ort"):
        from profilers.layer_profilers.ort import ProfiledSession

        return ProfiledSession(path, ORT_PROVIDERS[spec["runtime"]], threads, feeds, folder, tf32=spec["tf32"])
    if RUNTIMES[spec["runtime"]] == "engine":
        from profilers.layer_profilers.trt import ProfiledEngine

        onnx = Path(spec["onnx"]) if spec["onnx"] else None
        return ProfiledEngine(path, spec["runtime"], feeds, onnx, partial(innermost, modules=spec["modules"]))
    from profilers.layer_profilers.pyt import ProfiledProgram

    device = "cuda" if spec["runtime"] == "torch-cuda" else "cpu"
    return ProfiledProgram(path, device, threads, feeds, tf32=spec["tf32"])


def _enough(samples: Samples) -> bool:
    return sum(map(len, samples["profiled"])) >= _RUNS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
