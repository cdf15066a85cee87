"""The sentences of a sweep's report."""

from __future__ import annotations

from optin_deploy.report.wording import BUILTIN_CALIBRATION, RANDOM_WEIGHTS, Banner, has_random_weights, runtime_name
from optin_deploy.sweeps.schema import Front, Point, Quality, SweepReport
from optin_deploy.utils import formatting

RULE = (
    "A network is dominated if another costs no more, is no worse, and is better in one of the two. Latencies are the "
    "p50 of the pruned ÷ the dense network, measured interleaved, with 95 % intervals. The front compares the "
    "estimates: where intervals overlap, the order is uncertain."
)


def banners(report: SweepReport) -> tuple[Banner, ...]:
    """Return the warnings above the report: failed gates, random weights, calibration."""
    warnings = [
        Banner("alarm", f"Gate failed in {run.name}: {gate.name}. {gate.detail}")
        for run in report.runs
        for gate in run.gates
        if not gate.passed
    ]
    if has_random_weights(report.model):
        warnings.append(Banner("alarm", RANDOM_WEIGHTS))
    if report.calibration.builtin:
        warnings.append(Banner("notice", BUILTIN_CALIBRATION))
    return tuple(warnings)


def title(front: Front) -> str:
    """Return the title of a Pareto front, as "ONNX Runtime, batch 8"."""
    return "FLOPs" if front.runtime is None else f"{runtime_name(front.runtime)}, batch {front.batch_size}"


def judged_by(quality: Quality) -> str:
    """Return how quality is measured, in a sentence."""
    if quality.kind == "evaluation":
        return f"Judged by {quality.name} on {quality.source}."
    measure = {
        "top1": "share of held-out inputs with the same top answer",
        "sign": "share of the same yes-or-no answers",
        "rank": "Spearman's rank correlation",
        "cosine": "cosine",
    }[quality.kind]
    return f"Judged by agreement with the dense network: {measure}, output {quality.source}."


def worth(value: float, quality: Quality) -> str:
    """Return a figure of quality as text."""
    if quality.kind in ("top1", "sign"):
        return formatting.percent(value)
    return f"{value:.2f}" if quality.kind == "evaluation" else f"{value:.4f}"


def cost(point: Point, front: Front) -> str:
    """Return a relative cost, with its interval if it was measured."""
    value = f"{point.cost.value:.3f}" if front.cost == "flops" else f"{point.cost.value:.2f}"
    if point.cost.low == point.cost.high:
        return value
    return f"{value} [{formatting.bounds(point.cost)}]" + ("" if point.significant else " ~noise")


def standing(point: Point) -> str:
    """Return whether the point is on the Pareto front."""
    return "dominated" if point.dominated else "front"


def failed(network: str, report: SweepReport) -> str:
    """Return the names of the gates that failed in a run; empty if all passed."""
    gates = [gate for run in report.runs if run.name == network for gate in run.gates if not gate.passed]
    return ", ".join(gate.name for gate in gates)
