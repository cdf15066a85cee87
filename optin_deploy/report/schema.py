"""The report as a document: everything one run found out, in the layout of report.json.

Of schema version 1, `throughput_per_s` was batch size ÷ p50; such reports are read, and theirs is worked out anew from
the mean.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, computed_field, model_validator

from exporters import Precision

VariantName = Literal["dense", "pruned"]
# A PNG file in base64: nothing that could end an attribute of the page.
Png = Annotated[str, Field(pattern=r"^iVBORw0KGgo[A-Za-z0-9+/]*={0,2}$")]


Above = Annotated[float, Field(gt=0)]
"""What other figures are divided by."""


class _Value(BaseModel):
    # Infinite and NaN figures (a failed parity) are written as strings, which are JSON and read back as numbers.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Interval(_Value):
    """An estimate and the bounds of its 95 % interval."""

    value: Above
    low: Above
    high: Above

    def scaled(self, factor: float) -> Interval:
        """All three figures times a positive factor."""
        return Interval(value=self.value * factor, low=self.low * factor, high=self.high * factor)


class Summary(_Value):
    """Latency of one variant over all its samples, in milliseconds."""

    p50_ms: Above
    p90_ms: Above
    p99_ms: Above
    mean_ms: Above
    min_ms: Above
    count: int


class Samples(_Value):
    """Raw latencies in milliseconds, rounds × repeats. `dense_again` is the dense file loaded a second time (A/A)."""

    dense: list[list[float]]
    dense_again: list[list[float]]
    pruned: list[list[float]]


class Summaries(_Value):
    """One summary per measured variant."""

    dense: Summary
    dense_again: Summary
    pruned: Summary


class Throughput(_Value):
    """Samples per second of each measured variant: all samples ÷ the time of all runs."""

    dense: float
    dense_again: float
    pruned: float


class Gpu(_Value):
    """What the GPU did meanwhile, see `profilers.GpuWatch`; a value is None where the device does not tell it."""

    watched: bool
    unwatched_because: str | None = None
    mean_power_w: float | None = None
    max_power_w: float | None = None
    min_clock_mhz: float | None = None
    median_clock_mhz: float | None = None
    max_clock_mhz: float | None = None
    max_temperature_c: float | None = None
    peak_memory_mib: float | None = None
    reasons: list[str] | None = None


class Builds(_Value):
    """Median latencies of several builds of one network's engine, and how much they differ: slowest ÷ fastest − 1."""

    p50_ms: list[float]
    spread: float


class Measurement(_Value):
    """One runtime at one batch size, in the layout of `profilers.Measurement.to_dict()`.

    `speedup` is dense ÷ pruned, see `profilers.stats`, `noise` dense ÷ dense again, and `significant` whether
    the speed-up, or slow-down, stands out of that noise. `device_ms`, `cuda_graph` and `gpu` are there on a GPU only;
    `builds` has those variants that were built several times.
    """

    runtime: str
    batch_size: int
    samples_ms: Samples
    summary: Summaries
    throughput_per_s: Throughput
    speedup: Interval
    noise: Interval
    significant: bool
    converged: bool
    peak_rss_mib: float
    device_ms: dict[str, float] | None = None
    cuda_graph: dict[str, bool] | None = None
    gpu: Gpu | None = None
    builds: dict[Literal["dense", "dense_again", "pruned"], Builds] = {}


class ModelInfo(_Value):
    """The network. `weights` is "pretrained", "random", "the directory's own", "user" (a module from Python) or
    a path; `inputs` gives shapes as [“batch”, 3, 224, 224]."""

    name: str
    library: str
    weights: str
    inputs: dict[str, list[int | str]]


class Calibration(_Value):
    """What the scores were computed on; `builtin` marks the small set that comes with the product."""

    source: str
    builtin: bool
    samples: int
    seed: int


class Budget(_Value):
    """What was asked for: shares of the dense network's FLOPs and latency, 0 to 1, or milliseconds; None if not."""

    flops: float | None = None
    latency: float | None = None
    latency_ms: float | None = None


class LatencyRound(_Value):
    """One network that was built and measured on the way to a latency budget, on one scale of milliseconds; `by` is
    the cost by which its plan was searched."""

    by: Literal["latency", "FLOPs"]
    predicted_ms: Above
    measured_ms: Above


class LatencyBudget(_Value):
    """How a latency budget was met.

    `dense_ms` is the dense network's latency when the tables were made, `floor_ms` what would be left with every unit
    removed, `taken` the number of the round whose plan was taken, `tables_cached` how many of `tables` were measured
    before.
    """

    runtime: str
    batch_size: int
    fraction: Above
    dense_ms: Above
    floor_ms: float
    rounds: list[LatencyRound]
    taken: Annotated[int, Field(ge=0)]
    tables: int
    tables_cached: int

    @model_validator(mode="after")
    def _taken_is_a_round(self) -> LatencyBudget:
        if self.taken >= len(self.rounds):
            raise ValueError(f"taken is {self.taken}, of {len(self.rounds)} rounds")
        return self

    @property
    def limit_ms(self) -> float:
        """The budget in milliseconds."""
        return self.fraction * self.dense_ms


class Variant(_Value):
    """The size of one network: FLOPs of one sample (1 MAC = 2 FLOPs), parameters, and its ONNX file in MiB."""

    flops: Annotated[int, Field(gt=0)]
    parameters: Annotated[int, Field(gt=0)]
    onnx_mib: Above


class PlanEntry(_Value):
    """How many units of one group stay; of the kind "token", how many tokens enter a block."""

    group: str
    kind: Literal["head", "width", "neuron", "channel", "token"]
    layer: int
    units: int
    kept: int


class LeftDense(_Value):
    """What was not pruned, why, and its share of the dense network's FLOPs, 0 to 1; see `structure.unpruned`."""

    module: str
    reason: str
    flops_share: float
    count: int = 1


class Sparsity(_Value):
    """The weights of the pruned network that are zero by 2:4 sparsity; ``pattern`` is what was asked for."""

    pattern: Literal["2:4"]
    maps: int
    zeros: float
    flops_share: float
    left_dense: list[str]


class Agreement(_Value):
    """How alike the dense and pruned networks' values of one output are; see `evaluation.agreement`.

    Figures that mean nothing for an output are None; top1_agreement and sign_agreement are 0 to 1.
    """

    output: str
    cosine: float
    relative_error: float
    top1_agreement: float | None
    samples: int
    correlation: float | None = None
    sign_agreement: float | None = None
    rank_correlation: float | None = None


class Picture(_Value):
    """What both networks give for one sample of a dense prediction: PNG files in base64, `image` what went in."""

    output: str
    image: Png | None
    dense: Png
    pruned: Png


class Evaluation(_Value):
    """A metric on labelled data, in the metric's own unit, for both networks in float32; and for the pruned ONNX file
    where that has another precision."""

    metric: str
    dataset: str
    samples: int
    dense: float
    pruned: float
    deployed: float | None = None

    @property
    def kept(self) -> float:
        """What the pruned network has as it is deployed."""
        return self.pruned if self.deployed is None else self.deployed


class Parity(_Value):
    """How far one output of one network's ONNX file, or of its engine, is from torch's; ``runtime`` ran it.

    Of all ``samples`` compared, rounding decided in ``near_ties`` which tokens merge: there torch had to decide the
    same way before it was compared.
    """

    variant: VariantName
    runtime: str = "ort-cpu"
    output: str
    max_abs_error: float
    max_abs_reference: float
    tolerance: float
    passed: bool
    samples: int = 0
    near_ties: int = 0


class InputRange(_Value):
    """Shapes of one input that an engine takes, and the one it is fastest at."""

    least: list[int]
    best: list[int]
    most: list[int]


class Engine(_Value):
    """An engine that was built of one network's ONNX file, by what, on which GPU (None: without one)."""

    variant: VariantName
    runtime: str
    file: str
    mib: float
    builder: str
    device: str | None
    inputs: dict[str, InputRange]


class Unmeasured(_Value):
    """A runtime that was asked for and could not be measured."""

    runtime: str
    reason: str


class Gate(_Value):
    """A promise that was checked."""

    name: str
    passed: bool
    detail: str


class Realised(_Value):
    """The headline: measured speed-up ÷ FLOP reduction factor, with the speed-up's interval scaled alike."""

    runtime: str
    batch_size: int
    ratio: Interval


class TimeRow(_Value):
    """Milliseconds of one run, and FLOPs of one sample (0 where none are counted), of a part of both networks."""

    name: str
    dense_ms: float
    pruned_ms: float
    dense_flops: int
    pruned_flops: int


class WholeRow(TimeRow):
    """The row of all parts together, that takes some time."""

    dense_ms: Above
    pruned_ms: Above


class Cause(_Value):
    """Why the pruned network takes longer than its FLOPs say, in a sentence, and by how many milliseconds."""

    lost_ms: float
    sentence: str


class LayerAccount(_Value):
    """Where the time goes at one runtime and batch size; see `optin_deploy.analysis.breakdown.Account`.

    `parts`, `blocks` and `kinds` (of operators) each sum, with `between`, to `measured`: the medians of unprofiled
    runs, to which the profile was scaled from what it summed to by itself, `profiled`. `lost_ms` is what the pruned
    network takes above the dense time times the FLOPs ratio. `doubt` says why the account is not to be trusted; there
    are no causes then.
    """

    runtime: str
    batch_size: int
    parts: list[TimeRow]
    blocks: list[TimeRow]
    kinds: list[TimeRow]
    between: TimeRow
    measured: WholeRow
    profiled: TimeRow
    lost_ms: float
    causes: list[Cause]
    doubt: str | None = None


class Report(_Value):
    """One run's report. Written by `write_report`, which also writes the headline figures derived here.

    `command` makes the run again; it is Python where the run was made from there, with a network or data of its own.
    """

    schema_version: Literal[2] = 2
    created: AwareDatetime
    version: str
    command: str
    model: ModelInfo
    calibration: Calibration
    budget: Budget
    latency_budget: LatencyBudget | None = None
    settings: dict[str, Any]
    dense: Variant
    pruned: Variant
    plan: list[PlanEntry]
    left_dense: list[LeftDense]
    sparsity: Sparsity | None = None
    precision: Precision = "fp32"
    agreement: list[Agreement]
    pictures: list[Picture] = []
    evaluation: Evaluation | None
    parity: list[Parity]
    profile: list[Measurement]
    protocol: dict[str, Any]
    layers: list[LayerAccount] = []
    engines: list[Engine] = []
    unmeasured: list[Unmeasured] = []
    gates: list[Gate]
    warnings: list[str]
    stage_seconds: dict[str, float]
    environment: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _without_derived(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return _lifted({key: value for key, value in data.items() if key not in cls.model_computed_fields})

    def __repr__(self) -> str:
        from optin_deploy.report import wording

        return f"<Report {self.model.name}: {wording.verdict(self)}>"

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str:
        from optin_deploy.report.web_page import render
        from optin_deploy.utils.display import framed

        return framed(render(self))

    @computed_field  # type: ignore[prop-decorator]
    @property
    def flops_ratio(self) -> float:
        """Pruned ÷ dense FLOPs."""
        return self.pruned.flops / self.dense.flops

    @computed_field  # type: ignore[prop-decorator]
    @property
    def flops_reduction(self) -> float:
        """Dense ÷ pruned FLOPs: the speed-up if every FLOP cost the same time."""
        return self.dense.flops / self.pruned.flops

    @computed_field  # type: ignore[prop-decorator]
    @property
    def realised(self) -> list[Realised]:
        """The realised ratio of every measurement, in their order; none where the FLOPs are as many as before."""
        ratios = [(item, self.realised_ratio(item)) for item in self.profile]
        return [Realised(runtime=m.runtime, batch_size=m.batch_size, ratio=r) for m, r in ratios if r is not None]

    def realised_ratio(self, measurement: Measurement) -> Interval | None:
        """Measured speed-up ÷ FLOP reduction factor: 1 when the time fell as much as the FLOPs did. None where they
        did not fall: there is nothing to be realised."""
        if self.pruned.flops >= self.dense.flops:
            return None
        return measurement.speedup.scaled(1 / self.flops_reduction)


def _lifted(data: dict[str, Any]) -> dict[str, Any]:
    """A document of schema version 1 in the present layout; any other, or what is none, as it is."""
    if data.get("schema_version") != 1:
        return data
    try:
        profile = [
            {
                **item,
                "throughput_per_s": {
                    name: item["batch_size"] * 1e3 / item["summary"][name]["mean_ms"]
                    for name in item["throughput_per_s"]
                },
            }
            for item in data["profile"]
        ]
    except (LookupError, TypeError, ArithmeticError):
        # The fields' own checks say what is wrong.
        return {**data, "schema_version": 2}
    return {**data, "schema_version": 2, "profile": profile}
