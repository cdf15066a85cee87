"""Measures a pruned network against its dense original, each case in a process of its own."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

from profilers import interleave
from profilers.environment import environment, usable_cores
from profilers.errors import ProfilingError
from profilers.gpu_watch import GpuWatch
from profilers.isolated import MOST_LOADS, Case, check_sample, loads_for, measure_files
from profilers.results import Comparison, Measurement
from profilers.runners import RUNTIMES
from profilers.runners.base import Feeds
from profilers.stats import STABLE_ROUNDS, TOLERANCE

Progress = Callable[[float, str], None]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """The files of one network: its ONNX file, its exported program (`.pt2`) for the torch runtimes, and its engines by
    runtime and batch size: one, or several builds, which differ by the tactics that the builder happened to take."""

    onnx: Path
    program: Path | None = None
    engines: Mapping[tuple[str, int], Path | tuple[Path, ...]] = field(default_factory=dict)

    def builds(self, runtime: str, batch_size: int) -> tuple[Path, ...]:
        """The files that ``runtime`` runs at that batch size: several where its engine was built several times,
        none where there is no such file."""
        if RUNTIMES[runtime] == "engine":
            found = self.engines.get((runtime, batch_size), ())
            return (found,) if isinstance(found, Path) else found
        file = self.onnx if RUNTIMES[runtime] == "onnx" else self.program
        return (file,) if file is not None else ()

    def file(self, runtime: str, batch_size: int) -> Path | None:
        """The file that ``runtime`` runs at that batch size; of several builds, the first."""
        return next(iter(self.builds(runtime, batch_size)), None)


@dataclass(frozen=True)
class ProfileConfig:
    """What to measure.

    Attributes:
        runtimes: names from `RUNTIMES`.
        batch_sizes: samples in one run, each size a case of its own.
        threads: CPU threads of one run; None takes all usable physical cores.
        seconds: time limit of the rounds of one case; loading and warm-up (a second or two) come on top.
        seed: of the order of turns and of the bootstrap.
        tf32: whether a GPU may use it for float32, see `open_runner`.

    Raises:
        ValueError: a field is out of range; one line says which.
    """

    runtimes: tuple[str, ...] = ("ort-cpu", "torch")
    batch_sizes: tuple[int, ...] = (1, 8)
    threads: int | None = None
    seconds: float = 10.0
    seed: int = 0
    tf32: bool = False

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
    # The dense file is measured twice: by how much it differs from itself is the noise floor.
    variants = {"dense": dense, "dense_again": dense, "pruned": pruned}
    for index, (runtime, batch_size) in enumerate(cases):
        files = {name: variant.builds(runtime, batch_size) for name, variant in variants.items()}
        loads = loads_for(runtime, [file for builds in files.values() for file in builds])
        case = Case(runtime, batch_size, threads, config.seconds, config.seed, loads=loads, tf32=config.tf32)
        report = partial(_report, progress, index, len(cases), case.name)
        result = measure_files(files, sample, case, [("dense", "pruned"), ("dense", "dense_again")], report)
        measured = Measurement.from_samples(
            runtime,
            batch_size,
            result.samples_ms,
            result.converged,
            result.peak_rss_mib,
            seed=config.seed,
            builds={name: len(of) for name, of in files.items()},
            device_ms=result.device_ms,
            cuda_graph=result.cuda_graph,
            gpu=GpuWatch.from_dict(result.gpu) if result.gpu else None,
        )
        _tell(measured)
        measurements.append(measured)
    return Comparison(tuple(measurements), environment(), _protocol(config, threads))


def _tell(found: Measurement) -> None:
    dense, pruned = (found.summary[name].p50_ms for name in ("dense", "pruned"))
    logger.info(
        "%s, batch %d: p50 %.4g ms dense, %.4g ms pruned, %d rounds, %s",
        found.runtime,
        found.batch_size,
        dense,
        pruned,
        len(found.samples_ms["dense"]),
        "settled" if found.converged else "not settled in the time given",
    )


def _report(progress: Progress | None, index: int, cases: int, name: str, fraction: float) -> None:
    if progress is not None:
        progress((index + fraction) / cases, name)


def _check(dense: Variant, pruned: Variant, sample: Feeds, config: ProfileConfig) -> None:
    """Finds what would fail before minutes are spent on measuring."""
    for runtime, batch_size in product(config.runtimes, config.batch_sizes):
        for name, variant in (("dense", dense), ("pruned", pruned)):
            files = variant.builds(runtime, batch_size)
            if not files:
                what = "engine" if RUNTIMES[runtime] == "engine" else "exported program (.pt2)"
                raise ProfilingError(f"runtime {runtime}, batch {batch_size}, needs the {name} network's {what}")
            missing = [file for file in files if not file.is_file()]
            if missing:
                raise ProfilingError(f"the {name} network's file {missing[0]} does not exist")
    check_sample(sample)


def _protocol(config: ProfileConfig, threads: int) -> dict[str, Any]:
    """How the measurements were made, in words and numbers."""
    return {
        "isolation": "each runtime and batch size in a process of its own",
        "interleaving": "dense, dense again and pruned take turns in rounds, in an order shuffled every round",
        "noise": "A/A: the dense file loaded once more and measured against itself in the same rounds",
        "input_transfer": "excluded: inputs are placed on the device beforehand, outputs stay on it",
        "latency": "wall time of one complete run, by time.perf_counter_ns",
        "device_time": "of the same runs, between CUDA events around them, for torch and TensorRT on a GPU",
        "tf32": config.tf32,
        "interval": "bootstrap over whole rounds, paired across variants, 95%",
        "speedup": "dense / pruned of every round's medians, interquartile mean of the logarithms over rounds",
        "warm_up_runs": interleave.WARM_UP_RUNS,
        "warm_up_seconds": interleave.WARM_UP_SECONDS,
        "turn_ms": interleave.TURN_MS,
        "builds": "several builds of an engine take its turns, one after the other",
        "uncounted_runs_per_turn": 1,
        "uncounted_below_ms": interleave.WARMED_MS,
        "loads_at_most": MOST_LOADS,
        "tolerance": TOLERANCE,
        "min_rounds_to_converge": STABLE_ROUNDS,
        "threads": threads,
        "seconds_per_case": config.seconds,
        "seed": config.seed,
    }
