"""The results of a comparison: plain dataclasses, which pydantic writes as JSON and reads back unchanged."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import log
from typing import Any, Generic, Self, TypeVar

from profilers.gpu_watch import GpuWatch
from profilers.measure import RawSamples
from profilers.stats import Interval, Summary, ratio_interval, summarise

_T = TypeVar("_T")


@dataclass(frozen=True)
class ByVariant(Generic[_T]):
    """One value for each variant, as an attribute or by its name: ``summary.dense``, ``summary["dense"]``."""

    dense: _T
    dense_again: _T
    pruned: _T

    def __getitem__(self, name: str) -> _T:
        value: _T = getattr(self, name)
        return value


@dataclass(frozen=True)
class Builds:
    """How much the builds of one network differ.

    Attributes:
        p50_ms: median latency of each build in milliseconds.
        spread: that of the slowest ÷ that of the fastest − 1.
    """

    p50_ms: tuple[float, ...]
    spread: float

    @classmethod
    def from_turns(cls, turns: Sequence[Sequence[float]], count: int) -> Self:
        """Compute both from samples (rounds × repeats, at least as many rounds as builds); see `RawSamples`."""
        p50_ms = tuple(summarise([ms for turn in turns[build::count] for ms in turn]).p50_ms for build in range(count))
        return cls(p50_ms, max(p50_ms) / min(p50_ms) - 1)


@dataclass(frozen=True)
class Measurement:
    """One runtime at one batch size. The variants are ``dense``, ``dense_again`` (the same file) and ``pruned``.

    Attributes:
        runtime: a key of `profilers.RUNTIMES`.
        batch_size: samples in one run.
        samples_ms: variant to its latencies in milliseconds, rounds × repeats.
        summary: variant to the summary of its latencies.
        throughput_per_s: variant to samples per second: all samples ÷ the time of all runs.
        speedup: dense ÷ pruned with its 95 % interval, see `profilers.stats.ratio_interval`.
        noise: dense ÷ dense_again (A/A): 1 apart from noise.
        significant: see `is_significant`.
        converged: whether the figures settled before the time limit.
        peak_rss_mib: most memory of the measuring process, all three variants loaded, in MiB.
        device_ms: variant to the median time of the same runs on the device, between CUDA events; None if the runtime
            does not report it. Latencies also contain the launch and the wait for it.
        cuda_graph: variant to whether its runs replayed a CUDA graph; None if the runtime was not asked for one.
        gpu: state of the GPU meanwhile; None on a CPU.
        builds: how much the builds of a variant differ, for variants that were built more than once.
    """

    runtime: str
    batch_size: int
    samples_ms: ByVariant[list[list[float]]]
    summary: ByVariant[Summary]
    throughput_per_s: ByVariant[float]
    speedup: Interval
    noise: Interval
    significant: bool
    converged: bool
    peak_rss_mib: float
    device_ms: dict[str, float] | None = None
    cuda_graph: dict[str, bool] | None = None
    gpu: GpuWatch | None = None
    builds: dict[str, Builds] = field(default_factory=dict)

    @classmethod
    def from_samples(
        cls, runtime: str, batch_size: int, raw: RawSamples, *, seed: int = 0, builds: Mapping[str, int] | None = None
    ) -> Self:
        """Compute all figures from the samples.

        Args:
            runtime: a key of `profilers.RUNTIMES`.
            batch_size: samples in one run.
            raw: samples of the three variants.
            seed: of the bootstrap.
            builds: number of builds of each variant; 1 for those not named.
        """
        samples_ms = raw.samples_ms
        summary = {name: summarise([value for turn in turns for value in turn]) for name, turns in samples_ms.items()}
        speedup = ratio_interval(samples_ms["dense"], samples_ms["pruned"], seed=seed)
        noise = ratio_interval(samples_ms["dense"], samples_ms["dense_again"], seed=seed)
        return cls(
            runtime=runtime,
            batch_size=batch_size,
            samples_ms=ByVariant(**samples_ms),
            summary=ByVariant(**summary),
            throughput_per_s=ByVariant(**{n: batch_size * 1e3 / figures.mean_ms for n, figures in summary.items()}),
            speedup=speedup,
            noise=noise,
            significant=is_significant(speedup, noise),
            converged=raw.converged,
            peak_rss_mib=raw.peak_rss_mib,
            device_ms=raw.device_ms,
            cuda_graph=raw.cuda_graph,
            gpu=raw.gpu,
            builds={n: Builds.from_turns(samples_ms[n], count) for n, count in (builds or {}).items() if count > 1},
        )


@dataclass(frozen=True)
class Comparison:
    """All measurements of a dense and a pruned network.

    Attributes:
        measurements: one per runtime and batch size, runtimes outermost.
        environment: the machine, see `profilers.environment.environment`.
        protocol: how the measurements were made, in words and numbers.
    """

    measurements: tuple[Measurement, ...]
    environment: dict[str, Any]
    protocol: dict[str, Any]


def is_significant(speedup: Interval, noise: Interval) -> bool:
    """Return whether a speed-up (or slow-down) may be claimed.

    Its interval must exclude 1, and |log(speed-up)| must exceed the largest |log| within the A/A interval, by which
    the same file measured twice may differ.
    """
    floor = max(abs(log(noise.low)), abs(log(noise.high)))
    return not speedup.contains(1.0) and abs(log(speedup.value)) > floor
