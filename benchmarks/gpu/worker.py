"""Measure one runtime at several batch sizes in this process: `python -m gpu.worker SPEC.json RESULT.json`.

Loading a network and starting a GPU take longer than measuring it, so each file is loaded once for all sizes.
"""

import sys
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from time import perf_counter

from profilers import RawSamples, open_runner
from profilers.measure import LatencySpec
from profilers.runners.base import Runner, first_line
from profilers.worker_process import WorkerSpec, answer, print_progress
from profilers.workers.latency import LoadedRuns, measure_runs


@dataclass(frozen=True)
class GpuSpec(WorkerSpec):
    """``latency`` at each of the batch sizes; no size is begun later than ``stop_after_s``."""

    latency: LatencySpec
    batch_sizes: tuple[int, ...]
    stop_after_s: float


@dataclass(frozen=True)
class GpuResult:
    """Samples by batch size, and why other sizes failed. Sizes that were not begun are in neither."""

    samples: dict[str, RawSamples] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)


def measure(spec: GpuSpec) -> GpuResult:
    """Load every file once and measure all sizes that there is time for."""
    start = perf_counter()
    result, case = GpuResult(), spec.latency.case
    if spec.stop_after_s <= 0:
        return result
    with ExitStack() as opened:
        runners = {
            name: opened.enter_context(open_runner(case.runtime, network.builds[0], case.threads))
            for name, network in spec.latency.networks.items()
        }
        for number, size in enumerate(spec.batch_sizes):
            if perf_counter() - start > spec.stop_after_s:
                break
            try:
                result.samples[str(size)] = _at_size(
                    runners, replace(spec.latency, case=replace(case, batch_size=size))
                )
            except Exception as error:  # a size that does not fit on the device must not take the others with it
                result.failed[str(size)] = f"{type(error).__name__}: {first_line(error)}"
            print_progress((number + 1) / len(spec.batch_sizes))
    return result


def _at_size(runners: Mapping[str, Runner], spec: LatencySpec) -> RawSamples:
    runs = {
        name: [runner.prepare(spec.networks[name].sample.load(spec.case.batch_size))]
        for name, runner in runners.items()
    }
    graphs = {name: runner.cuda_graph for name, runner in runners.items() if runner.cuda_graph is not None}
    return measure_runs(LoadedRuns(runs, graphs), spec, lambda _: None)


if __name__ == "__main__":
    sys.exit(answer(sys.argv[1:], GpuSpec, measure))
