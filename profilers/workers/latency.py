"""Measure one `LatencySpec` in this process: ``python -m profilers.workers.latency SPEC.json RESULT.json``."""

import gc
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import psutil

from profilers.gpu_watch import Watch, installed_nvml
from profilers.interleave import RoundPlan, Samples, interleave
from profilers.measure import LatencySpec, RawSamples
from profilers.runners import open_runner
from profilers.runners.base import Run
from profilers.runners.registry import SPECS
from profilers.stats import stable
from profilers.worker_process import answer, print_progress


def main(arguments: Sequence[str]) -> int:
    """Measure; return the exit status."""
    return answer(arguments, LatencySpec, measure)


@dataclass(frozen=True)
class LoadedRuns:
    """Runs of each network, one for each load of each build; whether they replay a CUDA graph, if asked to; loads."""

    runs: Mapping[str, Sequence[Run]]
    cuda_graph: dict[str, bool]
    loads: int = 1


def measure(spec: LatencySpec) -> RawSamples:
    """Load the networks and measure them.

    If the engine of one network cannot be captured in a CUDA graph, no network uses one: otherwise the ratio would
    compare two ways of launching.
    """
    with ExitStack() as opened:
        loaded = _load(spec, opened, cuda_graphs=True)
        if len(set(loaded.cuda_graph.values())) < 2:
            return measure_runs(loaded, spec, print_progress)
    with ExitStack() as opened:
        return measure_runs(_load(spec, opened, cuda_graphs=False), spec, print_progress)


def _load(spec: LatencySpec, opened: ExitStack, *, cuda_graphs: bool) -> LoadedRuns:
    """Load all networks as often as the spec says and memory allows; ``opened`` frees them."""
    case = spec.case
    runs: dict[str, list[Run]] = {name: [] for name in spec.networks}
    graphs: dict[str, bool] = {}
    before = psutil.Process().memory_info().rss
    loads = 0
    while loads < case.loads and _has_room(loads, before):
        for name, network in spec.networks.items():
            feeds = network.sample.load(case.batch_size)
            for file in network.builds:
                runner = open_runner(case.runtime, file, case.threads, tf32=case.tf32, cuda_graphs=cuda_graphs)
                run = opened.enter_context(runner).prepare(feeds)
                # The first run allocates the memory that a network needs next to its weights.
                run()
                runs[name].append(run)
                if runner.cuda_graph is not None:
                    graphs[name] = graphs.get(name, True) and runner.cuda_graph
        loads += 1
    return LoadedRuns(runs, graphs, loads)


def measure_runs(loaded: LoadedRuns, spec: LatencySpec, progress: Callable[[float], None]) -> RawSamples:
    """Measure loaded networks in turns."""

    def settled(samples: Samples) -> bool:
        ratios = ((samples[first], samples[second]) for first, second in spec.pairs)
        return bool(spec.pairs) and all(stable(*pair, spec.case.tolerance) for pair in ratios)

    plan = RoundPlan(spec.case.seconds, settled, spec.case.seed)
    watch = Watch(spec.gpu_uuid, installed_nvml()) if SPECS[spec.case.runtime].device == "cuda" else None
    # A garbage collection in the middle of a run would count as latency.
    gc.collect()
    gc.disable()
    try:
        result = interleave(loaded.runs, plan, progress, during_rounds=watch)
    finally:
        gc.enable()
    return RawSamples(
        result.samples_ms,
        result.converged,
        peak_rss_mib(),
        loaded.loads,
        _medians(result.device_ms),
        loaded.cuda_graph or None,
        watch.result() if watch is not None else None,
    )


def _medians(samples: Samples) -> dict[str, float] | None:
    """Return the median of every network; None without samples."""
    flat = {name: [value for turn in turns for value in turn] for name, turns in samples.items()}
    return {name: median(values) for name, values in flat.items()} if all(flat.values()) else None


def _has_room(loads: int, before: int) -> bool:
    """Return whether loading all networks once more takes at most half of the available memory.

    Args:
        loads: how often they are loaded now; the first time needs no room.
        before: bytes that the process held before the first.
    """
    if not loads:
        return True
    bytes_per_load = (psutil.Process().memory_info().rss - before) / loads
    return bytes_per_load <= psutil.virtual_memory().available / 2


def peak_rss_mib() -> float:
    """Return the most memory this process has held, in MiB."""
    try:
        # Not getrusage: on Linux a child starts with the peak of the parent it was forked from.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows has no such module; there psutil has the peak
        return float(getattr(psutil.Process().memory_info(), "peak_wset")) / 2**20  # noqa: B009 - unknown to mypy here
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
