"""The outputs of a file, computed in a process of its own."""

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from profilers.environment import usable_cores
from profilers.errors import ProfilingError
from profilers.measure import check_file
from profilers.runners.base import Feeds
from profilers.runners.registry import SPECS
from profilers.worker_process import SavedFeeds, WorkerSpec, run_worker


@dataclass(frozen=True)
class InferenceSpec(WorkerSpec):
    """The work of `profilers.workers.inference`: run ``file`` on every batch."""

    runtime: str
    file: Path
    batches: tuple[SavedFeeds, ...]


@dataclass(frozen=True)
class InferenceResult:
    """The outputs of each batch."""

    outputs: tuple[SavedFeeds, ...]


def infer_file(runtime: str, file: Path, batches: Sequence[Feeds], threads: int | None = None) -> list[Feeds]:
    """Return the outputs, by their names, for each of the batches.

    Args:
        runtime: a key of `RUNTIMES`.
        file: of the kind that the runtime runs.
        batches: input name to array, batch first.
        threads: CPU threads of one run; None takes all usable physical cores.

    Raises:
        ProfilingError: the runtime is unknown, the file is missing or has weights outside its own directory, or the
            worker failed.
    """
    if runtime not in SPECS:
        raise ProfilingError(f"unknown runtime {runtime!r}: choose from {', '.join(SPECS)}")
    check_file(runtime, file)
    with tempfile.TemporaryDirectory(prefix="optin-infer-") as folder:
        saved = tuple(SavedFeeds.save(Path(folder, f"{i}.npz"), batch) for i, batch in enumerate(batches))
        spec = InferenceSpec(f"running {file.name}", threads or usable_cores().physical, runtime, file, saved)
        result = run_worker("profilers.workers.inference", spec, InferenceResult, lambda _: None)
        return [outputs.load() for outputs in result.outputs]
