"""Where the time of one run goes: every operator's time, summed by the module it belongs to."""

import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np

from profilers.environment import usable_cores
from profilers.errors import ProfilingError
from profilers.isolated import Case, check_onnx, check_sample, run_worker
from profilers.runners.base import Feeds

LAYER_RUNTIMES = ("ort-cpu", "ort-cuda", "torch", "torch-cuda", "tensorrt", "rtx")
"""Runtimes that tell what each operator takes."""

OTHER = "other"
"""Stands for the module of operators that belong to none of those asked for."""


@dataclass(frozen=True)
class LayerRow:
    """All operators of one type in one module, without those in modules inside it that have rows of their own.

    Attributes:
        module: its dotted name, or `OTHER`.
        operator: type in the runtime's words ("MatMul", "linear", "gemm"), fused ones under their fused name.
        calls: how many there are in one run.
        ms: their time in one run in milliseconds, the mean over the middle half of the runs by their total.
    """

    module: str
    operator: str
    calls: int
    ms: float


@dataclass(frozen=True)
class LayerProfile:
    """What one run of one file consists of.

    Attributes:
        runtime: one of `LAYER_RUNTIMES`.
        batch_size: samples in one run.
        rows: in the order in which the modules first run.
        total_ms: median latency of a whole run without the profiler, taken in turns with profiled ones.
        profiled_ms: latency of the profiled runs that the rows are from, with what profiling itself takes.
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
        """What of a whole run is in no operator: at most what is in none in a profiled one, whatever the noise."""
        return min(max(0.0, self.total_ms - self.operators_ms), max(0.0, self.profiled_ms - self.operators_ms))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict whose keys are the attributes."""
        return {**asdict(self), "rows": [asdict(row) for row in self.rows]}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The profile that `to_dict` wrote; KeyError or TypeError on anything else."""
        return cls(**{**data, "rows": tuple(LayerRow(**row) for row in data["rows"])})


def layer_profile(
    runtime: str,
    path: Path,
    sample: Feeds,
    modules: Sequence[str],
    *,
    batch_size: int,
    threads: int | None = None,
    seconds: float = 5.0,
    seed: int = 0,
    onnx: Path | None = None,
    tf32: bool = False,
    progress: Callable[[float], None] = lambda _: None,
) -> LayerProfile:
    """Profiles one file in a process of its own, after the warm-up of `profilers.interleave`.

    On CUDA each operator waits for its kernels, since a launch's time says nothing of them: what the operators take
    then exceeds `total_ms` where launches overlap with computing.

    Args:
        runtime: one of `LAYER_RUNTIMES`.
        path: an ONNX file, an exported program (`.pt2`) for the torch runtimes, or an engine. Operators are told apart
            by the module names that torch's exporters leave in them; in a file without, all belong to `OTHER`.
        sample: input name to array of one sample, leading dimension 1; tiled to the batch size.
        modules: dotted names of submodules; an operator belongs to the innermost of them. They may stand in a wrapper:
            "blocks.0" is found in "module.blocks.0" too.
        batch_size: samples in one run.
        threads: CPU threads of one run; None takes all usable physical cores.
        seconds: time limit; warm-up comes on top.
        seed: of the order of turns.
        onnx: the file that an engine was built of, which has the module names; without it all belongs to `OTHER`.
        tf32: see `profilers.open_runner`.
        progress: called with the fraction done.

    Raises:
        ProfilingError: the runtime has no profile, the file is missing or has weights outside its own directory, the
            sample does not fit, or the worker failed.
    """
    if runtime not in LAYER_RUNTIMES:
        raise ProfilingError(f"runtime {runtime!r} has no profile by layer: choose from {', '.join(LAYER_RUNTIMES)}")
    if not path.is_file():
        raise ProfilingError(f"the file {path} does not exist")
    check_onnx(runtime, path)
    check_sample(sample)
    case = Case(runtime, batch_size, threads or usable_cores().physical, seconds, seed, tf32=tf32)
    with tempfile.TemporaryDirectory(prefix="optin-layers-") as folder:
        feeds = Path(folder, "feeds.npz")
        np.savez(feeds, *sample.values())
        spec = {
            **asdict(case),
            # The worker may stand in another folder.
            "file": str(path.resolve()),
            "onnx": onnx and str(onnx.resolve()),
            "modules": list(modules),
            "feeds": str(feeds),
            "inputs": list(sample),
            "folder": folder,
        }
        doing = f"profiling the layers at {case.name}"
        result = run_worker("profilers.workers.layers", spec, case.threads, doing, progress)
    return LayerProfile.from_dict({"runtime": runtime, "batch_size": batch_size, **result})
