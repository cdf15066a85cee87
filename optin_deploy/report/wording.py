"""The sentences of reports: verdict, banners and notes, and the names of runtimes and devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from optin_deploy.analysis.results import LayerBreakdown
from optin_deploy.evaluation.results import Agreement
from optin_deploy.report.schema import VARIANTS, ModelInfo, Report, Unmeasured
from optin_deploy.structure.results import Unpruned
from optin_deploy.utils import formatting
from profilers import GPU_RUNTIMES, SPECS, Measurement
from profilers.gpu_watch import SLOWDOWNS

RANDOM_WEIGHTS = (
    "Random weights: the latency figures are valid, but accuracy and agreement mean nothing. "
    "Train the network or load a checkpoint before you judge its outputs."
)
BUILTIN_CALIBRATION = (
    "Built-in calibration: units were scored on the small sample set that optin-deploy includes. "
    "Calibrate on your own data before you deploy."
)

SPEED_UP = (
    "Speed-up: dense ÷ pruned within each round, interquartile mean over rounds. The p50s cover all rounds, so their "
    "ratio may differ."
)


@dataclass(frozen=True)
class Banner:
    """A warning above a report: an alarm means that figures are invalid, a notice qualifies them."""

    level: Literal["alarm", "notice"]
    text: str


def banners(report: Report) -> tuple[Banner, ...]:
    """Return the warnings above the report, the most important first."""
    warnings = [Banner("alarm", f"Gate failed: {gate.name}. {gate.detail}") for gate in report.gates if not gate.passed]
    if has_random_weights(report.model):
        warnings.append(Banner("alarm", RANDOM_WEIGHTS))
    warnings += [Banner("alarm", unmeasured(item)) for item in report.unmeasured]
    if report.calibration.builtin:
        warnings.append(Banner("notice", BUILTIN_CALIBRATION))
    unsettled = [_case(m) for m in report.profile if not m.converged]
    if unsettled:
        cases = ", ".join(unsettled)
        warnings.append(Banner("notice", f"Not converged to ±2 % within the time limit, see the intervals: {cases}."))
    warnings += [Banner("notice", text) for item in report.profile if (text := slowed_down(item))]
    return (*warnings, *(Banner("notice", text) for text in report.warnings))


def has_random_weights(model: ModelInfo) -> bool:
    """Return whether the network has random weights, so that its outputs mean nothing."""
    return model.weights == "random"


def unmeasured(item: Unmeasured) -> str:
    """Return a sentence that says why a runtime was not measured."""
    return f"Not measured with {runtime_name(item.runtime)}: {item.reason}."


def left_dense(each: Unpruned) -> str:
    """Return the name of a module left dense, with the number of its kind."""
    return each.module if each.count == 1 else f"{each.module} ({each.count})"


def agreement(entry: Agreement) -> str:
    """Return the agreement of one output on held-out samples, which are not those of the evaluation."""
    text = f"cosine {entry.cosine:.4f}, relative error {formatting.percent(entry.relative_error)}"
    if entry.top1_agreement is not None:
        text += f", same top answer on {formatting.percent(entry.top1_agreement)}"
    if entry.sign_agreement is not None:
        text += f", same yes or no on {formatting.percent(entry.sign_agreement)}"
    if entry.rank_correlation is not None:
        text += f", rank correlation {entry.rank_correlation:.3f}"
    if entry.correlation is not None:
        text += f", correlation of the maps {entry.correlation:.3f}"
    return f"{text} ({entry.samples} held-out sample{'' if entry.samples == 1 else 's'})"


def slowed_down(item: Measurement) -> str | None:
    """Return a sentence if the GPU throttled during a measurement; its power limit is normal and not reported."""
    reasons = [reason for reason in item.gpu.reasons or () if reason in SLOWDOWNS] if item.gpu else []
    if not reasons:
        return None
    return (
        f"The GPU throttled ({', '.join(reasons)}) while {_case(item)} was measured: with enough cooling and power, "
        "its latencies are lower."
    )


def on_gpu(report: Report) -> list[str]:
    """Return a line for each measurement on a GPU: time on the device, clocks, power, temperature, memory."""
    return [f"{_case(item)}: {', '.join(figures)}" for item in report.profile if (figures := _gpu_figures(item))]


def _gpu_figures(item: Measurement) -> list[str]:
    found = []
    if item.device_ms:
        dense, pruned = (formatting.milliseconds(item.device_ms[name]) for name in ("dense", "pruned"))
        found.append(f"on the device {dense} → {pruned} ms")
    if item.cuda_graph:
        without = [name for name, used in item.cuda_graph.items() if not used]
        found.append(f"no CUDA graph for {' and '.join(without)}" if without else "CUDA graph")
    gpu = item.gpu
    if gpu is None:
        return found
    if not gpu.watched:
        return [*found, f"not monitored: {gpu.unwatched_because}"]
    if gpu.median_clock_mhz is not None:
        found.append(f"{gpu.median_clock_mhz:.0f} MHz ({gpu.min_clock_mhz:.0f}–{gpu.max_clock_mhz:.0f})")
    if gpu.mean_power_w is not None:
        found.append(f"{gpu.mean_power_w:.0f} W (at most {gpu.max_power_w:.0f})")
    if gpu.max_temperature_c is not None:
        found.append(f"at most {gpu.max_temperature_c:.0f} °C")
    if gpu.peak_memory_mib is not None:
        found.append(f"{gpu.peak_memory_mib:.0f} MiB")
    if gpu.reasons is None:
        found.append("unknown whether its clocks were limited")
    elif gpu.reasons:
        found.append(f"clocks limited by: {', '.join(gpu.reasons)}")
    return found


def _case(item: Measurement) -> str:
    return f"{runtime_name(item.runtime)} at batch {item.batch_size}"


def runtime_name(runtime: str) -> str:
    """Return the display name of a runtime."""
    return SPECS[runtime].label if runtime in SPECS else runtime


def changed_pace(case: str, dense_ms: float, pruned_ms: float, low: float, high: float) -> str | None:
    """Return a sentence if the ratio of the p50s, rounded as displayed, is outside the interval of the speed-up."""
    ratio = round(dense_ms / pruned_ms, 2)
    if round(low, 2) <= ratio <= round(high, 2):
        return None
    return (
        f"The machine's speed changed between rounds: the ratio of the p50s, {formatting.times(ratio)}, lies outside "
        f"the interval of the speed-up ({case})."
    )


def speed_notes(measurements: Sequence[Measurement]) -> list[str]:
    """Return the sentences that explain why speed-ups and the ratios of p50s differ."""
    pace_notes = []
    for item in measurements:
        dense, pruned = medians_ms(item)
        case = f"{runtime_name(item.runtime)}, batch {item.batch_size}"
        pace_notes.append(changed_pace(case, dense, pruned, item.speedup.low, item.speedup.high))
    return [SPEED_UP, *filter(None, pace_notes)] if measurements else []


def medians_ms(item: Measurement) -> tuple[float, float]:
    """Return the p50s of the dense and the pruned network."""
    return item.summary.dense.p50_ms, item.summary.pruned.p50_ms


def device_name(report: Report, runtime: str) -> str:
    """Return the device that a runtime ran on, a CPU with its number of threads."""
    devices = report.environment.get("cuda_devices")
    if runtime in GPU_RUNTIMES and devices:
        return str(devices[0]["name"])
    cpu = str(report.environment.get("cpu") or "this machine's CPU")
    count = report.protocol.get("threads")
    return f"{cpu} ({threads(count)})" if isinstance(count, int) and runtime not in GPU_RUNTIMES else cpu


def threads(count: int) -> str:
    """Return a number of threads, as "1 thread"."""
    return f"{count} thread{'' if count == 1 else 's'}"


def change_of_flops(report: Report) -> str:
    """Return the relative change of the FLOPs, for titles: "FLOPs −50.1 %"."""
    if report.pruned.flops == report.dense.flops:
        text = "FLOPs unchanged"
    else:
        text = f"FLOPs {formatting.change(report.dense.flops, report.pruned.flops)}"
    return text if report.sparsity is None else f"{text}, weights {report.sparsity.pattern} sparse"


def headline(report: Report) -> Measurement | None:
    """Return the measurement that the verdict reports.

    A fixed rule chooses it: that of the latency budget, or else the first runtime at its largest batch size.
    """
    budget = report.latency_budget
    if budget is not None:
        where = (budget.runtime, budget.batch_size)
        return next((item for item in report.profile if (item.runtime, item.batch_size) == where), None)
    first = [item for item in report.profile if item.runtime == report.profile[0].runtime]
    return max(first, key=lambda item: item.batch_size, default=None)


def verdict(report: Report) -> str:
    """Return the report in one sentence; a speed-up within the noise is not claimed."""
    item = headline(report)
    fewer = fewer_flops(report)
    if item is None:
        return f"Speed not measured; {fewer}{_quality(report)}."
    where = f"at batch {item.batch_size} on {device_name(report, item.runtime)} with {runtime_name(item.runtime)}"
    where += in_precision(report)
    ratio = report.realised_ratio(item)
    realised = "" if ratio is None else f", realised ratio {ratio.value:.2f}"
    return f"{_speed(item, where)}, {fewer}{realised}{_exceptions(report, item)}{_quality(report)}."


def fewer_flops(report: Report) -> str:
    """Return the FLOP reduction and the sparsity of the weights."""
    fewer = f"{formatting.times(report.flops_reduction)} fewer FLOPs"
    if report.sparsity is None:
        return fewer
    sparse = f"weights {report.sparsity.pattern} sparse"
    return f"FLOPs unchanged, {sparse}" if report.pruned.flops == report.dense.flops else f"{fewer}, {sparse}"


def sparsity(report: Report) -> str | None:
    """Return how sparse the weights are and which hardware uses it; None if they are not sparse."""
    sparse = report.sparsity
    if sparse is None:
        return None
    layers = f"{sparse.maps} linear layer{'' if sparse.maps == 1 else 's'}"
    text = (
        f"{sparse.pattern} in {layers} with {formatting.percent(sparse.flops_share)} of the FLOPs: "
        f"{formatting.percent(sparse.zeros)} of their weights are zero. FLOPs count zeros like other weights; only "
        "GPUs with sparse tensor cores skip them, through TensorRT."
    )
    if sparse.left_dense:
        more = f" and {len(sparse.left_dense) - 3} more" if len(sparse.left_dense) > 3 else ""
        text += f" Left dense in the blocks: {', '.join(sparse.left_dense[:3])}{more}."
    return text


def in_precision(report: Report) -> str:
    """Return the precision of the measurements, as " in fp16"; empty for float32."""
    return "" if report.precision == "fp32" else f" in {report.precision}"


def precision(report: Report) -> str | None:
    """Return the precision of both networks, in a sentence; None for float32."""
    sentences = {
        "fp32": None,
        "tf32": "Both networks in float32, computed in TF32 on GPUs.",
        "int8": "Both networks in int8: linear layers and convolutions, everything else in fp32.",
        "fp8": "Both networks in fp8: linear layers, everything else in fp32.",
    }
    return sentences.get(report.precision, f"Both networks in {report.precision}, norms in fp32.")


def latency_budget(report: Report) -> str | None:
    """Return how the latency budget was met; None if there was none."""
    met = report.latency_budget
    if met is None:
        return None
    budget = f"{met.fraction:.3g} of the dense latency with {runtime_name(met.runtime)} at batch {met.batch_size}"
    best = met.rounds[met.taken]
    built = "1 network was" if len(met.rounds) == 1 else f"{len(met.rounds)} networks were"
    return (
        f"Budget: {budget}. {built} built and measured; the chosen one takes "
        f"{formatting.milliseconds(best.measured_ms)} ms of {formatting.milliseconds(met.limit_ms)} ms "
        f"({best.measured_ms / met.limit_ms:.3f} of the budget), predicted "
        f"{formatting.milliseconds(best.predicted_ms)} ms."
    )


def headline_layers(report: Report) -> LayerBreakdown | None:
    """Return the latency breakdown of the headline's runtime, at its batch size or else at the largest."""
    item = headline(report)
    entries = [entry for entry in report.layers if item is None or entry.runtime == item.runtime]
    return max(
        entries,
        key=lambda entry: (item is not None and entry.batch_size == item.batch_size, entry.batch_size),
        default=None,
    )


def profiled_share(entry: LayerBreakdown) -> str:
    """Return the sums of the unscaled profiles as shares of the measured latencies, dense and pruned."""
    dense, pruned = (
        formatting.percent(own / whole)
        for own, whole in (
            (entry.profiled.dense_ms, entry.measured.dense_ms),
            (entry.profiled.pruned_ms, entry.measured.pruned_ms),
        )
    )
    return f"{dense} (dense) and {pruned} (pruned)"


def builds(report: Report) -> str | None:
    """Return how much repeated builds of an engine differ; None if each was built once."""
    spreads = [
        f"{runtime_name(item.runtime)} at batch {item.batch_size}: "
        + ", ".join(
            f"{len(item.builds[name].p50_ms)} of {name} within {formatting.percent(item.builds[name].spread)}"
            for name in VARIANTS
            if name in item.builds
        )
        for item in report.profile
        if item.builds
    ]
    return f"Builds of one engine, spread of their medians: {'; '.join(spreads)}." if spreads else None


def faster(item: Measurement) -> bool:
    """Return whether the pruned network is significantly faster."""
    return item.significant and item.speedup.value > 1


def _speed(item: Measurement, where: str) -> str:
    if faster(item):
        return f"{formatting.times(item.speedup.value)} faster {where}"
    if item.significant:
        return f"{formatting.times(1 / item.speedup.value)} slower {where}"
    speedup = formatting.times(item.speedup.value)
    inside = item.noise.low <= item.speedup.value <= item.noise.high
    if inside:
        reason = f"{speedup} is inside the A/A noise of {formatting.noise(item.noise)}"
    else:
        reason = f"{speedup} [{formatting.bounds(item.speedup)}] cannot be told apart from the A/A noise"
    return f"No measurable speed-up {where}: {reason}"


def _exceptions(report: Report, item: Measurement) -> str:
    """Return the measurements that are not faster although the headline is."""
    if not faster(item):
        return ""
    others = [_case(o) for o in report.profile if not faster(o)]
    return f"; not faster with {' or '.join(others)}" if others else ""


def _quality(report: Report) -> str:
    if has_random_weights(report.model):
        return ""
    if report.evaluation is not None:
        result = report.evaluation
        return f"; {result.metric} {result.dense:.1f} → {result.kept:.1f}"
    if not report.agreement:
        return ""
    first = report.agreement[0]
    return f"; {likeness(first)}"


def likeness(entry: Agreement) -> str:
    """Return the agreement of one output by its most meaningful figure."""
    if entry.sign_agreement is not None:
        return f"same yes or no on {formatting.percent(entry.sign_agreement)}"
    if entry.correlation is not None:
        return f"correlation of the maps {entry.correlation:.3f}"
    if entry.top1_agreement is not None:
        return f"same top answer on {formatting.percent(entry.top1_agreement)}"
    if entry.rank_correlation is not None:
        return f"rank correlation {entry.rank_correlation:.3f}"
    return f"cosine of the outputs {entry.cosine:.3f}"
