"""Measure files against each other in a process of their own: one runtime, one batch size, any number of files."""

import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from profilers.errors import ProfilingError
from profilers.external_data import reading_elsewhere
from profilers.gpu_watch import GpuWatch, cuda_uuid
from profilers.interleave import Samples
from profilers.runners.base import Feeds
from profilers.runners.registry import SPECS
from profilers.stats import TOLERANCE
from profilers.worker_process import Progress, SavedFeeds, WorkerSpec, run_worker


@dataclass(frozen=True)
class Case:
    """One measurement of a file.

    Attributes:
        runtime: a key of `RUNTIMES`.
        batch_size: samples in one run.
        threads: CPU threads of one run.
        seconds: time limit of the rounds, without loading and warm-up.
        seed: of the order of turns.
        tolerance: relative; the measurement ends early once the ratios have settled to it.
        loads: how often to load each file, see `loads_for`; fewer times if memory is short.
        tf32: whether float32 may use TF32 on a GPU, see `open_runner`.
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
        """Runtime and batch size in words."""
        return f"{self.runtime}, batch {self.batch_size}"


# Of one file, in one process.
MOST_LOADS = 6
_LOADED_BYTES = 2 * 2**30


def loads_for(runtime: str, files: Iterable[Path]) -> int:
    """Return how often to load each file, to average over the places in memory where a network can be.

    Six times, fewer if that would hold more than 2 GiB. Once for PyTorch, which takes seconds to load a program and
    longer to compile it; on a GPU, whose memory is not watched; and without files.
    """
    sizes = [file.stat().st_size for file in files if file.is_file()]
    if not sizes or SPECS[runtime].artifact != "onnx" or SPECS[runtime].device == "cuda":
        return 1
    return max(1, min(MOST_LOADS, _LOADED_BYTES // max(1, sum(sizes))))


@dataclass(frozen=True)
class RawSamples:
    """Samples of a measurement.

    Attributes:
        samples_ms: name to latencies in milliseconds, rounds × repeats. Round r is of load r modulo ``loads``; of
            several builds, it is of build r modulo their number.
        converged, peak_rss_mib, device_ms, cuda_graph, gpu: see `Measurement`.
        loads: how often each file was loaded.
    """

    samples_ms: Samples
    converged: bool
    peak_rss_mib: float
    loads: int = 1
    device_ms: dict[str, float] | None = None
    cuda_graph: dict[str, bool] | None = None
    gpu: GpuWatch | None = None


@dataclass(frozen=True)
class NetworkFiles:
    """The files of one network, several if its engine was built several times, and its sample."""

    builds: tuple[Path, ...]
    sample: SavedFeeds


@dataclass(frozen=True)
class LatencySpec(WorkerSpec):
    """The work of `profilers.workers.latency`, see `measure_files`; ``gpu_uuid`` is that of `cuda_uuid`."""

    case: Case
    networks: dict[str, NetworkFiles]
    pairs: tuple[tuple[str, str], ...]
    gpu_uuid: str | None = None


def measure_files(
    files: Mapping[str, Path | Sequence[Path]],
    sample: Feeds,
    case: Case,
    pairs: Sequence[tuple[str, str]],
    progress: Progress = lambda _: None,
) -> RawSamples:
    """Run all files in turns, round after round, until the ratios of ``pairs`` have settled or the time is up.

        files = {"dense": Path("dense.onnx"), "pruned": Path("pruned.onnx")}
        raw = measure_files(files, sample, Case("ort-cpu", 1, threads=4, seconds=5), [("dense", "pruned")])

    Args:
        files: name to a file of the runtime's kind, or to several builds of one network, which take its turns one after
            the other. A file with two names is loaded twice.
        sample: input name to array of one sample, leading dimension 1; repeated to the batch size.
        case: runtime, batch size, threads and time.
        pairs: names whose ratios must settle; without pairs the measurement takes all the time.
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
    progress: Progress = lambda _: None,
) -> RawSamples:
    """Do as `measure_files` for networks with different inputs: every file has its own sample."""
    builds = {name: (path,) if isinstance(path, Path) else tuple(path) for name, (path, _) in files.items()}
    for name, (_, sample) in files.items():
        check_sample(sample)
        for file in builds[name]:
            check_file(case.runtime, file, f"the {name} network's file")
    with tempfile.TemporaryDirectory(prefix="optin-profile-") as folder:
        networks = {
            name: NetworkFiles(builds[name], SavedFeeds.save(Path(folder, f"{number}.npz"), sample))
            for number, (name, (_, sample)) in enumerate(files.items())
        }
        # Read here, because loading torch would add to the memory of a worker that runs something else.
        uuid = cuda_uuid() if SPECS[case.runtime].device == "cuda" else None
        spec = LatencySpec(f"measuring {case.name}", case.threads, case, networks, tuple(pairs), uuid)
        return run_worker("profilers.workers.latency", spec, RawSamples, progress)


def check_file(runtime: str, file: Path, what: str = "the file") -> None:
    """Raise ProfilingError if a file does not exist, or is an ONNX file with weights outside its own directory.

    Checked before a worker starts, because the check would add to its peak memory.
    """
    if not file.is_file():
        raise ProfilingError(f"{what} {file} does not exist")
    if SPECS[runtime].artifact == "onnx" and (elsewhere := reading_elsewhere(file.resolve())):
        raise ProfilingError(elsewhere)


def check_sample(sample: Feeds) -> None:
    """Raise ProfilingError unless every array holds one sample."""
    for key, array in sample.items():
        if array.ndim == 0 or array.shape[0] != 1:
            raise ProfilingError(f"sample {key!r} has shape {array.shape}: its leading dimension must be 1")
