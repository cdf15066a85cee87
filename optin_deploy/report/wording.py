"""What the report says in words: the verdict, the banners, and the names of runtimes and devices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from optin_deploy.report.schema import Agreement, LayerAccount, LeftDense, Measurement, Report, Unmeasured, VariantName
from optin_deploy.utils import formatting
from profilers import GPU_RUNTIMES
from profilers import Measurement as Measured
from profilers.gpu_watch import SLOWDOWNS

RANDOM_WEIGHTS = (
    "Random weights: the latency figures are real, the accuracy and agreement figures mean nothing. "
    "Train the network, or name a checkpoint, before you judge its outputs."
)
BUILTIN_CALIBRATION = (
    "Built-in calibration: the units were scored on the small sample set that comes with the product. "
    "Calibrate on your own data before you deploy."
)

SPEED_UP = (
    "Speed-up: dense ÷ pruned within each round, interquartile mean over rounds; the p50s are over all rounds, so "
    "their own ratio may differ."
)

VARIANTS: tuple[VariantName, ...] = ("dense", "pruned")
_RUNTIMES = {
    "ort-cpu": "ONNX Runtime",
    "ort-cuda": "ONNX Runtime CUDA",
    "ort-tensorrt": "ONNX Runtime TensorRT",
    "torch": "PyTorch",
    "torch-cuda": "PyTorch CUDA",
    "torch-graph-cuda": "PyTorch CUDA graph",
    "tensorrt": "TensorRT",
    "rtx": "TensorRT for RTX",
}


@dataclass(frozen=True)
class Banner:
    """Something to know before any figure is read: an alarm spoils figures, a notice qualifies them."""

    level: Literal["alarm", "notice"]
    text: str


def banners(report: Report) -> tuple[Banner, ...]:
    """What stands above the report, most important first: failed gates, random weights, what could not be measured,
    calibration, warnings."""
    found = [Banner("alarm", f"Gate failed: {gate.name}. {gate.detail}") for gate in report.gates if not gate.passed]
    if report.model.weights == "random":
        found.append(Banner("alarm", RANDOM_WEIGHTS))
    found += [Banner("alarm", unmeasured(item)) for item in report.unmeasured]
    if report.calibration.builtin:
        found.append(Banner("notice", BUILTIN_CALIBRATION))
    unsettled = [_case(m) for m in report.profile if not m.converged]
    if unsettled:
        cases = ", ".join(unsettled)
        found.append(Banner("notice", f"Not settled to ±2 % in the time given, see the intervals: {cases}."))
    found += [Banner("notice", text) for item in report.profile if (text := slowed_down(item))]
    return (*found, *(Banner("notice", text) for text in report.warnings))


def unmeasured(item: Unmeasured) -> str:
    """That a runtime could not be measured, and why."""
    return f"Not measured with {runtime_name(item.runtime)}: {item.reason}."


def left_dense(each: LeftDense) -> str:
    """The name of what stays dense, with how many there are."""
    return each.module if each.count == 1 else f"{each.module} ({each.count})"


def agreement(entry: Agreement) -> str:
    """How alike one output of both networks is, and on how many samples: they are not those of the evaluation."""
    told = f"cosine {entry.cosine:.4f}, relative error {formatting.percent(entry.relative_error)}"
    if entry.top1_agreement is not None:
        told += f", same top answer on {formatting.percent(entry.top1_agreement)}"
    if entry.sign_agreement is not None:
        told += f", same yes or no on {formatting.percent(entry.sign_agreement)}"
    if entry.rank_correlation is not None:
        told += f", rank correlation {entry.rank_correlation:.3f}"
    if entry.correlation is not None:
        told += f", correlation of the maps {entry.correlation:.3f}"
    return f"{told} ({entry.samples} held-out sample{'' if entry.samples == 1 else 's'})"


def slowed_down(item: Measurement) -> str | None:
    """That the GPU ran slower than it can while this was measured; not a word of its power limit, which is normal."""
    reasons = [reason for reason in item.gpu.reasons or () if reason in SLOWDOWNS] if item.gpu else []
    if not reasons:
        return None
    return (
        f"The GPU slowed itself down ({', '.join(reasons)}) while {_case(item)} was measured: its latencies are those "
        "of a GPU that lacks cooling or power."
    )


def on_gpu(report: Report) -> list[str]:
    """A line for every measurement on a GPU: time on the device, clocks, power, temperature, memory."""
    return [f"{_case(item)}: {', '.join(found)}" for item in report.profile if (found := _gpu_figures(item))]


def _gpu_figures(item: Measurement) -> list[str]:
    found = []
    if item.device_ms:
        dense, pruned = (formatting.milliseconds(item.device_ms[name]) for name in ("dense", "pruned"))
        found.append(f"on the device {dense} → {pruned} ms")
    if item.cuda_graph:
        without = [name for name, used in item.cuda_graph.items() if not used]
        found.append(f"no CUDA graph of {' and '.join(without)}" if without else "CUDA graph")
    gpu = item.gpu
    if gpu is None:
        return found
    if not gpu.watched:
        return [*found, f"not watched: {gpu.unwatched_because}"]
    if gpu.median_clock_mhz is not None:
        found.append(f"{gpu.median_clock_mhz:.0f} MHz ({gpu.min_clock_mhz:.0f}–{gpu.max_clock_mhz:.0f})")
    if gpu.mean_power_w is not None:
        found.append(f"{gpu.mean_power_w:.0f} W (at most {gpu.max_power_w:.0f})")
    if gpu.max_temperature_c is not None:
        found.append(f"at most {gpu.max_temperature_c:.0f} °C")
    if gpu.peak_memory_mib is not None:
        found.append(f"{gpu.peak_memory_mib:.0f} MiB")
    if gpu.reasons is None:
        found.append("unknown whether its clocks were held down")
    elif gpu.reasons:
        found.append(f"clocks held by: {', '.join(gpu.reasons)}")
    return found


def _case(item: Measurement) -> str:
    return f"{runtime_name(item.runtime)} at batch {item.batch_size}"


def runtime_name(runtime: str) -> str:
    """A runtime as people call it."""
    return _RUNTIMES.get(runtime, runtime)


def changed_pace(case: str, dense_ms: float, pruned_ms: float, low: float, high: float) -> str | None:
    """That the ratio of the p50s lies outside the interval of the speed-up, of figures as they are written."""
    ratio = round(dense_ms / pruned_ms, 2)
    if round(low, 2) <= ratio <= round(high, 2):
        return None
    return (
        f"The machine's pace changed between rounds: the ratio of the p50s, {formatting.times(ratio)}, lies outside "
        f"the interval of the speed-up ({case})."
    )


def speed_notes(measurements: Sequence[Measurement] | Sequence[Measured]) -> list[str]:
    """What keeps speed-ups and p50s that stand side by side from reading as a contradiction, a sentence each."""
    found = []
    for item in measurements:
        dense, pruned = _medians(item)
        case = f"{runtime_name(item.runtime)}, batch {item.batch_size}"
        found.append(changed_pace(case, dense, pruned, item.speedup.low, item.speedup.high))
    return [SPEED_UP, *filter(None, found)] if measurements else []


def _medians(item: Measurement | Measured) -> tuple[float, float]:
    if isinstance(item, Measured):
        return item.summary["dense"].p50_ms, item.summary["pruned"].p50_ms
    return item.summary.dense.p50_ms, item.summary.pruned.p50_ms


def device_name(report: Report, runtime: str) -> str:
    """What the runtime ran on, a CPU with how many of its threads."""
    devices = report.environment.get("cuda_devices")
    if runtime in GPU_RUNTIMES and devices:
        return str(devices[0]["name"])
    cpu = str(report.environment.get("cpu") or "this machine's CPU")
    count = report.protocol.get("threads")
    return f"{cpu} ({threads(count)})" if isinstance(count, int) and runtime not in GPU_RUNTIMES else cpu


def threads(count: int) -> str:
    """A number of threads, as "1 thread"."""
    return f"{count} thread{'' if count == 1 else 's'}"


def change_of_flops(report: Report) -> str:
    """What became of the FLOPs, for titles, as in the tables: "FLOPs −50.1 %"."""
    if report.pruned.flops == report.dense.flops:
        told = "as many FLOPs"
    else:
        told = f"FLOPs {formatting.change(report.dense.flops, report.pruned.flops)}"
    return told if report.sparsity is None else f"{told}, weights {report.sparsity.pattern} sparse"


def headline(report: Report) -> Measurement | None:
    """The measurement the verdict speaks of: that of a latency budget, or else the first runtime at its largest batch.

    A rule, so nobody picks it.
    """
    budget = report.latency_budget
    if budget is not None:
        where = (budget.runtime, budget.batch_size)
        return next((item for item in report.profile if (item.runtime, item.batch_size) == where), None)
    first = [item for item in report.profile if item.runtime == report.profile[0].runtime]
    return max(first, key=lambda item: item.batch_size, default=None)


def verdict(report: Report) -> str:
    """The report in one sentence, which claims no speed-up that the noise does not allow."""
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
    """By what factor there are fewer FLOPs, and that weights are zero."""
    fewer = f"{formatting.times(report.flops_reduction)} fewer FLOPs"
    if report.sparsity is None:
        return fewer
    sparse = f"weights {report.sparsity.pattern} sparse"
    return f"as many FLOPs, {sparse}" if report.pruned.flops == report.dense.flops else f"{fewer}, {sparse}"


def sparsity(report: Report) -> str | None:
    """How sparse the weights are and what that is good for, in two sentences; None where they were not made sparse."""
    found = report.sparsity
    if found is None:
        return None
    maps = f"{found.maps} linear map{'' if found.maps == 1 else 's'}"
    told = (
        f"{found.pattern} in {maps} with {formatting.percent(found.flops_share)} of the FLOPs: "
        f"{formatting.percent(found.zeros)} of their weights are zero. FLOPs count zeros as any weight; they are "
        "skipped only on GPUs with sparse tensor cores, through TensorRT."
    )
    if found.left_dense:
        more = f" and {len(found.left_dense) - 3} more" if len(found.left_dense) > 3 else ""
        told += f" Dense in the blocks are {', '.join(found.left_dense[:3])}{more}."
    return told


def in_precision(report: Report) -> str:
    """That both networks were measured in another precision than float32."""
    return "" if report.precision == "fp32" else f" in {report.precision}"


def precision(report: Report) -> str | None:
    """What both networks were measured in, a sentence; None for float32."""
    said = {
        "fp32": None,
        "tf32": "Both networks in float32, computed in TF32 on GPUs.",
        "int8": "Both networks in int8: their linear maps and convolutions, all else in fp32.",
        "fp8": "Both networks in fp8: their linear maps, all else in fp32.",
    }
    return said.get(report.precision, f"Both networks in {report.precision}, norms in fp32.")


def latency_budget(report: Report) -> str | None:
    """How the latency budget was met, in a sentence; None where there was none."""
    met = report.latency_budget
    if met is None:
        return None
    asked = f"{met.fraction:.3g} of the dense latency with {runtime_name(met.runtime)} at batch {met.batch_size}"
    best = met.rounds[met.taken]
    built = f"{len(met.rounds)} network{'s' if len(met.rounds) > 1 else ''} built and measured"
    return (
        f"Asked for {asked}: {built}; the one taken needs {formatting.milliseconds(best.measured_ms)} ms of "
        f"{formatting.milliseconds(met.limit_ms)} ms ({best.measured_ms / met.limit_ms:.3f} of the budget), predicted "
        f"{formatting.milliseconds(best.predicted_ms)} ms."
    )


def headline_layers(report: Report) -> LayerAccount | None:
    """The account of the headline's runtime: at its batch size, or else at the largest."""
    item = headline(report)
    mine = [entry for entry in report.layers if item is None or entry.runtime == item.runtime]
    return max(
        mine,
        key=lambda entry: (item is not None and entry.batch_size == item.batch_size, entry.batch_size),
        default=None,
    )


def profiled_share(entry: LayerAccount) -> str:
    """How far the profiles alone are from the measured latencies, dense and pruned."""
    dense, pruned = (
        formatting.percent(own / whole)
        for own, whole in (
            (entry.profiled.dense_ms, entry.measured.dense_ms),
            (entry.profiled.pruned_ms, entry.measured.pruned_ms),
        )
    )
    return f"{dense} (dense) and {pruned} (pruned)"


def builds(report: Report) -> str | None:
    """How much the builds of one engine differ, in a sentence; None where each was built once."""
    told = [
        f"{runtime_name(item.runtime)} at batch {item.batch_size}: "
        + ", ".join(
            f"{len(item.builds[name].p50_ms)} of {name} within {formatting.percent(item.builds[name].spread)}"
            for name in VARIANTS
            if name in item.builds
        )
        for item in report.profile
        if item.builds
    ]
    return f"Builds of one engine, by their medians: {'; '.join(told)}." if told else None


def faster(item: Measurement) -> bool:
    """Whether the pruned network is measurably faster."""
    return item.significant and item.speedup.value > 1


def _speed(item: Measurement, where: str) -> str:
    if faster(item):
        return f"{formatting.times(item.speedup.value)} faster {where}"
    if item.significant:
        return f"{formatting.times(1 / item.speedup.value)} slower {where}"
    found = formatting.times(item.speedup.value)
    inside = item.noise.low <= item.speedup.value <= item.noise.high
    if inside:
        reason = f"{found} is inside the A/A noise of {formatting.noise(item.noise)}"
    else:
        reason = f"{found} [{formatting.bounds(item.speedup)}] does not stand out of the A/A noise"
    return f"No measurable speed-up {where}: {reason}"


def _exceptions(report: Report, item: Measurement) -> str:
    """The measurements that a reader of a good headline would wrongly believe to be good as well."""
    if not faster(item):
        return ""
    others = [_case(o) for o in report.profile if not faster(o)]
    return f"; not faster with {' or '.join(others)}" if others else ""


def _quality(report: Report) -> str:
    if report.model.weights == "random":
        return ""
    if report.evaluation is not None:
        found = report.evaluation
        return f"; {found.metric} {found.dense:.1f} → {found.kept:.1f}"
    if not report.agreement:
        return ""
    first = report.agreement[0]
    return f"; {likeness(first)}"


def likeness(entry: Agreement) -> str:
    """How alike one output of both networks is, by the one figure that says most of it."""
    if entry.sign_agreement is not None:
        return f"same yes or no on {formatting.percent(entry.sign_agreement)}"
    if entry.correlation is not None:
        return f"correlation of the maps {entry.correlation:.3f}"
    if entry.top1_agreement is not None:
        return f"same top answer on {formatting.percent(entry.top1_agreement)}"
    if entry.rank_correlation is not None:
        return f"rank correlation {entry.rank_correlation:.3f}"
    return f"cosine of the outputs {entry.cosine:.3f}"
