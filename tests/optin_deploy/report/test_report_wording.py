"""The verdict and the banners: honest in every case."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, get_args

import pytest
from rich.console import Console

from exporters import Precision
from optin_deploy.report import Report, markdown, model_card, wording
from optin_deploy.report.terminal import summary
from optin_deploy.report.web_page import render
from optin_deploy.report.wording import banners, on_gpu, sparsity, verdict
from profilers import GpuWatch

CPU = "AMD EPYC 7763"


def says(text: str, *facts: str) -> bool:
    """Whether ``text`` has all these figures and names; how it puts them is for the golden files."""
    missing = [fact for fact in facts if fact.lower() not in text.lower()]
    assert not missing, text
    return True


def measured(data: dict[str, Any], *cases: tuple[str, int, float, bool]) -> Report:
    """The report with exactly these (runtime, batch, speed-up, significant), each ±2 %, in A/A noise of ±3 %."""
    data["profile"] = [
        data["profile"][0]
        | {
            "runtime": runtime,
            "batch_size": batch,
            "speedup": {"value": value, "low": value * 0.98, "high": value * 1.02},
            "noise": {"value": 1.0, "low": 0.98, "high": 1.03},
            "significant": significant,
        }
        for runtime, batch, value, significant in cases
    ]
    data["pruned"]["flops"] = data["dense"]["flops"] // 2
    return Report.model_validate(data)


def test_faster(data: dict[str, Any]) -> None:
    report = measured(data, ("ort-cpu", 1, 1.5, True), ("ort-cpu", 8, 1.84, True), ("torch", 8, 1.2, True))
    assert says(verdict(report), "1.84× faster", "batch 8", CPU, "4 threads", "ONNX Runtime", "2.00×", "0.92")
    assert says(verdict(report), "top-1", "79.8 → 76.9")


def test_slower(data: dict[str, Any]) -> None:
    text = verdict(measured(data, ("torch", 4, 0.8, True)))
    assert says(text, "1.25× slower", "batch 4", CPU, "PyTorch", "2.00×", "0.40") and "faster" not in text


def test_inside_the_noise(data: dict[str, Any]) -> None:
    text = verdict(measured(data, ("ort-cpu", 8, 1.01, False)))
    assert says(text, "no measurable", "batch 8", CPU, "ONNX Runtime", "1.01×", "inside", "±3.0 %")
    assert "faster" not in text


def test_not_significant_though_outside_the_noise(data: dict[str, Any]) -> None:
    text = verdict(measured(data, ("ort-cpu", 8, 1.04, False)))
    assert says(text, "no measurable", "1.04× [1.02–1.06]", "noise")
    assert "inside" not in text and "faster" not in text


def test_a_good_headline_names_what_is_not_faster(data: dict[str, Any]) -> None:
    report = measured(data, ("ort-cpu", 1, 1.0, False), ("ort-cpu", 8, 1.8, True), ("torch", 8, 0.9, True))
    exception = verdict(report).partition("not faster")[2].partition(";")[0]
    assert says(exception, "ONNX Runtime", "batch 1", "PyTorch", "batch 8")


def test_a_gpu_is_named_for_its_runtime(data: dict[str, Any]) -> None:
    data["environment"]["cuda_devices"] = [{"name": "NVIDIA H200", "memory_gib": 139.0, "compute_capability": "9.0"}]
    on_cuda, on_cpu = (verdict(measured(data, (runtime, 8, 1.8, True))) for runtime in ("ort-cuda", "torch"))
    assert says(on_cuda, "NVIDIA H200", "ONNX Runtime CUDA") and "AMD" not in on_cuda
    assert says(on_cpu, CPU, "PyTorch") and "NVIDIA" not in on_cpu


def test_lower_precision_is_told_with_what_it_gives(data: dict[str, Any]) -> None:
    data["precision"] = "fp16"
    data["evaluation"]["deployed"] = 76.4
    found = verdict(Report.model_validate(data))
    assert says(found, "ONNX Runtime", "fp16", "79.8 → 76.4")


def with_gpu(data: dict[str, Any], **gpu: Any) -> Report:
    """The report with figures of a GPU at its second measurement, ONNX Runtime at batch 8."""
    data["profile"][1] |= {
        "device_ms": {"dense": 1.234, "dense_again": 1.23, "pruned": 0.789},
        "cuda_graph": {"dense": True, "dense_again": True, "pruned": True},
        "gpu": asdict(GpuWatch(**{"watched": True, **gpu})),
    }
    return Report.model_validate(data)


def test_figures_of_a_gpu_are_one_line(data: dict[str, Any]) -> None:
    assert on_gpu(Report.model_validate(data)) == []
    figures = {"mean_power_w": 312.4, "max_power_w": 402.0, "max_temperature_c": 61.0, "peak_memory_mib": 2340.5}
    clocks = {"min_clock_mhz": 1755.0, "median_clock_mhz": 1980.0, "max_clock_mhz": 1980.0}
    found = with_gpu(data, **figures, **clocks, reasons=("power cap", "thermal slowdown"))
    (line,) = on_gpu(found)
    assert says(
        line, "ONNX Runtime", "batch 8", "1.23 → 0.789 ms", "CUDA graph", "1980 MHz", "1755–1980", "312 W", "402"
    )
    assert says(line, "61 °C", "2340 MiB", "power cap", "thermal slowdown") and "no CUDA graph" not in line
    (banner,) = banners(found)
    assert banner.level == "notice"
    assert says(banner.text, "GPU", "thermal slowdown", "ONNX Runtime", "batch 8") and "power cap" not in banner.text


def test_a_gpu_that_tells_little_is_told_of_in_few_words(data: dict[str, Any]) -> None:
    with_gpu(data, watched=False, unwatched_because="nvidia-ml-py is not installed")
    data["profile"][1]["cuda_graph"]["pruned"] = False
    (line,) = on_gpu(Report.model_validate(data))
    assert says(line, "1.23 → 0.789 ms", "no CUDA graph", "pruned", "nvidia-ml-py is not installed")
    assert "MHz" not in line and " W" not in line
    assert banners(with_gpu(data, reasons=("power cap", "clocks set by the user"))) == ()


def sparse(data: dict[str, Any], **changes: Any) -> dict[str, Any]:
    found = {"pattern": "2:4", "maps": 36, "zeros": 0.5, "flops_share": 0.891, "left_dense": []}
    return data | {"sparsity": found | changes}


def test_sparsity_alone_promises_nothing(data: dict[str, Any]) -> None:
    report = measured(sparse(data), ("ort-cpu", 8, 1.01, False))
    whole = report.model_copy(update={"pruned": report.dense})
    text = verdict(whole)
    assert (
        says(text, "no measurable", "1.01×", "±3.0 %", "2:4 sparse") and "fewer" not in text and "realised" not in text
    )
    assert whole.realised_ratio(whole.profile[0]) is None and whole.realised == []
    assert says(verdict(report), "2.00× fewer", "2:4 sparse", "realised ratio 0.51")


def test_what_sparsity_is_good_for_is_told(data: dict[str, Any]) -> None:
    assert sparsity(Report.model_validate(data)) is None
    every = sparsity(Report.model_validate(sparse(data)))
    assert every is not None and says(every, "2:4", "36", "89.1 %", "50.0 %", "sparse tensor cores", "TensorRT")
    names = ["first", "second", "third", "fourth"]
    some = sparsity(Report.model_validate(sparse(data, maps=1, left_dense=names)))
    assert some is not None and says(some, "first, second, third", "1 more") and "fourth" not in some
    assert "first" not in every and "maps" not in some


def test_threads_are_told_of_cpus_only(data: dict[str, Any]) -> None:
    data["environment"]["cuda_devices"] = [{"name": "NVIDIA H200", "memory_gib": 139.0, "compute_capability": "9.0"}]
    data["protocol"]["threads"] = 1
    report = Report.model_validate(data)
    assert wording.device_name(report, "torch").endswith(" (1 thread)")
    assert wording.device_name(report, "torch-cuda") == "NVIDIA H200"
    del data["protocol"]["threads"]
    assert "thread" not in wording.device_name(Report.model_validate(data), "torch")


@pytest.mark.parametrize(
    ("medians", "bounds", "contradict"),
    [((18.5, 12.2), (1.37, 1.50), True), ((10.2, 7.17), (1.36, 2.11), False), ((10.04, 8.0), (1.25, 1.3), False)],
)
def test_the_pace_changed_where_the_medians_contradict_the_interval(
    medians: tuple[float, float], bounds: tuple[float, float], contradict: bool
) -> None:
    told = wording.changed_pace("PyTorch, batch 1", *medians, *bounds)
    assert (told is not None) is contradict
    if contradict:
        assert says(str(told), "1.52×", "outside", "PyTorch, batch 1")


def test_speedups_beside_medians_are_explained_in_every_rendering(data: dict[str, Any]) -> None:
    data["profile"][0]["speedup"] = {"value": 3.0, "low": 2.9, "high": 3.1}
    report = Report.model_validate(data)
    general, pace = wording.speed_notes(report.profile)
    for text in (
        render(report),
        markdown.render(report),
        model_card.render(report, model_card.Facts(())),
        shown(report),
    ):
        flat = " ".join(text.replace("&#39;", "'").split())
        assert general in flat and pace in flat
    assert wording.speed_notes([]) == []


def test_titles_read_as_the_tables(data: dict[str, Any]) -> None:
    report = Report.model_validate(data)
    assert wording.change_of_flops(report) == "FLOPs −50.2 %"
    assert "<title>deit_small_patch16_224, pruned: FLOPs −50.2 %</title>" in render(report)
    assert "# deit\\_small\\_patch16\\_224, pruned: FLOPs −50.2 %" in model_card.render(report, model_card.Facts(()))
    whole = Report.model_validate(sparse(data)).model_copy(update={"pruned": report.dense})
    assert wording.change_of_flops(whole) == "as many FLOPs, weights 2:4 sparse"


def test_agreement_and_evaluation_say_on_how_many_samples(data: dict[str, Any]) -> None:
    report = Report.model_validate(data)
    for text in (markdown.render(report), shown(report)):
        flat = " ".join(text.split())
        assert says(flat, "91.4 % (256 held-out samples)", "ImageNet-1k val (5000 samples)")


def shown(report: Report) -> str:
    console = Console(width=200)
    with console.capture() as captured:
        console.print(summary(report))
    return captured.get()


def test_nothing_measured(data: dict[str, Any]) -> None:
    data["profile"] = []
    text = verdict(Report.model_validate(data))
    assert says(text, "not measured", "2.01× fewer FLOPs") and "faster" not in text


@pytest.mark.parametrize(
    ("agreement", "ending"),
    [({}, "91.4 %."), ({"top1_agreement": None}, "0.973.")],
)
def test_without_an_evaluation_the_outputs_are_compared(
    agreement: dict[str, Any], ending: str, data: dict[str, Any]
) -> None:
    data["evaluation"] = None
    data["agreement"][0] |= agreement
    assert verdict(Report.model_validate(data)).endswith(ending)


def test_random_weights_claim_nothing_of_the_outputs(data: dict[str, Any]) -> None:
    data["model"]["weights"] = "random"
    report = Report.model_validate(data)
    assert "top-1" not in verdict(report)
    (banner,) = banners(report)
    assert banner.level == "alarm"
    assert says(banner.text, "random weights", "latency", "accuracy", "agreement")


def test_banners_are_ordered_by_what_they_spoil(data: dict[str, Any]) -> None:
    assert banners(Report.model_validate(data)) == ()
    data["calibration"]["builtin"] = True
    data["gates"][0]["passed"] = False
    data["profile"][0]["converged"] = False
    data["warnings"] = ["head left dense"]
    data["unmeasured"] = [{"runtime": "rtx", "reason": "no GPU is present"}]
    found = banners(Report.model_validate(data))
    assert [banner.level for banner in found] == ["alarm", "alarm", "notice", "notice", "notice"]
    causes = [("gate", "parity"), ("TensorRT for RTX", "no GPU is present"), ("built-in",), ("ONNX Runtime",)]
    assert all(says(banner.text, *facts) for banner, facts in zip(found, [*causes, ("head left dense",)], strict=True))


def test_how_builds_differ_is_one_line(data: dict[str, Any]) -> None:
    # Of reports written before builds were told apart.
    assert wording.builds(Report.model_validate(data)) is None
    of = {"p50_ms": [1.0, 1.02, 1.01], "spread": 0.02}
    data["profile"][3] |= {
        "runtime": "rtx",
        "builds": {"dense": of, "dense_again": of, "pruned": of | {"spread": 0.035}},
    }
    report = Report.model_validate(data)
    line = wording.builds(report)
    assert line is not None and says(line, "TensorRT for RTX", "batch 8", "3 of dense", "2.0 %", "3 of pruned", "3.5 %")
    assert line in render(report)


def test_what_is_computed_in_which_precision_is_told(data: dict[str, Any]) -> None:
    told = {p: wording.precision(Report.model_validate(data | {"precision": p})) for p in get_args(Precision)}
    assert told.pop("fp32") is None
    assert all(told.values()) and len(set(told.values())) == 5
