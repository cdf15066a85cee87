"""The report as a document: all results of one run, in the layout of ``report.json``.

Results that other modules compute are their own dataclasses, which pydantic reads and writes as they are. Reports of
schema version 1 are read too: there ``throughput_per_s`` was batch size ÷ p50, and it is computed again from the mean.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, computed_field, model_validator

from exporters import Precision
from exporters.shapes import Range
from optin_deploy.analysis.results import LayerBreakdown
from optin_deploy.compensation.results import Sparsity
from optin_deploy.evaluation.results import Agreement, ExampleImage
from optin_deploy.structure.results import Unpruned
from profilers import Interval, Measurement
from profilers.stats import Above

VariantName = Literal["dense", "pruned"]
VARIANTS: tuple[VariantName, ...] = ("dense", "pruned")


class _Value(BaseModel):
    # Infinity and NaN (a failed parity) are written as strings, which are valid JSON and are read back as numbers.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class ModelInfo(_Value):
    """The network.

    ``weights`` is "pretrained", "random", "the directory's own", "user" (a module from Python) or a path; ``inputs``
    stores shapes like ["batch", 3, 224, 224].
    """

    name: str
    library: str
    weights: str
    inputs: dict[str, list[int | str]]


class CalibrationInfo(_Value):
    """The data that scores were computed on; ``builtin`` marks the small built-in set."""

    source: str
    builtin: bool
    samples: int
    seed: int


class BudgetInfo(_Value):
    """The budgets: fractions of the dense network's FLOPs and latency, 0 to 1, or milliseconds; None if not set."""

    flops: float | None = None
    latency: float | None = None
    latency_ms: float | None = None


class LatencyRound(_Value):
    """One network that was built and measured for a latency budget; ``by`` is the cost that its search used."""

    by: Literal["latency", "FLOPs"]
    predicted_ms: Above
    measured_ms: Above


class LatencyBudget(_Value):
    """How a latency budget was met.

    Attributes:
        dense_ms: the dense network's latency when the tables were made.
        floor_ms: the latency without any prunable unit.
        taken: index of the round whose plan was taken.
        tables, tables_cached: number of latency tables, and how many of them were in the cache.
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
    def _check_taken(self) -> LatencyBudget:
        if self.taken >= len(self.rounds):
            raise ValueError(f"taken is {self.taken}, of {len(self.rounds)} rounds")
        return self

    @property
    def limit_ms(self) -> float:
        """The budget in milliseconds."""
        return self.fraction * self.dense_ms


class VariantInfo(_Value):
    """The size of one network: FLOPs of one sample (1 MAC = 2 FLOPs), parameters, and its ONNX file in MiB."""

    flops: Annotated[int, Field(gt=0)]
    parameters: Annotated[int, Field(gt=0)]
    onnx_mib: Above


class PlanEntry(_Value):
    """How many units of one group are kept; for the kind "token", how many tokens enter a block."""

    group: str
    kind: Literal["head", "width", "neuron", "channel", "token"]
    layer: int
    units: int
    kept: int


class Evaluation(_Value):
    """A metric on labelled data, in the metric's own unit.

    ``dense`` and ``pruned`` are the networks in float32, ``deployed`` the pruned ONNX file if its precision differs.
    """

    metric: str
    dataset: str
    samples: int
    dense: float
    pruned: float
    deployed: float | None = None

    @property
    def kept(self) -> float:
        """The metric of the pruned network as it is deployed."""
        return self.pruned if self.deployed is None else self.deployed


class Parity(_Value):
    """The largest error of one output of an ONNX file or engine, compared with PyTorch; ``runtime`` ran it.

    In ``near_ties`` of the ``samples``, rounding decided which tokens merge; there PyTorch merged the same ones.
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


class EngineSummary(_Value):
    """An engine built from one network's ONNX file; ``device`` is the GPU that built it, None without one."""

    variant: VariantName
    runtime: str
    file: str
    mib: float
    builder: str
    device: str | None
    inputs: dict[str, Range]


class Unmeasured(_Value):
    """A runtime of the recipe that could not be measured."""

    runtime: str
    reason: str


class Gate(_Value):
    """A requirement that was checked."""

    name: str
    passed: bool
    detail: str


class Realised(_Value):
    """The headline figure: measured speed-up ÷ FLOP reduction factor, with its interval."""

    runtime: str
    batch_size: int
    ratio: Interval


class Report(_Value):
    """The report of one run; ``command`` repeats it, and is Python code if no command line can."""

    schema_version: Literal[2] = 2
    created: AwareDatetime
    version: str
    command: str
    model: ModelInfo
    calibration: CalibrationInfo
    budget: BudgetInfo
    latency_budget: LatencyBudget | None = None
    settings: dict[str, Any]
    dense: VariantInfo
    pruned: VariantInfo
    plan: list[PlanEntry]
    left_dense: list[Unpruned]
    sparsity: Sparsity | None = None
    precision: Precision = "fp32"
    agreement: list[Agreement]
    pictures: list[ExampleImage] = []
    evaluation: Evaluation | None
    parity: list[Parity]
    profile: list[Measurement]
    protocol: dict[str, Any]
    layers: list[LayerBreakdown] = []
    engines: list[EngineSummary] = []
    unmeasured: list[Unmeasured] = []
    gates: list[Gate]
    warnings: list[str]
    stage_seconds: dict[str, float]
    environment: dict[str, Any]

    @model_validator(mode="before")
    @classmethod
    def _drop_computed(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return _upgrade({key: value for key, value in data.items() if key not in cls.model_computed_fields})

    def __repr__(self) -> str:
        from optin_deploy.report import wording

        return f"<Report {self.model.name}: {wording.verdict(self)}>"

    def __str__(self) -> str:
        return repr(self)

    def _repr_html_(self) -> str:
        from optin_deploy.report.web_page import render
        from optin_deploy.utils.display import html_frame

        return html_frame(render(self))

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
        """The realised ratio of every measurement, in their order; empty if the FLOPs are as many as before."""
        ratios = [(item, self.realised_ratio(item)) for item in self.profile]
        return [Realised(runtime=m.runtime, batch_size=m.batch_size, ratio=r) for m, r in ratios if r is not None]

    def realised_ratio(self, measurement: Measurement) -> Interval | None:
        """Return speed-up ÷ FLOP reduction factor, 1 if the time fell as much as the FLOPs; None if those did not."""
        if self.pruned.flops >= self.dense.flops:
            return None
        return measurement.speedup.scaled(1 / self.flops_reduction)


def _upgrade(data: dict[str, Any]) -> dict[str, Any]:
    """Convert a document of schema version 1 to the present layout, and return any other as it is."""
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
