"""Measure a pruned network against its dense original, each case in a process of its own."""

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
from profilers.measure import MOST_LOADS, Case, check_file, check_sample, loads_for, measure_files
from profilers.results import Comparison, Measurement
from profilers.runners.base import Feeds
from profilers.runners.registry import RUNTIMES
from profilers.stats import STABLE_ROUNDS, TOLERANCE

Progress = Callable[[float, str], None]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Variant:
    """The files of one network: ONNX, exported program (``.pt2``), and engines by runtime and batch size.

    An engine may have several builds, for which the builder may have chosen different tactics.
    """

    onnx: Path
    program: Path | None = None
    engines: Mapping[tuple[str, int], Path | tuple[Path, ...]] = field(default_factory=dict)

    def builds(self, runtime: str, batch_size: int) -> tuple[Path, ...]:
        """Return the files that ``runtime`` runs at that batch size: all builds of an engine; () without a file."""
        if RUNTIMES[runtime] == "engine":
            engines = self.engines.get((runtime, batch_size), ())
            return (engines,) if isinstance(engines, Path) else engines
        file = self.onnx if RUNTIMES[runtime] == "onnx" else self.program
        return (file,) if file is not None else ()

    def file(self, runtime: str, batch_size: int) -> Path | None:
        """Return the file that ``runtime`` runs at that batch size: the first build; None without a file."""
        return next(iter(self.builds(runtime, batch_size)), None)


@dataclass(frozen=True)
class ProfileConfig:
    """What to measure; ValueError for a field out of range.

    Attributes:
        runtimes: keys of `RUNTIMES`.
        batch_sizes: samples in one run; each size is a case of its own.
        threads: CPU threads of one run; None takes all usable physical cores.
        seconds: time limit of the rounds of one case, without loading and warm-up (a second or two).
        seed: of the order of turns and of the bootstrap.
        tf32: whether float32 may use TF32 on a GPU, see `open_runner`.
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
            problem = f"unknown runtime {unknown[0]!r}" if unknown else "no runtime given"
            raise ValueError(f"{problem}: choose from {', '.join(RUNTIMES)}")
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
    progress: Progress = lambda fraction, case: None,
) -> Comparison:
    """Measure both variants at every runtime and batch size of the config.

        dense, pruned = Variant(Path("dense.onnx")), Variant(Path("pruned.onnx"))
        result = compare(dense, pruned, sample, ProfileConfig(runtimes=("ort-cpu",)))
        print(result.measurements[0].speedup)

    Args:
        dense: the original's files.
        pruned: the smaller network's files, with the same inputs.
        sample: input name to array of one sample, leading dimension 1; repeated to each batch size.
        config: what to measure.
        progress: called with the fraction done, 0 to 1, and the current case in words.

    Raises:
        ProfilingError: a file that a runtime needs is missing, the sample does not fit, or a worker failed.
    """
    _check(dense, pruned, sample, config)
    threads = config.threads or usable_cores().physical
    cases = list(product(config.runtimes, config.batch_sizes))
    measurements = []
    # The dense file is measured twice: the difference to itself is the noise.
    variants = {"dense": dense, "dense_again": dense, "pruned": pruned}
    for index, (runtime, batch_size) in enumerate(cases):
        files = {name: variant.builds(runtime, batch_size) for name, variant in variants.items()}
        loads = loads_for(runtime, [file for builds in files.values() for file in builds])
        case = Case(runtime, batch_size, threads, config.seconds, config.seed, loads=loads, tf32=config.tf32)
        report = partial(_report, progress, index, len(cases), case.name)
        raw = measure_files(files, sample, case, [("dense", "pruned"), ("dense", "dense_again")], report)
        counts = {name: len(builds) for name, builds in files.items()}
        measurement = Measurement.from_samples(runtime, batch_size, raw, seed=config.seed, builds=counts)
        _log(measurement)
        measurements.append(measurement)
    return Comparison(tuple(measurements), environment(), _protocol(config, threads))


def _log(measurement: Measurement) -> None:
    logger.info(
        "%s, batch %d: p50 %.4g ms dense, %.4g ms pruned, %d rounds, %s",
        measurement.runtime,
        measurement.batch_size,
        measurement.summary.dense.p50_ms,
        measurement.summary.pruned.p50_ms,
        len(measurement.samples_ms.dense),
        "settled" if measurement.converged else "not settled in the time given",
    )


def _report(progress: Progress, index: int, cases: int, name: str, fraction: float) -> None:
    progress((index + fraction) / cases, name)


def _check(dense: Variant, pruned: Variant, sample: Feeds, config: ProfileConfig) -> None:
    """Raise ProfilingError for what would fail after minutes of measuring."""
    for runtime, batch_size in product(config.runtimes, config.batch_sizes):
        for name, variant in (("dense", dense), ("pruned", pruned)):
            files = variant.builds(runtime, batch_size)
            if not files:
                what = "engine" if RUNTIMES[runtime] == "engine" else "exported program (.pt2)"
                raise ProfilingError(f"runtime {runtime}, batch {batch_size}, needs the {name} network's {what}")
            for file in files:
                check_file(runtime, file, f"the {name} network's file")
    check_sample(sample)


def _protocol(config: ProfileConfig, threads: int) -> dict[str, Any]:
    """Return how the measurements were made, in words and numbers."""
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
