"""What a file gives for inputs, computed in a process of its own: a runtime that crashes takes nothing with it."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from profilers.environment import usable_cores
from profilers.errors import ProfilingError
from profilers.isolated import check_onnx, run_worker
from profilers.runners import RUNTIMES
from profilers.runners.base import Feeds


def infer_file(runtime: str, file: Path, batches: Sequence[Feeds], threads: int | None = None) -> list[Feeds]:
    """The outputs, by their names, for each of the batches.

    Args:
        runtime: one of `RUNTIMES`.
        file: of the kind that the runtime takes.
        batches: input name to array, batch first.
        threads: CPU threads of one run; None takes all usable physical cores.

    Raises:
        ProfilingError: the runtime is unknown, the file is missing or has weights outside its own directory, or the
            worker failed.
    """
    if runtime not in RUNTIMES:
        raise ProfilingError(f"unknown runtime {runtime!r}: choose from {', '.join(RUNTIMES)}")
    if not file.is_file():
        raise ProfilingError(f"the file {file} does not exist")
    check_onnx(runtime, file)
    threads = threads or usable_cores().physical
    with tempfile.TemporaryDirectory(prefix="optin-infer-") as name:
        folder = Path(name)
        told: list[dict[str, Any]] = []
        for number, batch in enumerate(batches):
            feeds = folder / f"{number}.npz"
            np.savez(feeds, *batch.values())
            told.append({"feeds": str(feeds), "inputs": list(batch), "outputs": str(folder / f"{number}.out.npz")})
        # The worker may stand in another folder.
        spec = {"runtime": runtime, "file": str(file.resolve()), "threads": threads, "batches": told}
        result = run_worker("profilers.workers.inference", spec, threads, f"running {file.name}", lambda _: None)
        return [_outputs(Path(each["outputs"]), names) for each, names in zip(told, result["outputs"], strict=True)]


def _outputs(path: Path, names: Sequence[str]) -> Feeds:
    with np.load(path) as arrays:
        return {name: arrays[f"arr_{index}"] for index, name in enumerate(names)}
