"""The report of a sweep, in the layout of sweep.json."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, model_validator

from optin_deploy.report.schema import BudgetInfo, CalibrationInfo, Gate, ModelInfo
from profilers import Interval

DENSE = "dense"


class _Value(BaseModel):
    # A metric can be NaN (Spearman of constant outputs). It is written as a string, which is valid JSON.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Quality(_Value):
    """The quality measure that the networks are compared by; more is better.

    "evaluation" is a metric on labelled data (``source``), in its own unit. The other kinds compare the output
    ``source`` on held-out inputs with that of the dense network: "top1" is the fraction of inputs with the same top
    answer, "sign" the fraction of the same yes-or-no answers, "rank" Spearman's correlation, "cosine" the cosine.
    """

    kind: Literal["evaluation", "top1", "sign", "rank", "cosine"]
    name: str
    source: str
    dense: float


class SweepRun(_Value):
    """One run: ``name`` is the name of its directory; ``flops_ratio`` is pruned ÷ dense."""

    name: str
    budget: BudgetInfo
    flops_ratio: float
    parameters: int
    quality: float
    gates: list[Gate]


class Point(_Value):
    """A network in a front. ``cost`` is relative to the dense network, whose cost is 1.

    ``significant`` is False if the change of a latency is within the noise of dense against dense.
    """

    network: str
    cost: Interval
    quality: float
    significant: bool
    dominated: bool


class Front(_Value):
    """All networks by one cost, the cheapest first: FLOPs, or the p50 latency at a runtime and batch size.

    A point is dominated if another costs no more, is no worse, and is better in one of the two; the estimates count,
    not their intervals. Latencies are relative to the dense network in the same interleaved measurement.
    """

    cost: Literal["flops", "latency"]
    runtime: str | None = None
    batch_size: int | None = None
    points: list[Point]


class SweepReport(_Value):
    """The report of a sweep; each run's report.json is in its directory."""

    schema_version: Literal[1] = 1
    created: AwareDatetime
    version: str
    command: str
    model: ModelInfo
    calibration: CalibrationInfo
    quality: Quality
    runs: list[SweepRun]
    fronts: list[Front]
    settings: dict[str, Any]
    environment: dict[str, Any]

    @model_validator(mode="after")
    def _fronts_are_of_the_runs(self) -> SweepReport:
        names = sorted([DENSE, *(run.name for run in self.runs)])
        for front in self.fronts:
            if sorted(point.network for point in front.points) != names:
                raise ValueError("a front must have one point for each run and the dense network")
        return self
