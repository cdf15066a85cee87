"""What ``gpu.sh`` measures, most important first: networks, runtimes, precisions and batch sizes."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from exporters import EngineConfig, ExportError, Precision, check_builder
from gpu.networks import METHODS
from profilers import GPU_RUNTIMES, ORT_PROVIDERS, RUNTIMES, ProfilingError, check_provider, lacking_device


@dataclass(frozen=True)
class Way:
    """One runtime, and at which precisions and batch sizes it is measured."""

    runtime: str
    precisions: tuple[Precision, ...]
    batch_sizes: tuple[int, ...]


@dataclass(frozen=True)
class Setup:
    """What is measured. Everything stands in the order of importance.

    Attributes:
        last: ways that come after all others.
        samples, batch: calibration samples for scoring and pruning, and how many of them make a batch.
        exact_units: masked of every group by the exact scorer.
        seconds: of the rounds of one measurement.
        align: neurons come in multiples of it.
    """

    device: str
    scored: tuple[str, ...]
    pruned: tuple[str, ...]
    ways: tuple[Way, ...]
    last: tuple[Way, ...]
    samples: int
    batch: int
    exact_units: int
    seconds: float
    align: int


@dataclass(frozen=True)
class Case:
    """What one process measures."""

    network: str
    precision: Precision
    runtime: str
    batch_sizes: tuple[int, ...]

    @property
    def sizes(self) -> dict[str, int]:
        """Batch size of each measurement, by its key."""
        return {f"latency/{self.network}/{self.precision}/{self.runtime}/{size}": size for size in self.batch_sizes}


PRECISIONS: tuple[Precision, ...] = ("fp16", "fp32", "bf16")
_SIZES = (1, 32, 256, 8, 128)
# Compiling takes half a minute per network and size.
_SLOW = "torch-compile-cuda"
FULL = Setup(
    device="cuda",
    scored=("deit_small", "bert_base"),
    pruned=("deit_small", "minilm", "deit_base"),
    ways=tuple(Way(runtime, PRECISIONS, _SIZES) for runtime in GPU_RUNTIMES if runtime != _SLOW),
    last=(Way(_SLOW, ("fp16",), (1, 32)),),
    samples=128,
    batch=16,
    exact_units=16,
    seconds=1.5,
    align=64,
)
TINY = Setup(
    device="cpu",
    scored=("tiny_vit", "tiny_bert"),
    pruned=("tiny_vit", "tiny_bert"),
    # ONNX Runtime has no bfloat16 operators on a CPU.
    ways=(Way("ort-cpu", ("fp16", "fp32"), (1, 2)), Way("torch", PRECISIONS, (1, 2))),
    last=(),
    samples=8,
    batch=4,
    exact_units=2,
    seconds=0.1,
    align=8,
)


def cases(setup: Setup) -> list[Case]:
    """All processes that measure latency, in order."""
    return [
        Case(network, precision, way.runtime, way.batch_sizes)
        for ways in (setup.ways, setup.last)
        for precision in PRECISIONS
        for network in setup.pruned
        for way in ways
        if precision in way.precisions
    ]


def planned(setup: Setup) -> list[str]:
    """Keys of all that is to be measured, in order."""
    scoring = [f"scoring/{name}/{method}" for name in setup.scored for method in METHODS]
    return scoring + [f"pruning/{name}" for name in setup.pruned] + [key for case in cases(setup) for key in case.sizes]


def available(setup: Setup) -> tuple[Setup, dict[str, str]]:
    """The setup without runtimes that cannot run here, and of each of those why."""
    reasons = {way.runtime: _why_not(way.runtime) for way in (*setup.ways, *setup.last)}
    lacking = {runtime: reason for runtime, reason in reasons.items() if reason}
    ways, last = (tuple(way for way in some if way.runtime not in lacking) for some in (setup.ways, setup.last))
    return replace(setup, ways=ways, last=last), lacking


def _why_not(runtime: str) -> str:
    """Why the runtime cannot run here; empty where it can."""
    if RUNTIMES[runtime] == "engine":
        try:
            check_builder(EngineConfig(runtime))
        except ExportError as error:
            return str(error)
        return lacking_device(runtime)
    if provider := ORT_PROVIDERS.get(runtime):
        try:
            check_provider(provider)
        except ProfilingError as error:
            return str(error)
    return ""


def narrowed(setup: Setup, options: Mapping[str, str | None]) -> Setup:
    """The setup with no more than what comma-separated ``options`` name: networks, precisions, runtimes, batch_sizes.

    Raises:
        ValueError: one of them names what there is not.
    """
    ways = (*setup.ways, *setup.last)
    known: dict[str, list[str]] = {
        "networks": [*setup.scored, *setup.pruned],
        "precisions": list(PRECISIONS),
        "runtimes": [way.runtime for way in ways],
        "batch_sizes": [str(size) for way in ways for size in way.batch_sizes],
    }
    chosen: dict[str, list[str]] = {}
    for option, choices in known.items():
        named = options.get(option)
        chosen[option] = named.split(",") if named else choices
        if unknown := [name for name in chosen[option] if name not in choices]:
            choice = ", ".join(dict.fromkeys(choices))
            raise ValueError(f"--{option.replace('_', '-')} {unknown[0]}: choose from {choice}")

    def fewer(ways: Iterable[Way]) -> tuple[Way, ...]:
        return tuple(
            Way(
                way.runtime,
                tuple(p for p in way.precisions if p in chosen["precisions"]),
                tuple(s for s in way.batch_sizes if str(s) in chosen["batch_sizes"]),
            )
            for way in ways
            if way.runtime in chosen["runtimes"]
        )

    return replace(
        setup,
        scored=tuple(n for n in setup.scored if n in chosen["networks"]),
        pruned=tuple(n for n in setup.pruned if n in chosen["networks"]),
        ways=fewer(setup.ways),
        last=fewer(setup.last),
    )
