"""Measures files against each other in a process of their own: one runtime, one batch size, any number of files."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from profilers.errors import ProfilingError
from profilers.external_data import reading_elsewhere
from profilers.gpu_watch import cuda_uuid
from profilers.interleave import Samples
from profilers.runners import GPU_RUNTIMES, RUNTIMES
from profilers.runners.base import Feeds
from profilers.stats import TOLERANCE


@dataclass(frozen=True)
class Case:
    """What is measured how.

    Attributes:
        runtime: one of `RUNTIMES`.
        batch_size: samples in one run.
        threads: CPU threads of one run.
        seconds: time limit of the rounds; loading and warm-up come on top.
        seed: of the order of turns.
        tolerance: relative, to which ratios must settle before the time is up.
        loads: how often each file is loaded, see `loads_for`; less often where memory is short.
        tf32: whether a GPU may use it for float32, see `open_runner`.
    """

    runtime: str
    batch_size: int
    threads: int
    seconds: float
    seed: int = 0
    tolerance: float = TOLERANCE
    loads: int = 1
    tf32: bool = False

    @property
    def name(self) -> str:
        """In words."""
        return f"{self.runtime}, batch {self.batch_size}"


# Of one file, in one process.
MOST_LOADS = 6
_LOADED_BYTES = 2 * 2**30


def loads_for(runtime: str, files: Iterable[Path]) -> int:
    """How often to load each file, so that where in memory a network happens to lie evens out.

    Six times, less where that would hold more than 2 GiB; once for PyTorch, which takes seconds to load a program and
    longer to compile it, on a GPU, whose memory is not watched, and without any files.
    """
    sizes = [file.stat().st_size for file in files if file.is_file()]
    if not sizes or RUNTIMES[runtime] != "onnx" or runtime in GPU_RUNTIMES:
        return 1
    return max(1, min(MOST_LOADS, _LOADED_BYTES // max(1, sum(sizes))))


class Measured(NamedTuple):
    """Samples in milliseconds (name to rounds × repeats), whether they had settled, the peak memory, how often each
    file was loaded: its turns are those of its loads, one after the other; and on a GPU `device_ms`, `cuda_graph` and
    `gpu`, see `Measurement`. Of several builds, round r is that of the build r modulo their number."""

    samples_ms: Samples
    converged: bool
    peak_rss_mib: float
    loads: int
    device_ms: dict[str, float] | None = None
    cuda_graph: dict[str, bool] | None = None
    gpu: dict[str, Any] | None = None


def measure_files(
    files: Mapping[str, Path | Sequence[Path]],
    sample: Feeds,
    case: Case,
    pairs: Sequence[tuple[str, str]],
    progress: Callable[[float], None] = lambda _: None,
) -> Measured:
    """Interleave runs of all files, round after round, until the ratios of ``pairs`` have settled or time is up.

    Args:
        files: name to a file that the runtime takes, or to several builds of one network, which take its turns one
            after the other; one file under two names is loaded twice.
        sample: input name to array of one sample, leading dimension 1; tiled to the batch size.
        case: runtime, batch size, threads and time.
        pairs: names whose ratios must settle; without any the whole time is used.
        progress: called with the fraction done.

    Raises:
        ProfilingError: a file is missing or has weights outside its own directory, the sample does not fit, or the
            worker failed.
    """
    return measure_each({name: (file, sample) for name, file in files.items()}, case, pairs, progress)


def measure_each(
    files: Mapping[str, tuple[Path | Sequence[Path], Feeds]],
    case: Case,
    pairs: Sequence[tuple[str, str]],
    progress: Callable[[float], None] = lambda _: None,
) -> Measured:
    """`measure_files` for networks that do not take the same inputs: each file comes with its own sample."""
    for name, (given, sample) in files.items():
        check_sample(sample)
        for file in _builds(given):
            if not file.is_file():
                raise ProfilingError(f"the {name} network's file {file} does not exist")
            check_onnx(case.runtime, file)
    with tempfile.TemporaryDirectory(prefix="optin-profile-") as folder:
        variants = {}
        for number, (name, (given, sample)) in enumerate(files.items()):
            feeds = Path(folder, f"{number}.npz")
            np.savez(feeds, *sample.values())
            # The worker may stand in another folder.
            builds = [str(file.resolve()) for file in _builds(given)]
            variants[name] = {"files": builds, "feeds": str(feeds), "inputs": list(sample)}
        # Found here, since loading torch would add to the memory of a worker that runs something else.
        uuid = cuda_uuid() if case.runtime in GPU_RUNTIMES else None
        spec = {**asdict(case), "gpu_uuid": uuid, "variants": variants, "pairs": list(pairs)}
        return Measured(
            **run_worker("profilers.workers.latency", spec, case.threads, f"measuring {case.name}", progress)
        )


def _builds(files: Path | Sequence[Path]) -> Sequence[Path]:
    return [files] if isinstance(files, Path) else files


def check_onnx(runtime: str, file: Path) -> None:
    """ProfilingError where ``runtime`` takes ONNX files and this one has weights outside its own directory.

    Told before a worker starts, in whose peak memory the check would show.
    """
    if RUNTIMES[runtime] == "onnx" and (elsewhere := reading_elsewhere(file.resolve())):
        raise ProfilingError(elsewhere)


def check_sample(sample: Feeds) -> None:
    """ProfilingError unless every array holds one sample."""
    for key, array in sample.items():
        if array.ndim == 0 or array.shape[0] != 1:
            raise ProfilingError(f"sample {key!r} has shape {array.shape}: its leading dimension must be 1")


def run_worker(
    module: str, spec: Mapping[str, Any], threads: int, doing: str, progress: Callable[[float], None]
) -> dict[str, Any]:
    """What ``python -m module SPEC.json`` wrote to the spec's ``result``, with progress as it goes.

    ProfilingError with the last line the process said, after what it was ``doing``, when it fails.
    """
    progress(0.0)
    with tempfile.TemporaryDirectory(prefix="optin-worker-") as name:
        folder = Path(name)
        result, errors, spec_path = folder / "result.json", folder / "stderr.txt", folder / "spec.json"
        spec_path.write_text(json.dumps({**spec, "result": str(result)}))
        # stderr goes to a file: a pipe that nobody reads would block a talkative runtime.
        with (
            errors.open("w") as stderr,
            subprocess.Popen(
                [sys.executable, "-m", module, str(spec_path)],
                env=_worker_environment(threads),
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
            raise ProfilingError(f"{doing} {_ending(status)}: {lines[-1] if lines else 'it said nothing'}")
        progress(1.0)
        return json.loads(result.read_text())


def _worker_environment(threads: int) -> dict[str, str]:
    parent = Path(__file__).parent.parent
    return {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        # The worker finds what this process finds, wherever either of them stands, and nothing else: a file named
        # torch.py in the current folder must not come first.
        "PYTHONPATH": os.pathsep.join(str(Path(entry).resolve()) for entry in [*sys.path, str(parent)]),
        "PYTHONSAFEPATH": "1",
    }


def _fraction(line: str) -> float | None:
    """The progress that a line of the worker's stdout tells; None for the chatter of native libraries."""
    try:
        return float(json.loads(line)["progress"])
    except (ValueError, KeyError, TypeError):
        return None


def _ending(status: int) -> str:
    if status >= 0:
        return "failed"
    hint = " (out of memory?)" if -status == signal.SIGKILL else ""
    return f"was killed by {signal.Signals(-status).name}{hint}"
