"""Checks of options that depend on each other."""

import re
from collections.abc import Mapping
from typing import Literal, cast, get_args

from exporters import is_quantized
from optin_deploy.config.options import RUNS, Command
from optin_deploy.config.recipe import Recipe, flag, recipe_options
from optin_deploy.criteria.registry import COMPENSATED_CRITERIA, list_names
from optin_deploy.errors import UserError
from profilers import GPU_RUNTIMES, RUNTIMES

Layout = Literal["plain", "triton"]
_FP8_OPSET = 19


def check_options(recipe: Recipe) -> None:
    """Raise UserError for options of a run that contradict each other or have no effect."""
    if not recipe.has_budget and recipe.sparsity is None:
        raise UserError("--flops is needed (or --latency, --latency-ms): give the fraction of FLOPs to keep, like 0.5")
    check_effects(recipe, RUNS[0])
    if recipe.weight_stripped:
        raise UserError(
            "--weight-stripped: an engine without weights cannot be measured; run without it, then give it to "
            "`optin-deploy export`"
        )
    _check_precision(recipe)
    if recipe.latency is not None and recipe.latency_ms is not None:
        raise UserError("--latency and --latency-ms: give one of them")
    if recipe.tokens != "off":
        _check_tokens(recipe)
    if recipe.rounds > 1 and recipe.has_latency:
        raise UserError(f"--rounds {recipe.rounds}: a latency budget is met in one round; give a FLOP budget instead")
    if recipe.scorer == "forward" and recipe.probes == 1:
        raise UserError("--probes 1: --scorer forward compares draws and needs 2 at least")


def check_effects(recipe: Recipe, command: Command) -> None:
    """Raise UserError for an option of the command that has no effect with the other options."""
    for name, option in recipe_options().items():
        value = getattr(recipe, name)
        if value == Recipe.model_fields[name].default or option.of(command) is None:
            continue
        for condition in option.needs:
            if not condition.holds(recipe):
                raise UserError(f"{_with_value(name, value)}: it has an effect only with {condition.words}")


def check_layout(recipe: Recipe, layout: str, name: str | None) -> Layout:
    """Return the layout of an export; raise UserError if it is unknown or contradicts other options."""
    if layout not in get_args(Layout):
        raise UserError(f"--layout {layout}: choose from {', '.join(get_args(Layout))}")
    if layout == "plain" and name is not None:
        raise UserError(f"--name {name}: it has an effect only with --layout triton")
    if name is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UserError(f"--name {name}: only letters, digits and _.- are allowed, no . or - at the beginning")
    if layout == "triton" and "rtx" in recipe.measured_runtimes:
        raise UserError("--runtimes rtx: Triton runs engines of TensorRT, not of TensorRT for RTX; take tensorrt")
    if layout == "triton" and recipe.weight_stripped:
        raise UserError("--weight-stripped: Triton loads engines with their weights; leave it out")
    if layout == "triton" and recipe.static:
        raise UserError("--static: Triton batches requests and needs one engine for all batch sizes; leave it out")
    return cast(Layout, layout)


def check_profile(options: Mapping[str, object], *, table: bool) -> None:
    """Raise UserError for options of ``profile`` that contradict each other.

    Args:
        options: fields of `Recipe` that the user gave.
        table: whether the user asked for latency tables.
    """
    if "model" not in options:
        if not table:
            raise UserError("--model is needed: the network to profile (or --table alone, to list the tables kept)")
        if options:
            raise UserError(f"{flag(next(iter(options)))} needs --model: --table alone lists the tables kept")
    without_effect, needed = ("profile_seconds", "without") if table else ("table_seconds", "with")
    if without_effect in options:
        seconds = f"{options[without_effect]:g}"
        raise UserError(f"{flag(without_effect)} {seconds}: it has an effect only {needed} --table")


def _check_tokens(recipe: Recipe) -> None:
    """Raise UserError for options that contradict merging tokens."""
    conflicts = {
        f"tokens merge in one round, not in --rounds {recipe.rounds}": recipe.rounds > 1,
        f"--sparsity {recipe.sparsity} follows the dense network token by token": recipe.sparsity is not None,
    }
    if recipe.tokens == "auto":
        conflicts |= {
            f"it needs --criterion {list_names(COMPENSATED_CRITERIA)}; give numbers of tokens": (
                recipe.criterion not in COMPENSATED_CRITERIA
            ),
            "with --task-weight 0 no output counts; give numbers of tokens": recipe.task_weight == 0,
        }
    for reason, is_conflict in conflicts.items():
        if is_conflict:
            raise UserError(f"{_with_value('tokens', recipe.tokens)}: {reason}")


def _check_precision(recipe: Recipe) -> None:
    """Raise UserError for a runtime that cannot compute in the precision asked for."""
    precision, runtimes = recipe.precision, recipe.measured_runtimes
    if precision in ("bf16", "fp8") and "ort-cpu" in runtimes:
        raise UserError(f"--precision {precision}: ONNX Runtime has none on a CPU; take other --runtimes, or fp16")
    if precision == "tf32" and not set(runtimes) & set(GPU_RUNTIMES):
        raise UserError(f"--precision tf32: it has an effect only on a GPU, not with --runtimes {','.join(runtimes)}")
    if precision == "fp8" and recipe.opset < _FP8_OPSET:
        raise UserError(f"--opset {recipe.opset}: ONNX has fp8 from opset {_FP8_OPSET} on")
    if is_quantized(precision) and "ort-cuda" in runtimes:
        raise UserError(
            f"--precision {precision}: ONNX Runtime's CUDA provider has no 8-bit matrix products; take "
            "--runtimes tensorrt or ort-tensorrt, or --precision fp16"
        )
    programs = [runtime for runtime in runtimes if RUNTIMES[runtime] == "program"]
    if is_quantized(precision) and programs:
        raise UserError(f"--precision {precision}: {programs[0]} does not run quantized ONNX; take other --runtimes")


def _with_value(name: str, value: object) -> str:
    """Return an option as on the command line, with its value unless it is a flag."""
    if value is True:
        return flag(name)
    return f"{flag(name)} {','.join(map(str, value)) if isinstance(value, tuple) else value}"
