from pathlib import Path
from typing import Any, get_args

import pytest
from tiny_models import save_lines

from exporters import Precision
from optin_deploy.config.recipe import Recipe, make_recipe
from optin_deploy.config.validation import check_options
from optin_deploy.errors import UserError

NEEDED: dict[str, Any] = {"model": "deit_small", "flops": 0.5}


def message(options: dict[str, Any], file: Path | None = None) -> str:
    with pytest.raises(UserError) as caught:
        make_recipe(options, file)
    text = str(caught.value)
    assert "\n" not in text
    return text


def test_round_trip_through_yaml(tmp_path: Path) -> None:
    given = {
        **NEEDED,
        "calibration": tmp_path / "data.csv",
        "calibration_column": "text",
        "batch_sizes": (1, 4),
        "runtimes": ("torch",),
        "calibration_labels": "class",
        "criterion": "fisher",
        "narrow_heads": True,
        "rounds": 3,
        "compensate": False,
        "parity_tolerance": 1e-5,
    }
    recipe = make_recipe(given)
    recipe.save(tmp_path / "recipe.yaml")
    assert make_recipe({}, tmp_path / "recipe.yaml") == recipe
    assert set(Recipe.model_fields) == {
        line.split(":")[0] for line in (tmp_path / "recipe.yaml").read_text().splitlines() if not line.startswith("-")
    }


def test_command_line_wins_over_file(tmp_path: Path) -> None:
    file = save_lines(tmp_path / "r.yaml", ["model: deit_tiny", "flops: 0.7", "seed: 3"])
    recipe = make_recipe({"flops": 0.4, "batch_sizes": ["1", "2"]}, file)
    assert (recipe.model, recipe.flops, recipe.seed, recipe.batch_sizes) == ("deit_tiny", 0.4, 3, (1, 2))


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"flops": 0}, "--flops 0: "),
        ({"flops": 1}, "--flops 1: "),
        ({"flops": -0.5}, "--flops -0.5"),
        ({"flops": float("nan")}, "--flops nan"),
        ({"flops": "half"}, "--flops half"),
        ({"latency": 1.5}, "--latency 1.5: "),
        ({"latency_ms": 0}, "--latency-ms 0"),
        ({"runtime": "tpu"}, "--runtime tpu"),
        ({"align": "edges"}, "--align edges"),
        ({"model": ""}, "--model"),
        ({"image_size": 0}, "--image-size 0"),
        ({"sequence_length": 3}, "--sequence-length 3"),
        ({"calibration_samples": 0}, "--calibration-samples 0"),
        ({"criterion": "foo"}, "--criterion foo"),
        ({"scorer": "foo"}, "--scorer foo"),
        ({"probes": 0}, "--probes 0"),
        ({"task_weight": -1}, "--task-weight -1"),
        ({"align": 0}, "--align 0"),
        ({"ridge": 0}, "--ridge 0"),
        ({"ridge": float("inf")}, "--ridge inf"),
        ({"ridge": "some"}, "--ridge some"),
        ({"ridge": None}, "--ridge None"),
        ({"rounds": 0}, "--rounds 0"),
        ({"sparsity": "4:8"}, "--sparsity 4:8: "),
        ({"rounds": 17}, "--rounds 17"),
        ({"rounds": 1.5}, "--rounds 1.5"),
        ({"narrow_heads": "some"}, "--narrow-heads some"),
        ({"opset": 16}, "--opset 16"),
        ({"opset": 99}, "--opset 99"),
        ({"parity_tolerance": 0}, "--parity-tolerance 0"),
        ({"runtimes": ["tpu"]}, "--runtimes tpu"),
        ({"runtimes": []}, "--runtimes"),
        ({"batch_sizes": ["0", "a"]}, "--batch-sizes 0"),
        ({"batch_sizes": ["a"]}, "--batch-sizes a"),
        ({"batch_sizes": []}, "--batch-sizes"),
        ({"threads": 0}, "--threads 0"),
        ({"profile_seconds": 0}, "--profile-seconds 0"),
        ({"profile_seconds": float("inf")}, "--profile-seconds inf"),
        ({"device": "tpu"}, "--device tpu"),
        ({"seed": -1}, "--seed -1"),
    ],
)
def test_wrong_values_are_named(options: dict[str, Any], expected: str) -> None:
    assert expected in message({**NEEDED, **options})


@pytest.mark.parametrize(("given", "expected"), [("auto", "auto"), ("0.5", 0.5), (2, 2.0)])
def test_a_ridge_is_a_number_or_auto(tmp_path: Path, given: object, expected: object) -> None:
    recipe = make_recipe({**NEEDED, "ridge": given})
    assert recipe.ridge == expected
    recipe.save(tmp_path / "r.yaml")
    assert make_recipe({}, tmp_path / "r.yaml").ridge == expected


def test_sparsity_is_read_with_and_without_quotes(tmp_path: Path) -> None:
    recipe = make_recipe({"model": "m"}, save_lines(tmp_path / "r.yaml", ["sparsity: 2:4"]))
    assert recipe.sparsity == "2:4"
    recipe.save(tmp_path / "r.yaml")
    assert make_recipe({}, tmp_path / "r.yaml") == recipe


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"criterion": "magnitude"}, "--criterion magnitude"),
        ({"probes": 2}, "--probes 2"),
        ({"task_weight": 2.0}, "--task-weight 2.0"),
        ({"align": "auto"}, "--align auto"),
        ({"narrow_heads": False}, "--narrow-heads False"),
        ({"rounds": 2}, "--rounds 2"),
        ({"batch_size": 4}, "--batch-size 4"),
    ],
)
def test_sparsity_alone_needs_no_budget_and_takes_no_option_of_one(options: dict[str, object], told: str) -> None:
    check_options(make_recipe({"model": "m", "sparsity": "2:4", "compensate": False}))
    check_options(make_recipe({"model": "m", "sparsity": "2:4", "flops": 0.5, "narrow_heads": False}))
    with pytest.raises(UserError, match=f"^{told}: .*only with --flops, --latency or --latency-ms$"):
        check_options(make_recipe({"model": "m", "sparsity": "2:4", **options}))


def test_a_model_is_needed() -> None:
    assert message({"flops": 0.5}).startswith("--model ")


def test_a_budget_is_needed() -> None:
    with pytest.raises(UserError, match=r"^--flops .*--latency, --latency-ms"):
        check_options(make_recipe({"model": "deit_small"}))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["model: deit_tiny", "flop: 0.5"], "'flop'"),
        (["flops: 0.5", "model: a", "zzzz: 1"], "unknown option 'zzzz'"),
        (["flops: 0.5", "model: a", "1: 1"], "unknown option '1'"),
        (["- flops"], "mapping"),
        ([], "mapping"),
        (["flops: [0.5", "model: a"], "cannot be read"),
        (["flops: 0.5", "model: [a, b]"], "--model"),
    ],
)
def test_wrong_files(tmp_path: Path, lines: list[str], expected: str) -> None:
    assert expected in message({}, save_lines(tmp_path / "r.yaml", lines))


def test_unreadable_files(tmp_path: Path) -> None:
    binary = tmp_path / "b.yaml"
    binary.write_bytes(b"\xff\xfe\x00flops")
    for path in (tmp_path / "none.yaml", tmp_path, binary):
        assert "cannot be read" in message(NEEDED, path)


def test_yaml_objects_are_never_built(tmp_path: Path) -> None:
    file = save_lines(tmp_path / "r.yaml", ["model: !!python/object/apply:os.getcwd []", "flops: 0.5"])
    assert "cannot be read" in message({}, file)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"scorer": "exact"}, "--scorer exact: .* only with --criterion trajectory$"),
        ({"probes": 3, "criterion": "magnitude"}, "--probes 3: .* random probes"),
        ({"probes": 3, "criterion": "trajectory", "scorer": "exact"}, "--probes 3"),
        ({"task_weight": 2.0, "criterion": "random"}, "--task-weight 2.0"),
        ({"calibration_labels": "class"}, "--calibration-labels class: .* only with --criterion fisher"),
        ({"ridge": 0.1, "compensate": False}, "--ridge 0.1: .* only with --compensate"),
        ({"criterion": "trajectory", "scorer": "forward", "probes": 1}, "--probes 1.*--scorer forward"),
        ({"static": True}, "--static: .* only with --runtimes rtx or tensorrt"),
        ({"batch_size": 4}, "--batch-size 4: .* only with --latency"),
        ({"table_seconds": 9}, "--table-seconds 9.0: .* only with --latency"),
        ({"latency": 0.5, "latency_ms": 3}, "--latency and --latency-ms: give one"),
        ({"latency": 0.5, "rounds": 2}, "--rounds 2: a latency budget"),
    ],
)
def test_options_without_effect_are_refused(options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_options(make_recipe({"model": "m", "flops": 0.5, **options}))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"criterion": "trajectory", "scorer": "exact"},
        {"probes": 3},
        {"criterion": "fisher", "calibration_labels": "class"},
        {"ridge": 0.1},
        {"compensate": False},
        {"latency": 0.5, "runtime": "torch", "batch_size": 4},
        {"align": "auto", "table_seconds": 9},
        {"flops": None, "latency_ms": 4},
    ],
)
def test_options_with_an_effect_are_taken(options: dict[str, object]) -> None:
    recipe = make_recipe({"model": "m", "flops": 0.5, **options})
    check_options(recipe)
    assert {name: getattr(recipe, name) for name in options} == options


def test_where_a_latency_holds() -> None:
    recipe = make_recipe({"model": "m", "latency": 0.5})
    assert (recipe.target_runtime, recipe.target_batch_size, recipe.headline_batch_size) == ("ort-cpu", 1, 1)
    assert (recipe.measured_runtimes, recipe.measured_batch_sizes) == (recipe.runtimes, recipe.batch_sizes)
    recipe = make_recipe({"model": "m", "latency_ms": 5, "runtime": "torch-compile", "batch_size": 4})
    assert (recipe.target_runtime, recipe.target_batch_size, recipe.headline_batch_size) == ("torch-compile", 4, 4)
    assert recipe.measured_runtimes == ("torch-compile", "ort-cpu", "torch")
    assert recipe.measured_batch_sizes == (1, 8, 4)


@pytest.mark.parametrize(
    ("options", "alignment", "needs_table"),
    [
        ({"flops": 0.5}, 64, False),
        ({"flops": 0.5, "align": "auto"}, None, True),
        ({"flops": 0.5, "align": 16}, 16, False),
        ({"latency": 0.5}, None, True),
        ({"latency": 0.5, "align": 32}, 32, True),
    ],
)
def test_alignment(options: dict[str, Any], alignment: int | None, needs_table: bool) -> None:
    recipe = make_recipe({"model": "m", **options})
    assert (recipe.alignment, recipe.needs_table) == (alignment, needs_table)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "fp8", "runtimes": ("ort-cpu",)}, "--precision fp8: ONNX Runtime has none on a CPU"),
        ({"precision": "bf16", "runtimes": ("ort-cpu",)}, "--precision bf16: ONNX Runtime has none on a CPU"),
        ({"precision": "tf32", "runtimes": ("ort-cpu", "torch")}, "not with --runtimes ort-cpu,torch"),
        ({"precision": "int8", "runtimes": ("ort-cpu", "torch")}, "torch does not run quantized ONNX"),
        ({"precision": "fp8", "opset": 18}, "--opset 18: ONNX has fp8 from opset 19 on"),
        ({"precision": "int8", "runtimes": ("ort-cuda",)}, "CUDA provider has no 8-bit matrix products"),
        ({"precision": "fp8", "runtimes": ("ort-cuda",)}, "CUDA provider has no 8-bit matrix products"),
    ],
)
def test_a_runtime_has_to_know_the_precision(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_options(Recipe(model="m", flops=0.5, **options))


@pytest.mark.parametrize("precision", get_args(Precision))
def test_the_runtimes_taken_by_default_know_it(precision: Precision) -> None:
    recipe = Recipe(model="m", flops=0.5, precision=precision)
    check_options(recipe)
    assert recipe.runtimes


def test_a_wrong_precision_is_told_although_the_runtimes_hang_on_it() -> None:
    with pytest.raises(UserError, match=r"^--precision fp12: .*fp32"):
        make_recipe({"model": "m", "flops": 0.5, "precision": "fp12"})
