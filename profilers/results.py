"""What a comparison measured, as plain values that go to JSON and come back the same."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from math import log
from typing import Any, Self

from profilers.gpu_watch import GpuWatch
from profilers.interleave import Samples
from profilers.stats import Interval, Summary, ratio_interval, summarise


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
        """Works both out from samples (rounds × repeats, no fewer rounds than builds), see `isolated.Measured`."""
        p50_ms = tuple(summarise([ms for turn in turns[build::count] for ms in turn]).p50_ms for build in range(count))
        return cls(p50_ms, max(p50_ms) / min(p50_ms) - 1)


@dataclass(frozen=True)
class Measurement:
    """One runtime at one batch size. The variants are `dense`, `dense_again` (the same file, loaded twice), `pruned`.

    Attributes:
        runtime: its name, one of `profilers.RUNTIMES`.
        batch_size: samples in one run.
        samples_ms: variant to its latencies in milliseconds, rounds × repeats.
        summary: variant to the summary of its latencies.
        throughput_per_s: variant to samples per second: all samples ÷ the time of all runs.
        speedup: dense ÷ pruned, by `statistics.ratio_interval`, with its 95% interval.
        noise: the same of dense ÷ dense_again, which is 1 but for noise (the A/A run).
        significant: the speed-up's interval excludes 1, and the speed-up (or slow-down) is larger than the largest
            ratio that the A/A interval allows for the same file.
        converged: the figures had settled when the rounds ended, else the time limit ended them.
        peak_rss_mib: most memory that the measuring process held, all three variants loaded, in MiB.
        device_ms: variant to the median of what the same runs took on the device, between CUDA events; None where the
            runtime does not tell. Latencies are longer by the launch and the wait for it.
        cuda_graph: variant to whether its runs replayed a CUDA graph; None where none was asked for.
        gpu: what the GPU did meanwhile; None on a CPU.
        builds: how much the builds of those variants differ that were built more than once.
    """

    runtime: str
    batch_size: int
    samples_ms: Samples
    summary: dict[str, Summary]
    throughput_per_s: dict[str, float]
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
        cls,
        runtime: str,
        batch_size: int,
        samples_ms: Samples,
        converged: bool,
        peak_rss_mib: float,
        seed: int = 0,
        device_ms: dict[str, float] | None = None,
        cuda_graph: dict[str, bool] | None = None,
        gpu: GpuWatch | None = None,
        builds: Mapping[str, int] | None = None,
    ) -> Self:
        """Works out every figure from the samples; `seed` is that of the bootstrap, `builds` how many there are of a
        variant, one where it is left out."""
        summary = {name: summarise([value for turn in turns for value in turn]) for name, turns in samples_ms.items()}
        speedup = ratio_interval(samples_ms["dense"], samples_ms["pruned"], seed=seed)
        noise = ratio_interval(samples_ms["dense"], samples_ms["dense_again"], seed=seed)
        return cls(
            runtime=runtime,
            batch_size=batch_size,
            samples_ms=samples_ms,
            summary=summary,
            throughput_per_s={name: batch_size * 1e3 / figures.mean_ms for name, figures in summary.items()},
            speedup=speedup,
            noise=noise,
            significant=is_significant(speedup, noise),
            converged=converged,
            peak_rss_mib=peak_rss_mib,
            device_ms=device_ms,
            cuda_graph=cuda_graph,
            gpu=gpu,
            builds={n: Builds.from_turns(samples_ms[n], count) for n, count in (builds or {}).items() if count > 1},
        )

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict whose keys are the attributes."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The measurement that `to_dict` wrote; KeyError or TypeError on anything else."""
        plain = dict(data)
        plain["summary"] = {name: Summary(**figures) for name, figures in data["summary"].items()}
        plain["speedup"] = Interval(**data["speedup"])
        plain["noise"] = Interval(**data["noise"])
        plain["gpu"] = GpuWatch.from_dict(data["gpu"]) if data.get("gpu") else None
        # Of measurements made before builds were told apart there are none.
        given = data.get("builds", {})
        plain["builds"] = {name: Builds(tuple(of["p50_ms"]), of["spread"]) for name, of in given.items()}
        return cls(**plain)


@dataclass(frozen=True)
class Comparison:
    """All measurements of a dense and a pruned network.

    Attributes:
        measurements: one per runtime and batch size, runtimes outermost.
        environment: what they ran on; see `profilers.environment.environment`.
        protocol: how they were made, in words and numbers.
    """

    measurements: tuple[Measurement, ...]
    environment: dict[str, Any]
    protocol: dict[str, Any]

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict whose keys are the attributes."""
        return {
            "measurements": [measurement.to_dict() for measurement in self.measurements],
            "environment": self.environment,
            "protocol": self.protocol,
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """The comparison that `to_dict` wrote; KeyError or TypeError on anything else."""
        measurements = tuple(Measurement.from_dict(measurement) for measurement in data["measurements"])
        return cls(measurements, data["environment"], data["protocol"])


def is_significant(speedup: Interval, noise: Interval) -> bool:
    """Whether a speed-up may be claimed, given what the same file measured twice differs by.

    Its own interval must exclude 1, and |log(speed-up)| must exceed the largest |log| within the A/A interval.
    """
    floor = max(abs(log(noise.low)), abs(log(noise.high)))
    return not speedup.contains(1.0) and abs(log(speedup.value)) > floor
