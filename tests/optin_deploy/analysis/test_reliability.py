"""Accounts that noise has spoiled say so, and name no causes."""

from __future__ import annotations

import re
from dataclasses import replace

import pytest

from optin_deploy.analysis.bottlenecks import find_bottlenecks, summarize_breakdown
from optin_deploy.analysis.breakdown import LatencyBreakdown, break_down
from optin_deploy.analysis.module_roles import ATTENTION, CONVOLUTION, EMBEDDING, FFN, MERGING, NORMS, ModuleRole
from optin_deploy.analysis.reliability import check_reliability
from profilers.layer_times import LayerProfile, LayerRow

ROLES = {
    "stem": ModuleRole(EMBEDDING),
    "blocks.0": ModuleRole(NORMS, "blocks.0"),
    "blocks.0.attn": ModuleRole(ATTENTION, "blocks.0"),
    "blocks.0.mlp": ModuleRole(FFN, "blocks.0"),
    "blocks": ModuleRole(MERGING),
    "blocks.0.conv": ModuleRole(CONVOLUTION, "blocks.0"),
}
DENSE_FLOPS = {"stem": 10, "blocks.0.attn": 300, "blocks.0.mlp": 690}
PRUNED_FLOPS = {"stem": 10, "blocks.0.attn": 300, "blocks.0.mlp": 190}
DENSE = {("blocks.0.attn", "MatMul"): 40.0, ("blocks.0.mlp", "MatMul"): 50.0, ("blocks.0", "Add"): 10.0}
PRUNED = {("blocks.0.attn", "MatMul"): 40.0, ("blocks.0.mlp", "MatMul"): 20.0, ("blocks.0", "Add"): 10.0}

Times = dict[tuple[str, str], float]


def profile(times: Times, runtime: str = "ort-cpu", total: float | None = None) -> LayerProfile:
    rows = tuple(LayerRow(module, operator, 1, ms) for (module, operator), ms in times.items())
    total_ms = sum(times.values()) if total is None else total
    return LayerProfile(runtime, 8, rows, total_ms, total_ms)


def make_breakdown(
    pruned: Times,
    measured: tuple[float, float] = (100.0, 70.0),
    runtime: str = "ort-cpu",
    totals: tuple[float | None, float | None] = (None, None),
    dense: Times = DENSE,
) -> LatencyBreakdown:
    profiles = [profile(times, runtime, total) for times, total in zip((dense, pruned), totals, strict=True)]
    return break_down(profiles[0], profiles[1], (DENSE_FLOPS, PRUNED_FLOPS), ROLES, measured)


def sentences(found: LatencyBreakdown) -> str:
    return " ".join(
        bottleneck.sentence for bottleneck in find_bottlenecks(found, {"blocks.0.attn": (100,), "blocks.0.mlp": (100,)})
    )


def test_what_was_not_pruned_is_told_as_unchanged_and_never_as_narrower() -> None:
    """Attention has as many FLOPs as before, and by noise takes a little longer."""
    slower = {**PRUNED, ("blocks.0.attn", "MatMul"): 46.0, ("blocks.0.attn", "Softmax"): 3.0}
    found = make_breakdown(slower, (101.0, 79.0), dense={**DENSE, ("blocks.0.attn", "Softmax"): 1.0})
    assert check_reliability(found) is None
    told_of = sentences(found)
    assert re.search(r"Attention .*40\.6 % .*30\.0 % ", told_of)
    assert all(false not in told_of for false in ("attention shrank", "blocks.0.attn", "not fused", "Elementwise"))
    assert "46.0" not in told_of and "49.0" not in told_of


def test_an_engines_part_that_was_not_pruned_has_not_shrunk_less() -> None:
    found = replace(make_breakdown({**PRUNED, ("blocks.0.attn", "MatMul"): 44.0}, (100.0, 74.0)), runtime="rtx")
    assert "layers of attention" not in sentences(found) and "Attention is unchanged" in sentences(found)


@pytest.mark.parametrize("measured", [(64.0, 70.0), (100.0, 32.0), (150.0, 70.0)])
def test_a_profile_far_from_the_measured_time_has_no_causes(measured: tuple[float, float]) -> None:
    found = make_breakdown(PRUNED, measured)
    shares = [f"{10000 / measured[0]:.1f} %", f"{7000 / measured[1]:.1f} %"]
    assert re.findall(r"[\d.]+ %", str(check_reliability(found))) == shares and "too busy" in str(
        check_reliability(found)
    )
    entry = summarize_breakdown(found, {})
    assert entry.causes == () and entry.doubt == check_reliability(found)


def test_short_operators_are_not_blamed_on_the_machine() -> None:
    """Runs without the profiler, in turns with the profiled ones, took as long as those that were measured."""
    dense, pruned = ({key: ms / 1000 for key, ms in times.items()} for times in (DENSE, PRUNED))
    found = check_reliability(make_breakdown(pruned, (0.05, 0.025), totals=(0.051, 0.026), dense=dense))
    assert found is not None and "too short" in found


def test_long_operators_are_not_called_short() -> None:
    found = check_reliability(make_breakdown(PRUNED, (50.0, 60.0), totals=(51.0, 61.0)))
    assert found is not None and "too busy" in found


@pytest.mark.parametrize(("factor", "trusted"), [(0.75, False), (0.85, True), (1.2, True), (1.3, False)])
def test_work_that_is_the_same_shows_the_noise(factor: float, trusted: bool) -> None:
    noisy = {key: ms * (factor if key[0] != "blocks.0.mlp" else 1) for key, ms in PRUNED.items()}
    found = make_breakdown(noisy, (100.0, sum(noisy.values())))
    assert (check_reliability(found) is None) is trusted
    if not trusted:
        assert re.search(rf" 50\.0 ms .* {50 * factor:.1f} ms", str(check_reliability(found)))
        assert find_bottlenecks(found, {}) == ()


def test_only_work_that_is_the_same_is_held_against_it() -> None:
    """Norms after merging have fewer tokens, those of channels fewer channels; fewer calls are other work."""
    norms = {**PRUNED, ("blocks.0", "Add"): 1.0}
    dense = {key: ms for key, ms in DENSE.items() if key[0] != "blocks.0.attn"}
    less = {key: ms for key, ms in norms.items() if key[0] != "blocks.0.attn"}
    assert check_reliability(make_breakdown(less, (60.0, 21.0), dense=dense)) is not None
    for other in ("blocks", "blocks.0.conv"):
        both = {**less, (other, "Gather"): 1.0}
        assert check_reliability(make_breakdown(both, (61.0, 22.0), dense={**dense, (other, "Gather"): 1.0})) is None
    fused = {("blocks.0", "FusedAdd"): 1.0, ("blocks.0.mlp", "MatMul"): 20.0}
    assert check_reliability(make_breakdown(fused, (60.0, 21.0), dense=dense)) is None


def test_a_gpus_profile_may_sum_to_more() -> None:
    assert check_reliability(make_breakdown(PRUNED, (30.0, 20.0), runtime="torch-cuda")) is None
