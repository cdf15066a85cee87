"""Where the time of one run goes: the time of every operator, summed by the module it belongs to."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from profilers.errors import ProfilingError
from profilers.measure import Case, check_file, check_sample
from profilers.runners.base import Feeds
from profilers.runners.registry import LAYER_RUNTIMES
from profilers.worker_process import Progress, SavedFeeds, WorkerSpec, run_worker

OTHER = "other"
"""The module of operators that belong to none of those asked for."""


@dataclass(frozen=True)
class LayerRow:
    """All operators of one type in one module, without those in inner modules that have rows of their own.

    Attributes:
        module: its dotted name, or `OTHER`.
        operator: type in the runtime's words ("MatMul", "linear", "gemm"); a fused operator has its fused name.
        calls: number of operators in one run.
        ms: their time in one run in milliseconds: the mean over the middle half of the runs by total time.
    """

    module: str
    operator: str
    calls: int
    ms: float


@dataclass(frozen=True)
class LayerProfile:
    """The time of one run of one file, by operator.

    Attributes:
        runtime: one of `LAYER_RUNTIMES`.
        batch_size: samples in one run.
        rows: in the order in which the modules first run.
        total_ms: median latency of a run without the profiler; such runs take turns with profiled ones.
        profiled_ms: latency of the profiled runs that the rows are from, with the overhead of profiling.
    """

    runtime: str
    batch_size: int
    rows: tuple[LayerRow, ...]
    total_ms: float
    profiled_ms: float

    @property
    def operators_ms(self) -> float:
        """Time inside operators."""
        return sum(row.ms for row in self.rows)

    @property
    def overhead_ms(self) -> float:
        """Time of a run outside operators, at most that of a profiled run, so that noise does not exceed it."""
        return min(max(0.0, self.total_ms - self.operators_ms), max(0.0, self.profiled_ms - self.operators_ms))


@dataclass(frozen=True)
class LayerSpec(WorkerSpec):
    """The work of `profilers.workers.layers`; see `layer_profile`."""

    case: Case
    file: Path
    onnx: Path | None
    modules: tuple[str, ...]
    sample: SavedFeeds


def layer_profile(
    case: Case,
    file: Path,
    sample: Feeds,
    modules: Sequence[str],
    *,
    onnx: Path | None = None,
    progress: Progress = lambda _: None,
) -> LayerProfile:
    """Profile one file in a process of its own, after the warm-up of `profilers.interleave`.

        case = Case("ort-cpu", batch_size=1, threads=4, seconds=5)
        profile = layer_profile(case, Path("net.onnx"), sample, ["blocks.0.attn", "blocks.0.mlp"])

    On CUDA each operator waits for its kernels, because the time of a launch says nothing about them. The sum over
    operators then exceeds ``total_ms`` if launches overlap with computing.

    Args:
        case: what to measure, at one of `LAYER_RUNTIMES`; ``tolerance`` and ``loads`` have no effect.
        file: of the runtime's kind. Operators are assigned by the module names that torch's exporters write into it; in
            a file without them, all belong to `OTHER`.
        sample: input name to array of one sample, leading dimension 1; repeated to the batch size.
        modules: dotted names of submodules. An operator belongs to the innermost of them. They may be inside a wrapper:
            "blocks.0" also matches "module.blocks.0".
        onnx: the file that an engine was built from, which has the module names; without it all belongs to `OTHER`.
        progress: called with the fraction done.

    Raises:
        ProfilingError: the runtime has no profile, the file is missing or has weights outside its own directory, the
            sample does not fit, or the worker failed.
    """
    if case.runtime not in LAYER_RUNTIMES:
        known = ", ".join(LAYER_RUNTIMES)
        raise ProfilingError(f"runtime {case.runtime!r} has no profile by layer: choose from {known}")
    check_file(case.runtime, file)
    check_sample(sample)
    with tempfile.TemporaryDirectory(prefix="optin-layers-") as folder:
        feeds = SavedFeeds.save(Path(folder, "feeds.npz"), sample)
        task = f"profiling the layers at {case.name}"
        spec = LayerSpec(task, case.threads, case, file, onnx, tuple(modules), feeds)
        return run_worker("profilers.workers.layers", spec, LayerProfile, progress)
