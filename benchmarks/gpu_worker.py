"""The isolated process that measures one runtime at several batch sizes: `python -m gpu_worker SPEC.json`.

Loading a network and starting a GPU take longer than measuring it, so each file is loaded once for all sizes. The spec
holds `runtime`, `batch_sizes`, `threads`, `seconds` (time limit of the rounds of one size), `stop_after_s` (no size is
begun later than that), `files` (variant name to file), `feeds` (an `.npz` with one sample, arrays in the order of
`inputs`), `inputs` (their names), `pairs` (of variants, whose ratios must settle), and `result`, the JSON file to
write: by batch size, what `profilers.worker` gives, or `failed`, why there is nothing. Sizes that were not begun are
not in it.
"""

import gc
import sys
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from time import perf_counter
from typing import Any

from profilers import open_runner
from profilers.interleave import Samples, interleave
from profilers.runners.base import Runner, first_line
from profilers.statistics import TOLERANCE, stable
from profilers.worker import answer, load_feeds, peak_rss_mib, print_progress


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
    # A collection in the middle of a run would be counted as its latency.
    gc.collect()
    gc.disable()
    try:
        samples, converged = interleave(
            runs, lambda samples: _settled(samples, spec["pairs"]), spec["seconds"], 0, lambda _: None
        )
    finally:
        gc.enable()
    return {"samples_ms": samples, "converged": converged, "peak_rss_mib": peak_rss_mib()}


def _settled(samples: Samples, pairs: list[list[str]]) -> bool:
    return all(stable(samples[first], samples[second], TOLERANCE) for first, second in pairs)


if __name__ == "__main__":
    sys.exit(answer(sys.argv[1:], measure))
