"""Profile one file by layer, see `LayerSpec`: ``python -m profilers.workers.layers SPEC.json RESULT.json``."""

import gc
import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pkgutil import resolve_name
from statistics import fmean, median

from profilers.interleave import WARM_UP_RUNS, RoundPlan, Samples, interleave
from profilers.layer_profilers import Operator, ProfiledRuns, ProfileInputs
from profilers.layer_times import OTHER, LayerProfile, LayerRow, LayerSpec
from profilers.runners import open_runner
from profilers.runners.base import RunSettings
from profilers.runners.registry import SPECS
from profilers.worker_process import answer, print_progress

# A median over so many runs is stable, and reading a profile of thousands of runs takes long.
_RUNS = 100


def main(arguments: Sequence[str]) -> int:
    """Profile; return the exit status."""
    return answer(arguments, LayerSpec, measure)


def measure(spec: LayerSpec) -> LayerProfile:
    """Run the file without and with the profiler, in turns."""
    case, runtime = spec.case, SPECS[spec.case.runtime]
    if runtime.provider == "CUDAExecutionProvider":
        # ONNX Runtime's profiler times the host, which by default does not wait for the GPU. Read when CUDA starts.
        os.environ["CUDA_LAUNCH_BLOCKING"] = "1"
    settings, feeds = RunSettings(case.threads, case.tf32), spec.sample.load(case.batch_size)
    inputs = ProfileInputs(feeds, spec.sample.file.parent, spec.onnx, partial(innermost, modules=spec.modules))
    profiled: ProfiledRuns = resolve_name(str(runtime.layer_profiler))(spec.file, runtime, settings, inputs)
    with open_runner(case.runtime, spec.file, case.threads, tf32=case.tf32) as runner:
        variants = {"plain": [runner.prepare(feeds)], "profiled": [profiled.run]}
        gc.collect()
        gc.disable()
        samples = interleave(variants, RoundPlan(case.seconds, _enough, case.seed), print_progress).samples_ms
        gc.enable()
    record = profiled.finish()
    runs = typical(record.times_ms, skip=WARM_UP_RUNS)
    times_ms = [fmean(times) for times in zip(*(record.times_ms[run] for run in runs), strict=True)]
    return LayerProfile(
        case.runtime,
        case.batch_size,
        sum_by_module(record.operators, times_ms, spec.modules),
        total_ms=median(ms for turn in samples["plain"] for ms in turn),
        profiled_ms=fmean(record.whole_ms[run] for run in runs),
    )


def typical(times_ms: Sequence[Sequence[float]], skip: int) -> list[int]:
    """Return the runs to average over: without the first ``skip``, the middle half by their total.

    The median of each operator over all runs would not do: interruptions hit another operator in every run, so their
    time would be missing from the sum.

    Args:
        times_ms: runs × operators.
        skip: number of runs to leave out at the beginning.
    """
    ordered = sorted(range(skip, len(times_ms)), key=lambda run: sum(times_ms[run]))
    return ordered[len(ordered) // 4 : len(ordered) - len(ordered) // 4]


def sum_by_module(
    operators: Sequence[Operator], times_ms: Sequence[float], modules: Sequence[str]
) -> tuple[LayerRow, ...]:
    """Return rows by module and operator type, in the order of ``operators``."""
    rows: dict[tuple[str, str], LayerRow] = {}
    for operator, ms in zip(operators, times_ms, strict=True):
        key = innermost(operator.path, modules), operator.type
        row = rows.get(key, LayerRow(*key, calls=0, ms=0.0))
        rows[key] = replace(row, calls=row.calls + 1, ms=row.ms + ms)
    return tuple(rows.values())


def innermost(path: str, modules: Sequence[str]) -> str:
    """Return the innermost of ``modules`` that contains ``path``, or `OTHER`.

    The first part of the path may be a wrapper's name. There may be more wrappers, which call what they wrap "module".
    """
    candidates = [path, path.partition(".")[2]]
    while candidates[-1].startswith("module."):
        candidates.append(candidates[-1].removeprefix("module."))
    inside = [name for name in modules if any(f"{candidate}.".startswith(f"{name}.") for candidate in candidates)]
    return max(inside, key=len, default=OTHER)


def _enough(samples: Samples) -> bool:
    return sum(map(len, samples["profiled"])) >= _RUNS


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
