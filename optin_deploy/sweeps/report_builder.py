"""Build the report of a sweep from the reports of its runs."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from optin_deploy.report import Report
from optin_deploy.sweeps.pareto import pareto_front
from optin_deploy.sweeps.schema import DENSE, Front, Point, Quality, SweepReport, SweepRun
from profilers import Interval


def assemble(reports: Mapping[str, Report], settings: dict[str, Any], command: str) -> SweepReport:
    """Return the report of the runs ``reports`` (name -> report, at least one), of one network and equally measured."""
    first = next(iter(reports.values()))
    judged = _quality(first)
    runs = [
        SweepRun(
            name=name,
            budget=report.budget,
            flops_ratio=report.flops_ratio,
            parameters=report.pruned.parameters,
            quality=_value(report, judged),
            gates=report.gates,
        )
        for name, report in reports.items()
    ]
    cases = [(item.runtime, item.batch_size) for item in first.profile]
    flops = [_point(run, Interval(value=run.flops_ratio, low=run.flops_ratio, high=run.flops_ratio)) for run in runs]
    fronts = [Front(cost="flops", points=_ranked(flops, judged))]
    for case in cases:
        points = []
        for run, report in zip(runs, reports.values(), strict=True):
            item = next(m for m in report.profile if (m.runtime, m.batch_size) == case)
            up = item.speedup
            cost = Interval(value=1 / up.value, low=1 / up.high, high=1 / up.low)
            points.append(_point(run, cost, significant=item.significant))
        fronts.append(Front(cost="latency", runtime=case[0], batch_size=case[1], points=_ranked(points, judged)))
    return SweepReport(
        created=datetime.now(UTC),
        version=first.version,
        command=command,
        model=first.model,
        calibration=first.calibration,
        quality=judged,
        runs=runs,
        fronts=fronts,
        settings=settings,
        environment=first.environment,
    )


def _quality(report: Report) -> Quality:
    """Return the metric on labelled data if there is one, else the agreement of the first output."""
    if report.evaluation is not None:
        found = report.evaluation
        return Quality(kind="evaluation", name=found.metric, source=found.dataset, dense=found.dense)
    agreed = report.agreement[0]
    if agreed.top1_agreement is not None:
        return Quality(kind="top1", name="same top answer", source=agreed.output, dense=1.0)
    if agreed.sign_agreement is not None:
        return Quality(kind="sign", name="same yes or no", source=agreed.output, dense=1.0)
    if agreed.rank_correlation is not None:
        return Quality(kind="rank", name="rank correlation", source=agreed.output, dense=1.0)
    return Quality(kind="cosine", name="cosine", source=agreed.output, dense=1.0)


def _value(report: Report, quality: Quality) -> float:
    if quality.kind == "evaluation":
        assert report.evaluation is not None
        return report.evaluation.kept
    agreed = report.agreement[0]
    told = {"top1": agreed.top1_agreement, "sign": agreed.sign_agreement, "rank": agreed.rank_correlation}
    value = told.get(quality.kind, agreed.cosine)
    # Constant outputs have no rank correlation.
    return math.nan if value is None else value


def _point(run: SweepRun, cost: Interval, *, significant: bool = True) -> Point:
    return Point(network=run.name, cost=cost, quality=run.quality, significant=significant, dominated=True)


def _ranked(points: list[Point], quality: Quality) -> list[Point]:
    """Return the points and the dense network by cost, each marked as dominated or not."""
    whole = Interval(value=1.0, low=1.0, high=1.0)
    dense = Point(network=DENSE, cost=whole, quality=quality.dense, significant=True, dominated=True)
    ordered = sorted([*points, dense], key=lambda point: point.cost.value)
    best = pareto_front([(point.cost.value, point.quality) for point in ordered])
    return [point.model_copy(update={"dominated": i not in best}) for i, point in enumerate(ordered)]
