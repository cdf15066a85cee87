"""The account of where the time goes: it hides nothing, and names only causes that are there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from tiny_models import own_network, vision_network

from optin_deploy.analysis.bottlenecks import Bottleneck, find_bottlenecks, lost_ms, summarize_breakdown
from optin_deploy.analysis.breakdown import (
    COMPILED,
    ELEMENTWISE,
    FUSED,
    MATRIX,
    MOVEMENT,
    NORM,
    SOFTMAX,
    LatencyBreakdown,
    break_down,
    kind_of,
)
from optin_deploy.analysis.module_roles import (
    ATTENTION,
    EMBEDDING,
    FFN,
    HEAD,
    LEFT_DENSE,
    MERGING,
    NORMS,
    OTHER,
    ModuleRole,
    module_roles,
    narrow_widths,
    own_flops,
)
from optin_deploy.nn.flops import count_flops
from optin_deploy.structure.describe import describe
from profilers.layer_times import LayerProfile, LayerRow

ROLES = {
    "stem": ModuleRole(EMBEDDING),
    "blocks.0": ModuleRole(NORMS, "blocks.0"),
    "blocks.0.attn": ModuleRole(ATTENTION, "blocks.0"),
    "blocks.0.mlp": ModuleRole(FFN, "blocks.0"),
    "blocks.0.gate": ModuleRole(LEFT_DENSE, "blocks.0"),
    "head": ModuleRole(HEAD),
    "blocks": ModuleRole(MERGING),
}
DENSE_FLOPS = {"": 0, "stem": 10, "blocks.0.attn": 300, "blocks.0.mlp": 690}
HALF_FLOPS = {"": 0, "stem": 10, "blocks.0.attn": 150, "blocks.0.mlp": 340}
DENSE = {("blocks.0.attn", "MatMul"): 30.0, ("blocks.0.mlp", "MatMul"): 60.0}

Times = dict[tuple[str, str], float]


def profile(times: Times, between: float = 0.0, calls: int = 1) -> LayerProfile:
    rows = tuple(LayerRow(module, operator, calls, ms) for (module, operator), ms in times.items())
    total = sum(times.values()) + between
    return LayerProfile("ort-cpu", 8, rows, total, total)


def make_breakdown(
    dense: Times, pruned: Times, between: Sequence[float] = (0.0, 0.0), calls: int = 1
) -> LatencyBreakdown:
    profiles = profile(dense, between[0], calls), profile(pruned, between[1], calls)
    return break_down(*profiles, (DENSE_FLOPS, HALF_FLOPS), ROLES, (profiles[0].total_ms, profiles[1].total_ms))


def with_ideal(extra: Times, extra_pruned: Times) -> LatencyBreakdown:
    """Products that take half as long, and something beside them."""
    ideal = {key: ms * HALF_FLOPS[key[0]] / DENSE_FLOPS[key[0]] for key, ms in DENSE.items()}
    return make_breakdown({**DENSE, **extra}, {**ideal, **extra_pruned})


def only(found: Sequence[Bottleneck]) -> Bottleneck:
    assert len(found) == 1, found
    return found[0]


def test_each_view_sums_to_the_measured_latency() -> None:
    dense = profile({**DENSE, ("blocks.0", "Add"): 4.0, ("nowhere", "Shape"): 1.0}, between=5.0)
    pruned = profile({("blocks.0.mlp", "MatMul"): 30.0, ("blocks.0.mlp", "FusedGemm"): 1.0}, between=2.0)
    found = break_down(dense, pruned, (DENSE_FLOPS, HALF_FLOPS), ROLES, (200.0, 40.0))
    for rows in (found.parts, found.blocks, found.kinds):
        assert sum(row.dense_ms for row in rows) + found.between.dense_ms == pytest.approx(200)
        assert sum(row.pruned_ms for row in rows) + found.between.pruned_ms == pytest.approx(40)
    assert found.between.dense_ms == pytest.approx(10)
    assert found.profiled_ms == pytest.approx((100, 33))
    assert {row.name: row.dense_flops for row in found.parts}[FFN] == 690
    assert {row.name: (row.dense_flops, row.pruned_flops) for row in found.blocks}["blocks.0"] == (990, 490)
    assert [row.name for row in found.blocks] == ["blocks.0", ""]
    assert OTHER in [row.name for row in found.parts]


def test_an_ideal_network_has_no_causes() -> None:
    found = with_ideal({}, {})
    assert lost_ms(found) == pytest.approx(0, abs=0.6)
    assert find_bottlenecks(found, {}) == ()


def test_what_stands_outside_the_blocks_did_not_shrink() -> None:
    bottleneck = only(
        find_bottlenecks(
            with_ideal({("stem", "Conv"): 6.0, ("head", "Gemm"): 3.0}, {("stem", "Conv"): 6.0, ("head", "Gemm"): 3.0}),
            {},
        )
    )
    assert re.search(r"embedding 6\.00, head 3\.00 ms.*9\.00 of 53\.6 ms.*dense 9\.00 ms", bottleneck.sentence)
    assert re.search(r"realised ratio .*1\.00.*0\.92", bottleneck.sentence)
    assert bottleneck.lost_ms == pytest.approx(4.5)


@pytest.mark.parametrize("flops", [70, 100])
def test_what_would_raise_no_ratio_is_told_without_one(flops: int) -> None:
    """What stands outside the blocks has many FLOPs for its time."""
    stem = {("stem", "Conv"): 6.0}
    found = with_ideal(stem, stem)
    bottleneck = only(find_bottlenecks(replace(found, flops={**found.flops, "stem": (flops, flops)}), {}))
    assert "embedding 6.00 ms" in bottleneck.sentence and "6.00 of 50.6 ms" in bottleneck.sentence
    assert "ratio" not in bottleneck.sentence


def test_norms_and_residual() -> None:
    extra = {("blocks.0", "LayerNormalization"): 5.0, ("blocks.0", "Add"): 5.0}
    bottleneck = only(find_bottlenecks(with_ideal(extra, extra), {}))
    assert re.search(r"^Norms .*10\.0 of 54\.6 ms", bottleneck.sentence)


def test_merging_tokens_is_told_by_itself() -> None:
    found = with_ideal({}, {("blocks", "Gather"): 3.0, ("blocks", "MatMul"): 2.0})
    bottleneck = only(find_bottlenecks(found, {}))
    assert re.search(r"^Merging tokens .*5\.00 of 49\.6 ms", bottleneck.sentence)
    assert bottleneck.lost_ms == pytest.approx(5)
    assert [(row.name, row.dense_ms, row.pruned_ms) for row in found.parts if row.name == MERGING] == [(MERGING, 0, 5)]


def test_products_say_their_speeds() -> None:
    slow = {("blocks.0.attn", "MatMul"): 15.0, ("blocks.0.mlp", "MatMul"): 40.0}
    bottleneck = only(find_bottlenecks(make_breakdown(DENSE, slow), {}))
    assert re.search(r"FFN .*0\.67 of .*0\.49 of the FLOPs", bottleneck.sentence)
    # 690 FLOPs of 8 samples in 60 ms, and 340 in 40 ms.
    assert re.search(r"0\.0000680 GFLOP/s.*0\.0000920", bottleneck.sentence)
    assert bottleneck.lost_ms == pytest.approx(40 - 60 * 340 / 690)


def test_widths_off_the_steps_are_named() -> None:
    slow = {("blocks.0.attn", "MatMul"): 15.0, ("blocks.0.mlp", "MatMul"): 40.0}
    bottleneck = only(
        find_bottlenecks(make_breakdown(DENSE, slow), {"blocks.0.mlp": (700,), "blocks.0.attn": (192, 64)})
    )
    assert re.search(r"^Widths .*16 .*\(blocks\.0\.mlp: 700\)", bottleneck.sentence)


def test_unfused_attention_is_told_only_where_it_is_unfused() -> None:
    extra = {("blocks.0.attn", "Softmax"): 8.0, ("blocks.0.attn", "Transpose"): 6.0}
    bottleneck = only(find_bottlenecks(with_ideal(extra, extra), {}))
    assert re.search(r"softmax \(8\.00 ms\).*data movement \(6\.00 ms\)", bottleneck.sentence)
    assert re.search(r"14\.0 of 58\.6 ms.*1\.00 .*0\.50 of the FLOPs", bottleneck.sentence)
    fused = extra | {("blocks.0.attn", "MultiHeadAttention"): 1.0}
    assert not any("not fused" in bottleneck.sentence for bottleneck in find_bottlenecks(with_ideal(fused, fused), {}))


def test_elementwise_operators_are_named_with_their_times() -> None:
    dense = {("blocks.0.mlp", "BiasGelu"): 10.0, ("blocks.0.mlp", "Add"): 2.0}
    pruned = {("blocks.0.mlp", "BiasGelu"): 9.0, ("blocks.0.mlp", "Add"): 1.0}
    bottleneck = only(find_bottlenecks(with_ideal(dense, pruned), {}))
    assert re.search(r"BiasGelu 9\.00 ms, Add 1\.00 ms.*10\.0 of 54\.6 ms.*0\.83", bottleneck.sentence)


def test_modules_left_dense() -> None:
    extra = {("blocks.0.gate", "Add"): 10.0}
    bottleneck = only(find_bottlenecks(with_ideal(extra, extra), {}))
    assert re.search(r"dense .*blocks\.0\.gate.*10\.0 of 54\.6 ms", bottleneck.sentence)


def test_many_small_operators_and_the_time_between_them() -> None:
    small = {("blocks.0.attn", "MatMul"): 1.0, ("blocks.0.mlp", "MatMul"): 1.0}
    bottleneck = only(find_bottlenecks(make_breakdown(small, dict.fromkeys(small, 0.5), (3.0, 3.0), calls=100), {}))
    assert (
        "200 operators of less than 20 µs each, and the time between operators, take 4.00 of 4.00 ms"
        in bottleneck.sentence
    )
    assert bottleneck.lost_ms == pytest.approx(4 - 5 * 0.5)


def test_little_between_operators_is_no_cause() -> None:
    found = make_breakdown(DENSE, {key: ms / 2 for key, ms in DENSE.items()}, (2.0, 2.0))
    assert find_bottlenecks(found, {}) == ()


def test_the_most_costly_comes_first_and_trifles_are_left_out() -> None:
    extra = {("stem", "Conv"): 1.0, ("blocks.0", "Add"): 8.0, ("blocks.0.attn", "Softmax"): 20.0}
    found = find_bottlenecks(with_ideal(extra, extra), {})
    assert ["not fused" in found[0].sentence, "Norms" in found[1].sentence, len(found)] == [True, True, 2]


def test_the_account_fits_the_report() -> None:
    extra = {("stem", "Conv"): 6.0, ("other", "Shape"): 0.1}
    entry = summarize_breakdown(with_ideal(extra, extra), {})
    assert entry.measured.dense_ms == pytest.approx(sum(r.dense_ms for r in entry.parts) + entry.between.dense_ms)
    assert entry.causes and entry.causes[0].lost_ms == pytest.approx(3.05)


@pytest.mark.parametrize(
    ("operator", "kind"),
    [
        ("MatMul", MATRIX),
        ("FusedGemm", MATRIX),
        ("Conv", MATRIX),
        ("linear", MATRIX),
        ("mm", MATRIX),
        ("scaled_dot_product_attention", FUSED),
        ("MultiHeadAttention", FUSED),
        ("LogSoftmax", SOFTMAX),
        ("SkipLayerNormalization", NORM),
        ("native_layer_norm", NORM),
        ("Transpose", MOVEMENT),
        ("ReorderOutput", MOVEMENT),
        ("getitem", MOVEMENT),
        ("BiasGelu", ELEMENTWISE),
        ("Add", ELEMENTWISE),
        ("gelu", ELEMENTWISE),
    ],
)
def test_kinds_of_operators(operator: str, kind: str) -> None:
    assert kind_of(operator, "ort-cpu") == kind


@pytest.mark.parametrize(
    ("layer", "kind"),
    [
        ("gemm", MATRIX),
        ("MatrixMultiply", MATRIX),
        ("CaskConvolution", MATRIX),
        ("SoftMax", SOFTMAX),
        ("Reformat", MOVEMENT),
        ("PointWiseV2", ELEMENTWISE),
        ("kgen", COMPILED),
        ("fusion", COMPILED),
        ("layer", COMPILED),
    ],
)
def test_kinds_of_an_engines_layers(layer: str, kind: str) -> None:
    assert kind_of(layer, "rtx") == kind_of(layer, "tensorrt") == kind


def test_an_engines_layers_are_told_by_part_and_never_by_operator() -> None:
    dense = {("blocks.0.attn", "kgen"): 30.0, ("blocks.0.mlp", "gemm"): 60.0, ("blocks.0", "kgen"): 10.0}
    pruned = {("blocks.0.attn", "kgen"): 15.0, ("blocks.0.mlp", "gemm"): 50.0, ("blocks.0", "kgen"): 10.0}
    profiles = [replace(profile(times), runtime="rtx") for times in (dense, pruned)]
    found = break_down(profiles[0], profiles[1], (DENSE_FLOPS, HALF_FLOPS), ROLES, (100.0, 75.0))
    assert {row.name: row.dense_ms for row in found.kinds} == {MATRIX: 60.0, COMPILED: 40.0}
    layers, norms = (bottleneck.sentence for bottleneck in find_bottlenecks(found, {"blocks.0.mlp": (17,)}))
    assert re.search(r"layers of FFN .*0\.83 .*0\.49 of the FLOPs", layers) and "gemm" not in layers
    assert re.search(r"^Norms .*10\.0 of 75\.0 ms.*10\.0 ms", norms)


def test_places_of_a_vision_transformer() -> None:
    network = vision_network()
    found = module_roles(network.module, describe(network.module, network.inputs))
    assert found["patch_embed"] == ModuleRole(EMBEDDING)
    assert found["blocks.0"] == ModuleRole(NORMS, "blocks.0")
    assert found["blocks.3.attn"] == ModuleRole(ATTENTION, "blocks.3")
    assert found["blocks.3.mlp"] == ModuleRole(FFN, "blocks.3")
    assert found["norm"] == found["head"] == ModuleRole(HEAD)


def test_own_flops_sum_to_all() -> None:
    network = own_network()
    structure = describe(network.module, network.inputs)
    own = own_flops(network.module, network.inputs, module_roles(network.module, structure))
    assert sum(own.values()) == count_flops(network.module, network.inputs)
    assert min(own.values()) >= 0
    # Five tokens of 8 numbers, each to 32.
    assert own["embed"] == 2 * 5 * 8 * 32
    assert own["blocks.0"] == 0 and own["blocks.0.mlp"] == 2 * 5 * 2 * 32 * 128
    assert own_flops(network.module, network.inputs, ["absent"])["absent"] == 0


def test_widths_of_the_products() -> None:
    network = own_network()
    torch.manual_seed(0)
    assert narrow_widths(describe(network.module, network.inputs)) == {"blocks.0.attn": (32, 8), "blocks.0.mlp": (128,)}
