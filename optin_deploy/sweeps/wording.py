"""What a sweep's report says in words."""

from __future__ import annotations

from optin_deploy.report.wording import BUILTIN_CALIBRATION, RANDOM_WEIGHTS, Banner, runtime_name
from optin_deploy.sweeps.schema import Front, Point, Quality, SweepReport
from optin_deploy.utils import formatting

RULE = (
    "A network is dominated when another costs no more, is no worse, and is better on one of the two. Latencies are "
    "p50 of the pruned ÷ the dense network, measured interleaved, with 95 % intervals; they are compared by their "
    "estimates, so overlapping intervals leave an order open."
)


def banners(report: SweepReport) -> tuple[Banner, ...]:
    """What stands above the report: failed gates, random weights, calibration."""
    found = [
        Banner("alarm", f"Gate failed in {run.name}: {gate.name}. {gate.detail}")
        for run in report.runs
        for gate in run.gates
        if not gate.passed
    ]
    if report.model.weights == "random":
        found.append(Banner("alarm", RANDOM_WEIGHTS))
    if report.calibration.builtin:
        found.append(Banner("notice", BUILTIN_CALIBRATION))
    return tuple(found)


def title(front: Front) -> str:
    """What a front is of, as "ONNX Runtime, batch 8"."""
    return "FLOPs" if front.runtime is None else f"{runtime_name(front.runtime)}, batch {front.batch_size}"


def judged_by(quality: Quality) -> str:
    """What the networks are judged by, in a sentence."""
    if quality.kind == "evaluation":
        return f"Judged by {quality.name} on {quality.source}."
    what = {
        "top1": "the part of held-out inputs with the dense network's top answer",
        "sign": "the part of its yes-or-no answers that are the dense network's",
        "rank": "Spearman's correlation of its numbers with the dense network's",
        "cosine": "the cosine",
    }[quality.kind]
    return f"Judged by agreement with the dense network: {what}, output {quality.source}."


def worth(value: float, quality: Quality) -> str:
    """A figure of quality as it is written."""
    if quality.kind in ("top1", "sign"):
        return formatting.percent(value)
    return f"{value:.2f}" if quality.kind == "evaluation" else f"{value:.4f}"


def cost(point: Point, front: Front) -> str:
    """A relative cost, with its interval where it was measured and is not 1 by definition."""
    value = f"{point.cost.value:.3f}" if front.cost == "flops" else f"{point.cost.value:.2f}"
    if point.cost.low == point.cost.high:
        return value
    return f"{value} [{formatting.bounds(point.cost)}]" + ("" if point.significant else " ~noise")


def standing(point: Point) -> str:
    """Whether the point is on the front."""
    return "dominated" if point.dominated else "front"


def failed(network: str, report: SweepReport) -> str:
    """The names of the gates that failed in a run, empty for none."""
    gates = [gate for run in report.runs if run.name == network for gate in run.gates if not gate.passed]
    return ", ".join(gate.name for gate in gates)
