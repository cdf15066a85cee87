"""Build the report of a sweep from the reports of its runs."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from optin_deploy.report import Report
from optin_deploy.sweeps.pareto import pareto_front
from optin_deploy.sweeps.schema import DENSE, Front, Point, Quality, SweepReport, SweepRun
from profilers import Interval


def build_sweep_report(reports: Mapping[str, Report], settings: dict[str, Any], command: str) -> SweepReport:
    """Return the report of a sweep.

    Args:
        reports: name of the run -> its report, at least one; all of one network, with the same measurements.
    """
    first = next(iter(reports.values()))
    quality = _quality(first)
    runs = [
        SweepRun(
            name=name,
            budget=report.budget,
            flops_ratio=report.flops_ratio,
            parameters=report.pruned.parameters,
            quality=_value(report, quality),
            gates=report.gates,
        )
        for name, report in reports.items()
    ]
    cases = [(item.runtime, item.batch_size) for item in first.profile]
    flops = [_point(run, Interval(value=run.flops_ratio, low=run.flops_ratio, high=run.flops_ratio)) for run in runs]
    fronts = [Front(cost="flops", points=_mark_dominated(flops, quality))]
    for case in cases:
        points = []
        for run, report in zip(runs, reports.values(), strict=True):
            item = next(m for m in report.profile if (m.runtime, m.batch_size) == case)
            speedup = item.speedup
            cost = Interval(value=1 / speedup.value, low=1 / speedup.high, high=1 / speedup.low)
            points.append(_point(run, cost, significant=item.significant))
        fronts.append(
            Front(cost="latency", runtime=case[0], batch_size=case[1], points=_mark_dominated(points, quality))
        )
    return SweepReport(
        created=datetime.now(UTC),
        version=first.version,
        command=command,
        model=first.model,
        calibration=first.calibration,
        quality=quality,
        runs=runs,
        fronts=fronts,
        settings=settings,
        environment=first.environment,
    )


def _quality(report: Report) -> Quality:
    """Return the metric on labelled data if there is one, else the agreement of the first output."""
    if report.evaluation is not None:
        metric = report.evaluation
        return Quality(kind="evaluation", name=metric.metric, source=metric.dataset, dense=metric.dense)
    agreement = report.agreement[0]
    if agreement.top1_agreement is not None:
        return Quality(kind="top1", name="same top answer", source=agreement.output, dense=1.0)
    if agreement.sign_agreement is not None:
        return Quality(kind="sign", name="same yes or no", source=agreement.output, dense=1.0)
    if agreement.rank_correlation is not None:
        return Quality(kind="rank", name="rank correlation", source=agreement.output, dense=1.0)
    return Quality(kind="cosine", name="cosine", source=agreement.output, dense=1.0)


def _value(report: Report, quality: Quality) -> float:
    if quality.kind == "evaluation":
        assert report.evaluation is not None
        return report.evaluation.kept
    agreement = report.agreement[0]
    values = {"top1": agreement.top1_agreement, "sign": agreement.sign_agreement, "rank": agreement.rank_correlation}
    value = values.get(quality.kind, agreement.cosine)
    # Constant outputs have no rank correlation.
    return math.nan if value is None else value


def _point(run: SweepRun, cost: Interval, *, significant: bool = True) -> Point:
    return Point(network=run.name, cost=cost, quality=run.quality, significant=significant, dominated=True)


def _mark_dominated(points: list[Point], quality: Quality) -> list[Point]:
    """Return the points and the dense network by cost, each marked as dominated or not."""
    whole = Interval(value=1.0, low=1.0, high=1.0)
    dense = Point(network=DENSE, cost=whole, quality=quality.dense, significant=True, dominated=True)
    ordered = sorted([*points, dense], key=lambda point: point.cost.value)
    best = pareto_front([(point.cost.value, point.quality) for point in ordered])
    return [point.model_copy(update={"dominated": i not in best}) for i, point in enumerate(ordered)]
