"""The isolated process that measures one runtime at several batch sizes: `python -m gpu.worker SPEC.json`.

Loading a network and starting a GPU take longer than measuring it, so each file is loaded once for all sizes. The spec
holds `runtime`, `batch_sizes`, `threads`, `seconds` (time limit of the rounds of one size), `stop_after_s` (no size is
begun later than that), `files` (variant name to file), `feeds` (an `.npz` with one sample, arrays in the order of
`inputs`), `inputs` (their names), `pairs`, `tolerance`, `seed` and `gpu_uuid` as in `profilers.workers.latency`, and
`result`, the JSON file to write: by batch size the result of `profilers.workers.latency`, or `failed`, the reason why
there is none. Sizes that were not begun are not in it.
"""

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

from profilers import open_runner
from profilers.runners.base import Runner, first_line
from profilers.workers.latency import answer, load_feeds, measure_runs, print_progress


def measure(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Load every file once and measure all sizes that there is time for."""
    start = perf_counter()
    found: dict[str, Any] = {}
    if spec["stop_after_s"] <= 0:
        return found
    with ExitStack() as opened:
        runners = {
            name: opened.enter_context(open_runner(spec["runtime"], Path(file), spec["threads"]))
            for name, file in spec["files"].items()
        }
        for size in spec["batch_sizes"]:
            if perf_counter() - start > spec["stop_after_s"]:
                break
            try:
                found[str(size)] = _at_size(runners, size, spec)
            except Exception as error:  # a size that does not fit on the device must not take the others with it
                found[str(size)] = {"failed": f"{type(error).__name__}: {first_line(error)}"}
            print_progress(len(found) / len(spec["batch_sizes"]))
    return found


def _at_size(runners: Mapping[str, Runner], size: int, spec: Mapping[str, Any]) -> dict[str, Any]:
    feeds = load_feeds(Path(spec["feeds"]), spec["inputs"], size)
    runs = {name: [runner.prepare(feeds)] for name, runner in runners.items()}
    graphs = {name: runner.cuda_graph for name, runner in runners.items() if runner.cuda_graph is not None}
    return measure_runs(runs, graphs, spec, lambda _: None)


if __name__ == "__main__":
    sys.exit(answer(sys.argv[1:], measure))
