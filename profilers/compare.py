"""Measures a pruned network against its dense original, each case in a process of its own."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from . import interleave
from .environment import environment, usable_cores
from .errors import ProfilingError
from .results import Comparison, Measurement
from .runners import RUNTIMES
from .runners.base import Feeds
from .statistics import STABLE_ROUNDS, TOLERANCE

Progress = Callable[[float, str], None]


@dataclass(frozen=True)
class Variant:
    """The files of one network: its ONNX file, and its exported program (`.pt2`) for the torch runtimes."""

    onnx: Path
    program: Path | None = None


@dataclass(frozen=True)
class ProfileConfig:
    """What to measure.

    Attributes:
        runtimes: names from `RUNTIMES`.
        batch_sizes: samples in one run, each size a case of its own.
        threads: CPU threads of one run; None takes all usable physical cores.
        seconds: time limit of the rounds of one case; loading and warm-up (a second or two) come on top.
        seed: of the order of turns and of the bootstrap.

    Raises:
        ValueError: a field is out of range; one line says which.
    """

    runtimes: tuple[str, ...] = ("ort-cpu", "torch")
    batch_sizes: tuple[int, ...] = (1, 8)
    threads: int | None = None
    seconds: float = 10.0
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [name for name in self.runtimes if name not in RUNTIMES]
        if unknown or not self.runtimes:
            asked = f"unknown runtime {unknown[0]!r}" if unknown else "no runtime given"
            raise ValueError(f"{asked}: choose from {', '.join(RUNTIMES)}")
        if not self.batch_sizes or min(self.batch_sizes) < 1:
            raise ValueError(f"batch sizes must be 1 or more, not {self.batch_sizes}")
        if self.threads is not None and self.threads < 1:
            raise ValueError(f"threads must be 1 or more, not {self.threads}")
        if not self.seconds > 0:
            raise ValueError(f"seconds must be more than 0, not {self.seconds}")
        if self.seed < 0:
            raise ValueError(f"seed must be 0 or more, not {self.seed}")


def compare(
    dense: Variant,
    pruned: Variant,
    sample: Feeds,
    config: ProfileConfig,
    progress: Progress | None = None,
) -> Comparison:
    """Measures both variants at every runtime and batch size of the config.

    Args:
        dense: the original's files.
        pruned: the smaller network's files, with the same inputs.
        sample: input name to array of one sample, leading dimension 1; tiled to each batch size.
        config: what to measure.
        progress: called with the fraction done, 0 to 1, and the case at hand, in words.

    Raises:
        ProfilingError: a file that a runtime needs is missing, the sample does not fit, or a worker failed.
    """
    _check(dense, pruned, sample, config)
    threads = config.threads or usable_cores().physical
    cases = [(runtime, batch_size) for runtime in config.runtimes for batch_size in config.batch_sizes]
    measurements = []
    with tempfile.TemporaryDirectory(prefix="optin-profile-") as folder:
        feeds = Path(folder, "feeds.npz")
        np.savez(feeds, *sample.values())
        for index, (runtime, batch_size) in enumerate(cases):
            spec = {
                "runtime": runtime,
                "batch_size": batch_size,
                "threads": threads,
                "seconds": config.seconds,
                "seed": config.seed,
                "variants": {"dense": str(_file(dense, runtime)), "pruned": str(_file(pruned, runtime))},
                "feeds": str(feeds),
                "inputs": list(sample),
            }
            name = f"{runtime}, batch {batch_size}"
            report = partial(_report, progress, index, len(cases), name)
            result = _run_worker(spec, Path(folder, str(index)), name, report)
            measurements.append(Measurement.from_samples(runtime, batch_size, **result, seed=config.seed))
    return Comparison(tuple(measurements), environment(), _protocol(config, threads))


def _report(progress: Progress | None, index: int, cases: int, name: str, fraction: float) -> None:
    if progress is not None:
        progress((index + fraction) / cases, name)


def _file(variant: Variant, runtime: str) -> Path | None:
    file = variant.onnx if RUNTIMES[runtime] == "onnx" else variant.program
    # The worker may stand in another folder.
    return file and file.resolve()


def _check(dense: Variant, pruned: Variant, sample: Feeds, config: ProfileConfig) -> None:
    """Finds what would fail before minutes are spent on measuring."""
    for runtime in config.runtimes:
        for name, variant in (("dense", dense), ("pruned", pruned)):
            file = _file(variant, runtime)
            if file is None:
                raise ProfilingError(f"runtime {runtime} needs the {name} network's exported program (.pt2)")
            if not file.is_file():
                raise ProfilingError(f"the {name} network's file {file} does not exist")
    for key, array in sample.items():
        if array.ndim == 0 or array.shape[0] != 1:
            raise ProfilingError(f"sample {key!r} has shape {array.shape}: its leading dimension must be 1")


def _run_worker(spec: dict[str, Any], folder: Path, case: str, progress: Callable[[float], None]) -> dict[str, Any]:
    """What a new process measured of one case; ProfilingError with the last line it said when it fails."""
    folder.mkdir()
    result, errors, spec_path = folder / "result.json", folder / "stderr.txt", folder / "spec.json"
    spec_path.write_text(json.dumps({**spec, "result": str(result)}))
    progress(0.0)
    # stderr goes to a file: a pipe that nobody reads would block a talkative runtime.
    with (
        errors.open("w") as stderr,
        subprocess.Popen(
            [sys.executable, "-m", "profilers.worker", str(spec_path)],
            env=_worker_environment(spec["threads"]),
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
        raise ProfilingError(f"measuring {case} {_ending(status)}: {lines[-1] if lines else 'it said nothing'}")
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


def _protocol(config: ProfileConfig, threads: int) -> dict[str, Any]:
    """How the measurements were made, in words and numbers."""
    return {
        "isolation": "each runtime and batch size in a process of its own",
        "interleaving": "dense, dense again and pruned take turns in rounds, in an order shuffled every round",
        "noise": "A/A: the dense file loaded twice and measured against itself in the same rounds",
        "input_transfer": "excluded: inputs are placed on the device beforehand, outputs stay on it",
        "latency": "wall time of one complete run, by time.perf_counter_ns",
        "interval": "bootstrap over whole rounds, paired across variants, 95%",
        "speedup": "median(dense) / median(pruned)",
        "warm_up_runs": interleave.WARM_UP_RUNS,
        "warm_up_seconds": interleave.WARM_UP_SECONDS,
        "turn_ms": interleave.TURN_MS,
        "uncounted_runs_per_turn": 1,
        "tolerance": TOLERANCE,
        "min_rounds_to_converge": STABLE_ROUNDS,
        "threads": threads,
        "seconds_per_case": config.seconds,
        "seed": config.seed,
    }
