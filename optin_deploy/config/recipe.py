"""Everything that a run can be told, in one validated value; the command line and YAML files both end here."""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from exporters import Precision, is_quantized
from optin_deploy.config.recipe_yaml import read_options
from optin_deploy.errors import UserError
from optin_deploy.utils.atomic_files import write_text
from profilers import GPU_RUNTIMES, RUNTIMES

Runtime = Literal[
    "ort-cpu",
    "ort-cuda",
    "ort-tensorrt",
    "torch",
    "torch-cuda",
    "torch-graph-cuda",
    "torch-compile",
    "torch-compile-cuda",
    "tensorrt",
    "rtx",
]

Layout = Literal["plain", "triton"]
# What computes in it, of what most users have.
_DEFAULT_RUNTIMES: dict[Precision, tuple[Runtime, ...]] = {
    "fp32": ("ort-cpu", "torch"),
    "tf32": ("ort-cuda", "torch-cuda"),
    "fp16": ("ort-cpu", "torch"),
    "bf16": ("torch",),
    "int8": ("ort-cpu",),
    "fp8": ("tensorrt",),
}
_ENGINE_RUNTIMES = ("tensorrt", "rtx")
_FP8_OPSET = 19
_OF_ENGINES = (
    "static",
    "builder_optimization_level",
    "workspace_mib",
    "refittable",
    "weight_stripped",
    "version_compatible",
    "engine_builds",
)
_OF_REMOVAL = (
    *("criterion", "scorer", "probes", "task_weight", "calibration_labels"),
    *("align", "narrow_heads", "tokens", "tokens_share", "rounds", "batch_size", "table_seconds"),
)
# Far beyond what makes sense: more is a slip, which would be told only by what fails of it, after hours perhaps.
_MOST_PIXELS, _MOST_IN_BATCH, _MOST_UNITS, _MOST_SAMPLES, _MOST_SECONDS = 1 << 14, 1 << 16, 1 << 20, 10_000_000, 1e6
_Units = Annotated[int, Field(ge=1, le=_MOST_UNITS)]
_Columns = Annotated[str | None, Field(max_length=1000)]
_SHOWN = 80


class Recipe(BaseModel):
    """One run of ``prune-export``."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: Annotated[str, Field(min_length=1)]
    weights: str = "pretrained"
    image_size: Annotated[int | None, Field(ge=1, le=_MOST_PIXELS)] = None
    sequence_length: Annotated[int, Field(ge=4, le=_MOST_UNITS)] = 128
    max_text_length: Annotated[int | None, Field(ge=4, le=_MOST_UNITS)] = None

    calibration: Path | None = None
    calibration_column: _Columns = None
    calibration_labels: _Columns = None
    calibration_samples: Annotated[int | None, Field(ge=1, le=_MOST_SAMPLES)] = None

    flops: Annotated[float | None, Field(gt=0, lt=1)] = None
    latency: Annotated[float | None, Field(gt=0, lt=1)] = None
    latency_ms: Annotated[float | None, Field(gt=0, le=1e9)] = None
    runtime: Runtime | None = None
    batch_size: Annotated[int | None, Field(ge=1, le=_MOST_IN_BATCH)] = None
    table_seconds: Annotated[float, Field(gt=0, le=_MOST_SECONDS)] = 60.0
    criterion: Literal["trajectory-obs", "trajectory", "fisher", "magnitude", "random"] = "trajectory-obs"
    scorer: Literal["sketch", "exact", "forward"] = "sketch"
    probes: Annotated[int | None, Field(ge=1, le=_MOST_UNITS)] = None
    task_weight: Annotated[float, Field(ge=0, le=1e6)] | None = None
    align: _Units | Literal["auto"] | None = None
    narrow_heads: bool | None = None
    tokens: Literal["auto", "off"] | Annotated[tuple[_Units, ...], Field(min_length=1)] = "off"
    tokens_share: Annotated[float | None, Field(gt=0, lt=1)] = None
    rounds: Annotated[int, Field(ge=1, le=16)] = 1
    sparsity: Literal["2:4"] | None = None
    compensate: bool = True
    ridge: Annotated[float, Field(gt=0, le=1e9)] | Literal["auto"] = "auto"

    pooling_in_graph: bool = False
    opset: Annotated[int, Field(ge=17, le=23)] = 20
    precision: Precision = "fp32"
    parity_tolerance: Annotated[float, Field(gt=0)] | None = None

    static: bool = False
    builder_optimization_level: Annotated[int, Field(ge=0, le=5)] | None = None
    workspace_mib: Annotated[int, Field(ge=1, le=1 << 30)] | None = None
    refittable: bool = False
    weight_stripped: bool = False
    version_compatible: bool = False
    engine_builds: Annotated[int, Field(ge=1, le=9)] = 3

    runtimes: Annotated[
        tuple[Runtime, ...], Field(min_length=1, default_factory=lambda given: _DEFAULT_RUNTIMES[given["precision"]])
    ]
    batch_sizes: Annotated[tuple[Annotated[int, Field(ge=1, le=_MOST_IN_BATCH)], ...], Field(min_length=1)] = (1, 8)
    threads: Annotated[int | None, Field(ge=1, le=_MOST_UNITS)] = None
    profile_seconds: Annotated[float, Field(gt=0, le=_MOST_SECONDS)] = 10.0

    evaluate: Path | None = None
    evaluate_columns: _Columns = None

    device: Literal["auto", "cpu", "cuda"] = "auto"
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] = 0

    @field_validator("sparsity", mode="before")
    @classmethod
    def _pattern(cls, given: Any) -> Any:
        # What YAML makes of 2:4 without quotes, a number to the base of 60.
        return "2:4" if given == 2 * 60 + 4 else given

    @field_validator("tokens", mode="before")
    @classmethod
    def _counts(cls, given: Any) -> Any:
        if not isinstance(given, str) or given in ("auto", "off"):
            return given
        try:
            return [int(part) for part in given.split(",")]
        except ValueError:
            raise ValueError("give auto, off, or how many enter each block, like 197,197,160") from None

    @property
    def has_budget(self) -> bool:
        """Whether units are removed; without a budget all of them stay."""
        return self.flops is not None or self.has_latency

    @property
    def has_latency(self) -> bool:
        """Whether a budget is a measured latency."""
        return self.latency is not None or self.latency_ms is not None

    @property
    def alignment(self) -> int | None:
        """Neurons are kept in multiples of this; None where a latency table tells which numbers are worth keeping, by
        default under a latency budget."""
        if self.align is None:
            return None if self.has_latency else 64
        return None if self.align == "auto" else self.align

    @property
    def needs_table(self) -> bool:
        """Whether latencies of blocks have to be measured before the search."""
        return self.has_latency or self.alignment is None

    @property
    def target_runtime(self) -> Runtime:
        """Where a latency budget holds: by default the first of the runtimes measured."""
        return self.runtime or self.runtimes[0]

    @property
    def target_batch_size(self) -> int:
        """The batch size that a latency budget holds for: by default the first of those measured."""
        return self.batch_size or self.batch_sizes[0]

    @property
    def headline_batch_size(self) -> int:
        """The batch size that the run is judged at: that of a latency budget, or else the largest."""
        return self.target_batch_size if self.has_latency else max(self.batch_sizes)

    @property
    def measured_runtimes(self) -> tuple[Runtime, ...]:
        """Runtimes of the report: those asked for, and that of the budget."""
        return self.runtimes if self.target_runtime in self.runtimes else (self.target_runtime, *self.runtimes)

    @property
    def measured_batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes of the report: those asked for, and that of the budget."""
        return tuple(dict.fromkeys((*self.batch_sizes, self.target_batch_size)))

    @property
    def narrows_heads(self) -> bool:
        """Whether heads may get narrower: by default where the criterion counts what the others can take over."""
        return self.criterion == "trajectory-obs" if self.narrow_heads is None else self.narrow_heads

    def save(self, path: Path) -> None:
        """Write as YAML, every option included."""
        write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def make_recipe(options: dict[str, Any], file: Path | None = None) -> Recipe:
    """The recipe from ``options`` and, for what they leave out, from a YAML ``file``.

    Raises UserError, one line, for a file that cannot be read, an unknown key (with near ones) or a wrong value; with
    the line of the file that it stands in.
    """
    if file is None:
        return validated(options)
    held = read_options(file)
    return validated({**held.values, **options}, {n: p for n, p in held.places.items() if n not in options})


def validated(options: dict[str, Any], places: Mapping[str, str] = MappingProxyType({})) -> Recipe:
    """The recipe of these options; UserError names the place in a file of an option that is wrong."""
    try:
        return Recipe.model_validate(options)
    except ValidationError as error:
        # An unknown name explains a missing one: it comes first.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        name = str(first["loc"][0])
        place = f"{places[name]}: " if name in places else ""
        raise UserError(place + _message(name, first)) from error


def check_options(recipe: Recipe) -> None:
    """Raise UserError for an option that the others leave without effect, or that does not go with them."""
    if not recipe.has_budget:
        _check_without_budget(recipe)
    probed = recipe.criterion.startswith("trajectory")
    without_effect = (
        ("scorer", recipe.scorer, "sketch", recipe.criterion == "trajectory", "--criterion trajectory"),
        ("probes", recipe.probes, None, probed and recipe.scorer != "exact", "random probes"),
        ("task-weight", recipe.task_weight, None, probed, "--criterion trajectory-obs or trajectory"),
        ("calibration-labels", recipe.calibration_labels, None, recipe.criterion == "fisher", "--criterion fisher"),
        ("ridge", recipe.ridge, "auto", recipe.compensate, "--compensate"),
        ("batch-size", recipe.batch_size, None, recipe.needs_table, "--latency, --latency-ms or --align auto"),
        ("table-seconds", recipe.table_seconds, 60.0, recipe.needs_table, "--latency, --latency-ms or --align auto"),
    )
    check_engine_options(recipe)
    if recipe.weight_stripped:
        raise UserError(
            "--weight-stripped: an engine without weights cannot be measured; run without it, then give it to "
            "`optin-deploy export`"
        )
    check_precision(recipe)
    for name, value, default, used, needed in without_effect:
        if value != default and not used:
            raise UserError(f"--{name} {value}: it has an effect only with {needed}")
    if recipe.latency is not None and recipe.latency_ms is not None:
        raise UserError("--latency and --latency-ms: give one of them")
    _check_tokens(recipe)
    if recipe.rounds > 1 and recipe.has_latency:
        raise UserError(f"--rounds {recipe.rounds}: a latency budget is met in one round; give a FLOP budget instead")
    if recipe.scorer == "forward" and recipe.probes == 1:
        raise UserError("--probes 1: --scorer forward compares draws and needs 2 at least")


def _check_tokens(recipe: Recipe) -> None:
    """Raise UserError for what does not go with merging tokens."""
    if recipe.tokens_share is not None and recipe.tokens != "auto":
        raise UserError(f"--tokens-share {recipe.tokens_share:g}: it has an effect only with --tokens auto")
    if recipe.tokens == "off":
        return
    given = recipe.tokens if isinstance(recipe.tokens, str) else ",".join(map(str, recipe.tokens))
    others = (
        (f"tokens merge in one round, not in --rounds {recipe.rounds}", recipe.rounds > 1),
        (f"--sparsity {recipe.sparsity} follows the dense network token by token", recipe.sparsity is not None),
    )
    of_auto = (
        ("it needs --criterion trajectory-obs; give numbers of tokens", recipe.criterion != "trajectory-obs"),
        ("with --task-weight 0 no output counts; give numbers of tokens", recipe.task_weight == 0),
    )
    for reason, found in (*others, *of_auto) if recipe.tokens == "auto" else others:
        if found:
            raise UserError(f"--tokens {given}: {reason}")


def check_precision(recipe: Recipe) -> None:
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


def _check_without_budget(recipe: Recipe) -> None:
    """Raise UserError where a budget is needed: where there is nothing else to do, and by options of the removal."""
    if recipe.sparsity is None:
        raise UserError("--flops is needed (or --latency, --latency-ms): give the part of the FLOPs to keep, like 0.5")
    for name in _OF_REMOVAL:
        value = getattr(recipe, name)
        if value != Recipe.model_fields[name].default:
            option = f"--{name.replace('_', '-')} {value}"
            raise UserError(f"{option}: it has an effect only with --flops, --latency or --latency-ms")


def check_engine_options(recipe: Recipe) -> None:
    """Raise UserError for an option of engines where no runtime takes any."""
    if any(runtime in _ENGINE_RUNTIMES for runtime in recipe.measured_runtimes):
        return
    for name in _OF_ENGINES:
        value = getattr(recipe, name)
        if value != Recipe.model_fields[name].default:
            told = "" if value is True else f" {value}"
            raise UserError(f"--{name.replace('_', '-')}{told}: it has an effect only with --runtimes rtx or tensorrt")


def check_layout(recipe: Recipe, layout: str, name: str | None) -> Layout:
    """The layout of an export; UserError for one that there is not, or that does not go with the other options."""
    if layout not in get_args(Layout):
        raise UserError(f"--layout {layout}: choose from {', '.join(get_args(Layout))}")
    if layout == "plain" and name is not None:
        raise UserError(f"--name {name}: it has an effect only with --layout triton")
    if name is not None and not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
        raise UserError(f"--name {name}: only letters, digits and _.- make a folder's name, no . or - at its beginning")
    if layout == "triton" and "rtx" in recipe.measured_runtimes:
        raise UserError("--runtimes rtx: Triton runs engines of TensorRT, not of TensorRT for RTX; take tensorrt")
    if layout == "triton" and recipe.weight_stripped:
        raise UserError("--weight-stripped: Triton loads engines with their weights; leave it out")
    if layout == "triton" and recipe.static:
        raise UserError("--static: Triton batches requests, and wants one engine for all batch sizes")
    return cast(Layout, layout)


def _message(name: str, first: Mapping[str, Any]) -> str:
    option = "--" + name.replace("_", "-")
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, Recipe.model_fields, n=1)
        return f"unknown option {name!r}" + (f": did you mean {near[0]!r}?" if near else "")
    if first["type"] == "missing":
        return f"{option} is needed"
    given = _shown(first["input"])
    if first["type"] == "too_short":
        return f"{option}: nothing is listed; give one value at least"
    if name in ("flops", "latency"):
        what = "FLOPs" if name == "flops" else "dense latency"
        return f"{option} {given}: give the part of the {what} to keep, above 0 and below 1, like 0.5"
    reason = first["msg"][0].lower() + first["msg"][1:]
    return f"{option} {given}: {reason}"


def _shown(given: Any) -> str:
    """``given`` as a message says it, without the end of what is long."""
    try:
        text = str(given)
    except ValueError:  # Python writes out no integer of more than 4300 digits
        return "of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
