"""Work in a process of its own, so that a runtime that crashes takes nothing with it.

The parent calls `run_worker`, which starts ``python -m module SPEC.json RESULT.json``. The worker calls `answer`. Specs
and results are dataclasses. Progress goes to the worker's stdout, one ``{"progress": fraction}`` a line. If the worker
fails, the last line on its stderr says why.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Self, TypeVar

import numpy as np

from profilers.errors import ProfilingError
from profilers.plain import from_plain, to_json
from profilers.runners.base import Feeds, first_line

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Progress = Callable[[float], None]
"""Called with the fraction done, 0 to 1."""

S = TypeVar("S")
R = TypeVar("R")


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker has to do: its task in words for errors, like "measuring ort-cpu, batch 1", and its CPU threads."""

    task: str
    threads: int


@dataclass(frozen=True)
class SavedFeeds:
    """Feeds in an ``.npz`` file, whose arrays are in the order of ``names``."""

    file: Path
    names: tuple[str, ...]

    @classmethod
    def save(cls, file: Path, feeds: Feeds) -> Self:
        """Write ``feeds``."""
        np.savez(file, *feeds.values())
        return cls(file, tuple(feeds))

    def load(self, batch_size: int = 1) -> Feeds:
        """Read the feeds, with every array repeated ``batch_size`` times along its first dimension."""
        with np.load(self.file) as arrays:
            return {name: np.repeat(arrays[f"arr_{i}"], batch_size, axis=0) for i, name in enumerate(self.names)}


def run_worker(module: str, spec: WorkerSpec, result: type[R], progress: Progress) -> R:
    """Run ``module`` as a worker and return its result, which is a ``result``.

    Raises:
        ProfilingError: the worker failed; with its task and the last line it wrote to stderr.
    """
    progress(0.0)
    with tempfile.TemporaryDirectory(prefix="optin-worker-") as name:
        folder = Path(name)
        answer_file, errors, spec_file = folder / "result.json", folder / "stderr.txt", folder / "spec.json"
        spec_file.write_text(to_json(spec))
        # stderr goes to a file: a pipe that nobody reads would block a talkative runtime.
        with (
            errors.open("w") as stderr,
            subprocess.Popen(
                [sys.executable, "-m", module, str(spec_file), str(answer_file)],
                env=_worker_environment(spec.threads),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                text=True,
            ) as process,
        ):
            try:
                for line in process.stdout or ():
                    fraction = _fraction(line)
                    if fraction is not None:
                        progress(fraction)
                status = process.wait()
            except BaseException:
                process.kill()
                raise
        if status != 0:
            lines = [line.strip() for line in errors.read_text(errors="replace").splitlines() if line.strip()]
            raise ProfilingError(f"{spec.task} {_outcome(status)}: {lines[-1] if lines else 'it said nothing'}")
        progress(1.0)
        return from_plain(result, json.loads(answer_file.read_text()))


def answer(arguments: Sequence[str], spec: type[S], work: "Callable[[S], DataclassInstance]") -> int:
    """Do a worker's work and write the result; return the exit status.

    Args:
        arguments: the files of the spec and of the result.
        spec: type of the spec.
        work: computes the result from the spec.
    """
    spec_file, answer_file = map(Path, arguments)
    try:
        result = work(from_plain(spec, json.loads(spec_file.read_text())))
    except ProfilingError as error:
        print(error, file=sys.stderr)
        return 1
    except Exception as error:  # whatever the runtimes raise must reach the parent as one line
        traceback.print_exc()
        print(f"{type(error).__name__}: {first_line(error)}", file=sys.stderr)
        return 1
    unfinished = answer_file.with_suffix(".tmp")
    unfinished.write_text(to_json(result))
    unfinished.replace(answer_file)
    return 0


def print_progress(fraction: float) -> None:
    """Report to the parent how much is done, 0 to 1."""
    print(json.dumps({"progress": round(fraction, 3)}), flush=True)


def _worker_environment(threads: int) -> Mapping[str, str]:
    root = Path(__file__).parent.parent
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # The worker imports what this process imports, whatever their current folders, and nothing else: a file named
        # torch.py in the current folder must not come first.
        "PYTHONPATH": os.pathsep.join(str(Path(entry).resolve()) for entry in [*sys.path, str(root)]),
        "PYTHONSAFEPATH": "1",
    }


def _fraction(line: str) -> float | None:
    """Return the progress in a line of the worker's stdout; None for output of native libraries."""
    try:
        return float(json.loads(line)["progress"])
    except (ValueError, KeyError, TypeError):
        return None


def _outcome(status: int) -> str:
    if status >= 0:
        return "failed"
    hint = " (out of memory?)" if -status == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-status).name}{hint}"
