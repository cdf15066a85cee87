"""Whole renderings of reports, compared with golden files: ``pytest --update-golden`` writes them anew."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, get_args

import pytest
from renderings import CheckGolden, terminal_text, visible_text

from exporters import OutputParity, Precision
from optin_deploy.export.command import Exported
from optin_deploy.report import Report, markdown, model_card, wording
from optin_deploy.report.comparison import as_markdown, lines, view
from optin_deploy.report.profile_tables import (
    LatencyTables,
    NetworkProfile,
    PartTable,
    PartTime,
    SizeRow,
    profile_line,
    render_cache,
    render_latency_tables,
    render_profile,
)
from optin_deploy.report.terminal import render_exported, summary
from optin_deploy.report.web_page import render
from optin_deploy.sweeps.report_builder import build_sweep_report
from optin_deploy.sweeps.terminal import summary as sweep_summary
from optin_deploy.sweeps.web_page import render as sweep_page
from profilers.stats import Summary


def _row(name: str, dense_ms: float, pruned_ms: float, flops: int = 0) -> dict[str, Any]:
    return {
        "name": name,
        "dense_ms": dense_ms,
        "pruned_ms": pruned_ms,
        "dense_flops": flops,
        "pruned_flops": flops // 2,
    }


def _layers(doubt: str | None) -> dict[str, Any]:
    return {
        "runtime": "ort-cpu",
        "batch_size": 8,
        "parts": [_row("attention", 15.0, 9.5, 3000), _row("FFN", 20.0, 10.0, 6000), _row("embedding", 1.5, 1.5)],
        "blocks": [_row("blocks.0", 35.0, 19.5, 9000), _row("", 1.5, 1.5)],
        "kinds": [_row("matrix products", 30.0, 17.0), _row("softmax", 6.5, 4.0)],
        "between": _row("between operators", 0.5, 0.5),
        "measured": _row("measured", 37.0, 21.5, 9000),
        "profiled": _row("profiled", 38.0, 21.0, 9000),
        "lost_ms": 3.0,
        "causes": [] if doubt else [{"lost_ms": 3.0, "sentence": "Norms take 5.00 of 21.5 ms and did not shrink."}],
        "doubt": doubt,
    }


def _everything(data: dict[str, Any]) -> dict[str, Any]:
    """A run on a GPU in which nearly all went wrong that can go wrong."""
    data |= {
        "precision": "bf16",
        "sparsity": {"pattern": "2:4", "maps": 36, "zeros": 0.5, "flops_share": 0.891, "left_dense": list("abcd")},
        "unmeasured": [{"runtime": "rtx", "reason": "no GPU is present"}],
        "warnings": ["head left dense"],
        "layers": [_layers(None), _layers("The machine was too busy: it took 2 ms.") | {"batch_size": 1}],
    }
    data["environment"]["cuda_devices"] = [{"name": "NVIDIA H200", "memory_gib": 139.0, "compute_capability": "9.0"}]
    data["model"]["weights"] = "random"
    data["calibration"]["builtin"] = True
    data["evaluation"]["deployed"] = 76.41
    data["gates"][0]["passed"] = False
    data["parity"][1] |= {"runtime": "rtx", "samples": 12, "near_ties": 2}
    builds = {"p50_ms": [1.0, 1.02, 1.01], "spread": 0.02}
    first, second, third, fourth = data["profile"]
    first |= {"converged": False, "speedup": {"value": 3.0, "low": 2.9, "high": 3.1}}
    second |= {
        "device_ms": {"dense": 12.34, "dense_again": 12.3, "pruned": 7.89},
        "cuda_graph": {"dense": True, "dense_again": True, "pruned": False},
        "gpu": {
            "watched": True,
            "mean_power_w": 312.4,
            "max_power_w": 402.0,
            "max_temperature_c": 61.0,
            "peak_memory_mib": 2340.5,
            "min_clock_mhz": 1755.0,
            "median_clock_mhz": 1980.0,
            "max_clock_mhz": 1980.0,
            "reasons": ["power cap", "thermal slowdown"],
        },
    }
    third |= {"runtime": "torch-cuda", "significant": False, "gpu": {"watched": False, "unwatched_because": "no NVML"}}
    fourth |= {"runtime": "rtx", "builds": {"dense": builds, "dense_again": builds, "pruned": builds}}
    return data


def _bare(data: dict[str, Any]) -> dict[str, Any]:
    """A run that measured, compared and kept as little as can be."""
    for key in ("plan", "left_dense", "agreement", "parity", "profile", "gates"):
        data[key] = []
    return data | {"evaluation": None, "protocol": {}, "environment": {}, "settings": {}, "stage_seconds": {}}


@pytest.fixture(params=["usual", "everything", "bare"])
def case(request: pytest.FixtureRequest, data: dict[str, Any]) -> tuple[str, Report]:
    changes: dict[str, Callable[[dict[str, Any]], dict[str, Any]]]
    changes = {"usual": dict, "everything": _everything, "bare": _bare}
    return request.param, Report.model_validate(changes[request.param](data))


def test_terminal(case: tuple[str, Report], check_golden: CheckGolden) -> None:
    check_golden(f"report/{case[0]}.txt", terminal_text(summary(case[1])))


def test_markdown(case: tuple[str, Report], check_golden: CheckGolden) -> None:
    check_golden(f"report/{case[0]}.md", markdown.render(case[1]))


def test_page(case: tuple[str, Report], check_golden: CheckGolden) -> None:
    check_golden(f"report/{case[0]}.html.txt", visible_text(render(case[1])))


def test_card(case: tuple[str, Report], check_golden: CheckGolden) -> None:
    facts = model_card.Facts(
        ("config.json", "model.safetensors", "optin.json"), "someone/dense", "mit", "image-classification"
    )
    check_golden(f"report/{case[0]}.card.md", model_card.render(case[1], facts))


def test_notebook(report: Report, check_golden: CheckGolden) -> None:
    check_golden("report/notebook.txt", repr(report))


def test_comparison(data: dict[str, Any], check_golden: CheckGolden) -> None:
    runs = {"runs/a": Report.model_validate(data)}
    failed = data | {"gates": [{"name": "parity", "passed": False, "detail": "far off"}]}
    runs["runs/b"] = Report.model_validate(failed)
    other = data | {"profile": data["profile"][:1], "environment": data["environment"] | {"cpu": "another"}}
    runs["runs/c"] = Report.model_validate(other | {"evaluation": None})
    compared = lines(runs)
    check_golden("report/comparison.txt", terminal_text(view(compared), width=160))
    check_golden("report/comparison.md", as_markdown(compared))


def _verdict(data: dict[str, Any], speedup: float, significant: bool, **changes: Any) -> str:
    measured = data["profile"][1] | {
        "speedup": {"value": speedup, "low": speedup * 0.98, "high": speedup * 1.02},
        "noise": {"value": 1.0, "low": 0.98, "high": 1.03},
        "significant": significant,
    }
    return wording.verdict(Report.model_validate({**data, "profile": [measured], **changes}))


def test_verdicts_and_precisions(data: dict[str, Any], check_golden: CheckGolden) -> None:
    """The sentences that one report shows only one of."""
    sparsity = {"pattern": "2:4", "maps": 1, "zeros": 0.5, "flops_share": 0.891, "left_dense": []}
    sentences = {
        "faster": _verdict(data, 1.5, True),
        "slower": _verdict(data, 0.8, True),
        "inside the noise": _verdict(data, 1.01, False),
        "outside the noise, not significant": _verdict(data, 1.04, False),
        "sparsity": _verdict(data, 1.01, False, sparsity=sparsity, pruned=data["dense"]),
        "no evaluation": _verdict(data, 1.5, True, evaluation=None),
        "no measurement": wording.verdict(Report.model_validate({**data, "profile": []})),
    }
    for precision in get_args(Precision):
        sentences[precision] = str(wording.precision(Report.model_validate({**data, "precision": precision})))
    check_golden("report/sentences.txt", "\n".join(f"{name}: {sentence}" for name, sentence in sentences.items()))


def test_sweep(data: dict[str, Any], check_golden: CheckGolden) -> None:
    runs = {}
    for flops, accuracy in ((0.8, 79.0), (0.7, 76.0), (0.6, 77.0)):
        changes = {
            "budget": {"flops": flops},
            "pruned": data["pruned"] | {"flops": int(flops * data["dense"]["flops"])},
            "evaluation": data["evaluation"] | {"pruned": accuracy},
            "gates": [data["gates"][0] | {"passed": flops != 0.7}],
            "profile": [
                data["profile"][1] | {"speedup": {"value": 1 / flops, "low": 0.98 / flops, "high": 1.02 / flops}}
            ],
        }
        runs[f"flops-{flops}"] = Report.model_validate(data | changes)
    report = build_sweep_report(runs, {"seed": 0}, "optin-deploy sweep --model deit_small --flops 0.8,0.7,0.6")
    report = report.model_copy(update={name: getattr(runs["flops-0.8"], name) for name in ("created", "version")})
    check_golden("sweep/sweep.txt", terminal_text(sweep_summary(report)))
    check_golden("sweep/sweep.html.txt", visible_text(sweep_page(report)))


def test_export(check_golden: CheckGolden) -> None:
    parity = (OutputParity("logits", 3.1e-6, 1e-6, 9.31, 1e-4, True, (4, 10), 12, 2),)
    files = {"net.onnx": 87_000_000, "net.rtx.engine": 512}
    views = [
        render_exported(Exported(files, parity, {"net.rtx.engine": parity})),
        render_exported(Exported(files, parity, unchecked="Engines are not checked: no GPU is present.")),
    ]
    check_golden("export.txt", "\n".join(map(terminal_text, views)))


def test_profile(check_golden: CheckGolden) -> None:
    parts = (PartTime("attention", 3.0), PartTime("FFN", 6.5), PartTime("between operators", 0.5))
    latency = Summary(p50_ms=10.0, p90_ms=11.0, p99_ms=15.0, mean_ms=10.2, min_ms=9.5, count=97)
    profile = NetworkProfile("ort-cpu", 8, 1, latency, parts)
    views = [render_profile("shallow", profile), render_profile("shallow", NetworkProfile("torch", 1, 4, latency, ()))]
    text = "\n".join(terminal_text(each) for each in views)
    check_golden("profile/profile.txt", f"{text}\n{profile_line(profile)}")


def test_tables(check_golden: CheckGolden) -> None:
    neurons = tuple(
        SizeRow(units, None, ms, ms / 4, 0.011, units == 64) for units, ms in ((0, 1.0), (64, 3.0), (128, 4.0))
    )
    heads = tuple(SizeRow(n, w, ms, ms / 4, 0.2, False) for n, w, ms in ((0, 0, 2.0), (2, 8, 3.0), (4, 8, 4.0)))
    parts = (PartTable("Block", 12, "FFN", 4.0, neurons), PartTable("Block", 1, "attention", 4.0, heads))
    check_golden(
        "profile/tables.txt",
        terminal_text(render_latency_tables("shallow", LatencyTables("ort-cpu", 8, 4, 52.0, 16.0, 1, parts))),
    )


def test_cache(check_golden: CheckGolden) -> None:
    setting = {
        "runtime": "ort-cpu",
        "batch_size": 8,
        "threads": 4,
        "block": {"class": "Block", "inputs": [["batch", 197, 384]]},
        "device": "AMD EPYC 7763 64-Core Processor",
        "versions": {"onnxruntime": "1.32.0"},
    }
    views = [render_cache([], "cache/optin-deploy"), render_cache([setting], "cache/optin-deploy")]
    check_golden("profile/cache.txt", "\n".join(map(terminal_text, views)))
