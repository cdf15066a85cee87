"""A sweep's result as a document, in the layout of sweep.json."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import AwareDatetime, BaseModel, ConfigDict, model_validator

from optin_deploy.report.schema import Budget, Calibration, Gate, ModelInfo
from profilers import Interval

DENSE = "dense"


class _Value(BaseModel):
    # A metric can be NaN (Spearman of constant outputs): written as a string, which is JSON and reads back.
    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="strings")


class Quality(_Value):
    """What the networks are judged by; more is better.

    "evaluation": a metric on labelled data (``source``), in its own unit. "top1": part of the held-out inputs, 0 to 1,
    on which the output ``source`` has the same top answer as the dense network's. "sign": part of its yes-or-no answers
    that are the same. "rank": Spearman's correlation of its numbers with the dense one's. "cosine": with the dense
    one's.
    """

    kind: Literal["evaluation", "top1", "sign", "rank", "cosine"]
    name: str
    source: str
    dense: float


class SweepRun(_Value):
    """One run: ``name`` is that of its directory; ``flops_ratio`` is pruned ÷ dense."""

    name: str
    budget: Budget
    flops_ratio: float
    parameters: int
    quality: float
    gates: list[Gate]


class Point(_Value):
    """A network in a front. ``cost`` is relative to the dense network's, whose own is 1.

    ``significant`` is False where a latency does not stand out of the noise of dense against dense.
    """

    network: str
    cost: Interval
    quality: float
    significant: bool
    dominated: bool


class Front(_Value):
    """All networks by one cost, the cheapest first: FLOPs, or the p50 latency at a runtime and batch size.

    A point is dominated when another costs no more, is no worse, and is better on one of the two; by the estimates,
    whatever their intervals. Latencies are relative to the dense network's in the same interleaved measurement.
    """

    cost: Literal["flops", "latency"]
    runtime: str | None = None
    batch_size: int | None = None
    points: list[Point]


class SweepReport(_Value):
    """What a sweep found; each run's own report.json lies in its directory."""

    schema_version: Literal[1] = 1
    created: AwareDatetime
    version: str
    command: str
    model: ModelInfo
    calibration: Calibration
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
