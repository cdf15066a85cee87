"""The isolated process that measures one case: `python -m profilers.workers.latency SPEC.json`.

The spec holds `runtime`, `batch_size`, `threads`, `seconds`, `seed`, `tolerance`, `loads` (of each variant), `tf32`,
`gpu_uuid` (`profilers.gpu_watch.cuda_uuid`), `variants` (name to `files`, the builds of one network, `feeds`, an
`.npz` with one sample, leading dimension 1, arrays in the order of `inputs`, and `inputs`, their names), `pairs` (of
variants, whose ratios must settle to the tolerance), and `result`, the JSON file to write: `samples_ms`, `converged`,
`peak_rss_mib`, `loads`, less than asked for where memory is short, and `device_ms`, `cuda_graph` and `gpu` as in
`profilers.Measurement`. Progress goes to stdout, one `{"progress": fraction}` a line; an error's last line on stderr
says what is wrong, the exit status is 1.
"""

import gc
import json
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import numpy as np
import psutil

from profilers.errors import ProfilingError
from profilers.gpu_watch import Watch, installed_nvml
from profilers.interleave import Samples, interleave
from profilers.runners import GPU_RUNTIMES, open_runner
from profilers.runners.base import Feeds, Run, first_line
from profilers.stats import stable


def main(arguments: list[str]) -> int:
    """Measures the case that the spec describes; the exit status."""
    return answer(arguments, measure)


def answer(arguments: list[str], measure: Callable[[dict[str, Any]], dict[str, Any]]) -> int:
    """Writes what ``measure`` gives for the spec file named first in ``arguments``; the exit status."""
    try:
        spec = json.loads(Path(arguments[0]).read_text())
        result = measure(spec)
    except ProfilingError as error:
        print(error, file=sys.stderr)
        return 1
    except Exception as error:  # whatever the runtimes raise must reach the parent as one line
        traceback.print_exc()
        print(f"{type(error).__name__}: {first_line(error)}", file=sys.stderr)
        return 1
    target = Path(spec["result"])
    unfinished = target.with_suffix(".tmp")
    unfinished.write_text(json.dumps(result))
    unfinished.replace(target)
    return 0


class _Loaded(NamedTuple):
    """Runs of each variant, one for each file and load; whether they replay a CUDA graph; how often each was loaded."""

    runs: dict[str, list[Run]]
    graphs: dict[str, bool]
    loads: int


def measure(spec: dict[str, Any]) -> dict[str, Any]:
    """Loads the variants, measures them, and returns what goes into the result file.

    Where the engine of one variant cannot be captured in a CUDA graph, no variant uses one: otherwise the ratio would
    compare two ways of launching.
    """
    with ExitStack() as opened:
        loaded = _load(spec, opened, cuda_graphs=True)
        if len(set(loaded.graphs.values())) < 2:
            return {**measure_runs(loaded.runs, loaded.graphs, spec, print_progress), "loads": loaded.loads}
    with ExitStack() as opened:
        loaded = _load(spec, opened, cuda_graphs=False)
        return {**measure_runs(loaded.runs, loaded.graphs, spec, print_progress), "loads": loaded.loads}


def _load(spec: Mapping[str, Any], opened: ExitStack, *, cuda_graphs: bool) -> _Loaded:
    """All variants, as often as the spec says and memory allows; ``opened`` frees them."""
    runs: dict[str, list[Run]] = {name: [] for name in spec["variants"]}
    graphs: dict[str, bool] = {}
    before = psutil.Process().memory_info().rss
    loads = 0
    while loads < spec["loads"] and _has_room(loads, before):
        for name, variant in spec["variants"].items():
            feeds = load_feeds(Path(variant["feeds"]), variant["inputs"], spec["batch_size"])
            for file in variant["files"]:
                runner = open_runner(
                    spec["runtime"], Path(file), spec["threads"], tf32=spec["tf32"], cuda_graphs=cuda_graphs
                )
                run = opened.enter_context(runner).prepare(feeds)
                # The first run takes the memory that a network needs next to its weights.
                run()
                runs[name].append(run)
                if runner.cuda_graph is not None:
                    graphs[name] = graphs.get(name, True) and runner.cuda_graph
        loads += 1
    return _Loaded(runs, graphs, loads)


def measure_runs(
    runs: Mapping[str, Sequence[Run]],
    graphs: Mapping[str, bool],
    spec: Mapping[str, Any],
    progress: Callable[[float], None],
) -> dict[str, Any]:
    """Runs of several variants in turns, as the spec says; the result but for its `loads`.

    Args:
        runs: of each variant, one for each time that it is loaded.
        graphs: whether a variant's runs replay a CUDA graph, where one was asked for.
    """
    settled = partial(_settled, spec["pairs"], spec["tolerance"])
    watch = Watch(spec["gpu_uuid"], installed_nvml()) if spec["runtime"] in GPU_RUNTIMES else None
    # A collection in the middle of a run would be counted as its latency.
    gc.collect()
    gc.disable()
    try:
        found = interleave(runs, settled, spec["seconds"], spec["seed"], progress, during_rounds=watch)
    finally:
        gc.enable()
    return {
        "samples_ms": found.samples_ms,
        "converged": found.converged,
        "peak_rss_mib": peak_rss_mib(),
        "device_ms": _medians(found.device_ms),
        "cuda_graph": dict(graphs) or None,
        "gpu": watch and asdict(watch.result()),
    }


def _medians(samples: Samples) -> dict[str, float] | None:
    """The median of every variant; None where there are no samples."""
    flat = {name: [value for turn in turns for value in turn] for name, turns in samples.items()}
    return {name: median(values) for name, values in flat.items()} if all(flat.values()) else None


def _has_room(loads: int, before: int) -> bool:
    """Whether all networks can be loaded once more: that must take no more than half of the memory that is left.

    Args:
        loads: how often they are loaded now; the first time needs no room.
        before: bytes held before the first.
    """
    if not loads:
        return True
    each = (psutil.Process().memory_info().rss - before) / loads
    return each <= psutil.virtual_memory().available / 2


def load_feeds(path: Path, inputs: list[str], batch_size: int) -> Feeds:
    """The saved sample (leading dimension 1) repeated to the batch size."""
    with np.load(path) as arrays:
        return {name: np.repeat(arrays[f"arr_{index}"], batch_size, axis=0) for index, name in enumerate(inputs)}


def peak_rss_mib() -> float:
    """Most memory this process has held, in MiB."""
    try:
        # Not getrusage: Linux lets a child start with the peak of the parent that it was forked from.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows has no such module; there psutil tells the peak
        return float(getattr(psutil.Process().memory_info(), "peak_wset")) / 2**20  # noqa: B009 - unknown to mypy here
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def _settled(pairs: list[list[str]], tolerance: float, samples: Samples) -> bool:
    """The ratios of all pairs have settled; never without any pair."""
    return bool(pairs) and all(stable(samples[first], samples[second], tolerance) for first, second in pairs)


def print_progress(fraction: float) -> None:
    """Tells the parent how much is done, 0 to 1."""
    print(json.dumps({"progress": round(fraction, 3)}), flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
