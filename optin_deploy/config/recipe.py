"""The options of a run in one validated value, for the command line, YAML files and Python."""

import difflib
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, cast, get_args

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from exporters import Precision
from optin_deploy.config.options import ALL, RUNS, RUNS_AND_EXPORT, RUNS_AND_PROFILE, Needs, Option, Panel
from optin_deploy.config.recipe_yaml import read_options
from optin_deploy.criteria.registry import CRITERIA, LABEL_CRITERIA, Criterion, list_names
from optin_deploy.errors import UserError
from optin_deploy.utils.atomic_files import write_text
from profilers import SPECS, Runtime

# Sanity limits: larger values are typos that would otherwise fail only after hours.
_MOST_PIXELS, _MOST_IN_BATCH, _MOST_UNITS, _MOST_SAMPLES, _MOST_SECONDS = 1 << 14, 1 << 16, 1 << 20, 10_000_000, 1e6
_Units = Annotated[int, Field(ge=1, le=_MOST_UNITS)]
_BatchSize = Annotated[int, Field(ge=1, le=_MOST_IN_BATCH)]
_MOST_CHARACTERS = 1000
_SHOWN = 80

_model = partial(Option, Panel.MODEL, commands=ALL)
_data = partial(Option, Panel.DATA)
_prune = partial(Option, Panel.PRUNE)
_prune_to_budget = partial(Option, Panel.PRUNE, needs=(Needs.BUDGET,))
_export = partial(Option, Panel.EXPORT, commands=RUNS_AND_EXPORT)
_engine = partial(Option, Panel.EXPORT, commands=RUNS_AND_EXPORT, needs=(Needs.ENGINES,))
_measure = partial(Option, Panel.MEASURE, commands=RUNS_AND_PROFILE)


def default_runtimes(precision: Precision) -> tuple[Runtime, ...]:
    """Return the runtimes measured by default: those that support the precision and that most users have."""
    return tuple(spec.name for spec in SPECS.values() if precision in spec.default_precisions)


class Recipe(BaseModel):
    """The options of one run of ``prune-export``. `Option` says how a field appears on the command line."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    model: str = _model(
        "Network: a timm name (short forms work: deit_small), a transformers id or directory, or a saved checkpoint",
        profile=_model("Network, as in prune-export. Without it, --table lists the cached tables"),
    ).field(min_length=1)
    weights: str = _model("Weights: pretrained, random, or a .safetensors file, with #PART if it holds several").field(
        "pretrained"
    )
    image_size: int | None = _model("Image size in pixels, to change the input size of a timm model").field(
        None, ge=1, le=_MOST_PIXELS
    )
    sequence_length: int = _model("Tokens of a text, for counting FLOPs and measuring latency").field(
        128, ge=4, le=_MOST_UNITS
    )
    max_text_length: int | None = _data(
        "Maximum tokens per text; longer texts are cut", "the most the model takes", RUNS_AND_EXPORT
    ).field(None, ge=4, le=_MOST_UNITS)

    calibration: Path | None = _data(
        "Unlabelled samples: image folder, text file, table, .npz or .safetensors", "built-in samples", RUNS_AND_EXPORT
    ).field(None)
    calibration_column: str | None = _data(
        "Text columns of a table, by name or number, comma-separated; first+second makes one input of a pair",
        commands=RUNS_AND_EXPORT,
    ).field(None, max_length=_MOST_CHARACTERS)
    calibration_labels: str | None = _data(
        f"Labels for --criterion {list_names(LABEL_CRITERIA)}: a column of a table, or `folders` if each is a class",
        needs=(Needs.BUDGET, Needs.LABELS),
    ).field(None, max_length=_MOST_CHARACTERS)
    calibration_samples: int | None = _data("Number of calibration samples to draw", "128 images or 1024 texts").field(
        None, ge=1, le=_MOST_SAMPLES
    )

    flops: float | None = _prune("Fraction of the dense FLOPs to keep, like 0.5", swept=True).field(None, gt=0, lt=1)
    latency: float | None = _prune(
        "Fraction of the measured dense latency to keep, like 0.6; with --flops both budgets hold", swept=True
    ).field(None, gt=0, lt=1)
    latency_ms: float | None = _prune("Latency to reach in milliseconds, like 4.0", swept=True).field(
        None, gt=0, le=1e9
    )
    runtime: Runtime | None = _prune(
        "Runtime the latency budget applies to; it is measured too",
        "first of --runtimes",
        profile=_measure("Runtime to measure", "ort-cpu"),
    ).field(None)
    batch_size: int | None = _prune(
        "Batch size the latency budget applies to",
        "first of --batch-sizes",
        needs=(Needs.BUDGET, Needs.TABLE),
        profile=_measure("Samples in one run", "1"),
    ).field(None, ge=1, le=_MOST_IN_BATCH)
    table_seconds: float = _prune(
        "Time limit for measuring one type of block, in seconds; its latency table is cached",
        needs=(Needs.BUDGET, Needs.TABLE),
        profile=_measure("Time limit for measuring a table that is not cached, in seconds"),
    ).field(60.0, gt=0, le=_MOST_SECONDS)
    criterion: Criterion = _prune_to_budget(
        f"How units are scored: {list_names(tuple(spec.label for spec in CRITERIA.values()))}"
    ).field("trajectory-obs")
    scorer: Literal["sketch", "exact", "forward"] = _prune(
        "How --criterion trajectory is computed: sketch (neurons by random probes, heads exactly), exact or forward",
        needs=(Needs.BUDGET, Needs.OPTIN),
    ).field("sketch")
    probes: int | None = _prune(
        "Random probes per calibration batch", "4 for trajectory, else 1", needs=(Needs.BUDGET, Needs.PROBES)
    ).field(None, ge=1, le=_MOST_UNITS)
    task_weight: Annotated[float, Field(ge=0, le=1e6)] | None = _prune(
        "Weight of the task loss, compared with 1 for the trajectory loss",
        "1; classifiers and convolutions use the task loss only",
        needs=(Needs.BUDGET, Needs.TRAJECTORY),
    ).field(None)
    align: _Units | Literal["auto"] | None = _prune_to_budget(
        "Keep neurons in multiples of this number; auto measures which numbers are worth keeping",
        "64, or auto for a latency budget",
    ).field(None)
    narrow_heads: bool | None = _prune_to_budget("Reduce the width of heads too", "on for trajectory-obs").field(None)
    tokens: Literal["auto", "off"] | Annotated[tuple[_Units, ...], Field(min_length=1)] = _prune_to_budget(
        "Merge tokens between blocks: auto, off, or how many tokens enter each block, like 197,197,160,…"
    ).field("off")
    tokens_share: float | None = _prune(
        "Fraction of the removed FLOPs that merging tokens removes",
        "chosen by --tokens auto",
        needs=(Needs.BUDGET, Needs.TOKENS_AUTO),
    ).field(None, gt=0, lt=1)
    rounds: int = _prune_to_budget("Number of steps in which the budget is approached, with new scores in each").field(
        1, ge=1, le=16
    )
    sparsity: Literal["2:4"] | None = _prune(
        "2:4 zeroes two of every four weights, for sparse tensor cores; it needs no budget"
    ).field(None)
    compensate: bool = _prune("Refit linear layers in closed form").field(True)
    ridge: Annotated[float, Field(gt=0, le=1e9)] | Literal["auto"] = _prune(
        "Ridge strength of the refit; auto chooses it on held-out batches", needs=(Needs.COMPENSATION,)
    ).field("auto")

    pooling_in_graph: bool = _export(
        "Export pooled sentence embeddings, as evaluated, instead of token features"
    ).field(False)
    opset: int = _export("ONNX opset, 17 to 23").field(20, ge=17, le=23)
    precision: Precision = _export(
        f"Precision of the exported and measured networks: {', '.join(get_args(Precision))}"
    ).field("fp32")
    parity_tolerance: float | None = _export(
        "Largest error of ONNX compared with torch",
        "1e-4; 1e-2 for tf32 and fp16, 5e-2 for bf16, 0.15 for int8 and fp8",
    ).field(None, gt=0)

    static: bool = _engine("Build an engine for each batch size instead of one for all").field(False)
    builder_optimization_level: int | None = _engine("Optimization level of engines, 0 to 5", "the builder's").field(
        None, ge=0, le=5
    )
    workspace_mib: int | None = _engine("Maximum scratch memory of an engine, in MiB", "the builder's").field(
        None, ge=1, le=1 << 30
    )
    refittable: bool = _engine("Build engines whose weights can be exchanged").field(False)
    weight_stripped: bool = _engine("Save engines without weights; a refit adds them again").field(False)
    version_compatible: bool = _engine("Build engines that later versions of TensorRT run too").field(False)
    engine_builds: int = _engine("Builds of each engine that are measured on a GPU; one is kept", commands=RUNS).field(
        3, ge=1, le=9
    )

    runtimes: tuple[Runtime, ...] = _measure(
        f"Runtimes to measure, comma-separated: {', '.join(SPECS)}",
        "ort-cpu,torch, as far as they compute in --precision",
        commands=RUNS_AND_EXPORT,
        several=True,
    ).field(default_factory=lambda data: default_runtimes(data.get("precision", "fp32")), min_length=1)
    batch_sizes: tuple[_BatchSize, ...] = _measure(
        "Batch sizes to measure, comma-separated", commands=RUNS_AND_EXPORT, several=True
    ).field((1, 8), min_length=1)
    threads: int | None = _measure("CPU threads while measuring", "all physical cores").field(
        None, ge=1, le=_MOST_UNITS
    )
    profile_seconds: float = _measure("Time limit for one runtime and batch size, in seconds").field(
        10.0, gt=0, le=_MOST_SECONDS
    )

    evaluate: Path | None = _data(
        "Labelled data: a folder of class folders, or a table of text,label or first,second,label"
    ).field(None)
    evaluate_columns: str | None = _data("Columns of the labelled data, by name or number, comma-separated").field(
        None, max_length=_MOST_CHARACTERS
    )

    device: Literal["auto", "cpu", "cuda"] = _prune("Device on which to prune: auto, cpu or cuda").field("auto")
    seed: int = _prune("Random seed; the same seed gives the same result", commands=RUNS_AND_EXPORT).field(
        0, ge=0, lt=1 << 64
    )

    @field_validator("sparsity", mode="before")
    @classmethod
    def _read_sparsity(cls, value: object) -> object:
        # YAML reads 2:4 without quotes as a number to the base of 60.
        return "2:4" if value == 2 * 60 + 4 else value

    @field_validator("tokens", mode="before")
    @classmethod
    def _read_tokens(cls, value: object) -> object:
        if not isinstance(value, str) or value in ("auto", "off"):
            return value
        try:
            return [int(count) for count in value.split(",")]
        except ValueError:
            raise ValueError("give auto, off, or how many enter each block, like 197,197,160") from None

    @property
    def has_budget(self) -> bool:
        """Whether units are removed."""
        return self.flops is not None or self.has_latency

    @property
    def has_latency(self) -> bool:
        """Whether there is a budget of measured latency."""
        return self.latency is not None or self.latency_ms is not None

    @property
    def alignment(self) -> int | None:
        """Number in multiples of which neurons are kept; None if a latency table decides.

        By default a latency table decides under a latency budget.
        """
        if self.align is None:
            return None if self.has_latency else 64
        return None if self.align == "auto" else self.align

    @property
    def needs_table(self) -> bool:
        """Whether the latency of blocks must be measured before the search."""
        return self.has_latency or self.alignment is None

    @property
    def target_runtime(self) -> Runtime:
        """Runtime of a latency budget, by default the first measured one."""
        return self.runtime or self.runtimes[0]

    @property
    def target_batch_size(self) -> int:
        """Batch size of a latency budget, by default the first measured one."""
        return self.batch_size or self.batch_sizes[0]

    @property
    def headline_batch_size(self) -> int:
        """Batch size of the headline figures: that of a latency budget, or else the largest."""
        return self.target_batch_size if self.has_latency else max(self.batch_sizes)

    @property
    def measured_runtimes(self) -> tuple[Runtime, ...]:
        """Runtimes in the report: those asked for and that of the budget."""
        return self.runtimes if self.target_runtime in self.runtimes else (self.target_runtime, *self.runtimes)

    @property
    def measured_batch_sizes(self) -> tuple[int, ...]:
        """Batch sizes in the report: those asked for and that of the budget."""
        return tuple(dict.fromkeys((*self.batch_sizes, self.target_batch_size)))

    @property
    def narrows_heads(self) -> bool:
        """Whether the width of heads may be reduced; by default if the criterion accounts for compensation."""
        return CRITERIA[self.criterion].after_compensation if self.narrow_heads is None else self.narrow_heads

    def save(self, path: Path) -> None:
        """Write all options as YAML."""
        write_text(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False))


def make_recipe(options: Mapping[str, object], file: Path | None = None) -> Recipe:
    """Return the recipe of ``options`` and, for those left out, of a YAML ``file``.

        recipe = make_recipe({"model": "deit_small", "flops": 0.5})

    Raises:
        UserError: the file cannot be read, an option is unknown (the message names a similar one), or a value is wrong.
            The message names the line of the file that holds the option.
    """
    if file is None:
        return validate(options)
    from_file = read_options(file)
    lines = {name: line for name, line in from_file.lines.items() if name not in options}
    return validate({**from_file.values, **options}, lines)


def validate(options: Mapping[str, object], lines: Mapping[str, str] = MappingProxyType({})) -> Recipe:
    """Return the recipe of ``options``.

    Args:
        options: values by name.
        lines: the line of a file that holds an option, like "r.yaml, line 3", by name.

    Raises:
        UserError: an option is unknown or wrong.
    """
    try:
        return Recipe.model_validate(options)
    except ValidationError as error:
        # An unknown name explains a missing one, so it comes first.
        first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
        name = str(first["loc"][0])
        line = f"{lines[name]}: " if name in lines else ""
        raise UserError(line + _message(name, first)) from error


def recipe_options() -> dict[str, Option]:
    """Return the `Option` of every field of `Recipe`."""
    return {name: cast(Option, field.json_schema_extra) for name, field in Recipe.model_fields.items()}


def flag(name: str) -> str:
    """Return the name of an option on the command line: "--batch-size" for "batch_size"."""
    return f"--{name.replace('_', '-')}"


def _message(name: str, first: Mapping[str, Any]) -> str:
    option = flag(name)
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(name, Recipe.model_fields, n=1)
        return f"unknown option {name!r}" + (f": did you mean {near[0]!r}?" if near else "")
    if first["type"] == "missing":
        return f"{option} is needed"
    value = _shorten(first["input"])
    if first["type"] == "too_short":
        return f"{option}: nothing is listed; give one value at least"
    if name in ("flops", "latency"):
        what = "FLOPs" if name == "flops" else "dense latency"
        return f"{option} {value}: give the fraction of the {what} to keep, above 0 and below 1, like 0.5"
    reason = first["msg"][0].lower() + first["msg"][1:]
    return f"{option} {value}: {reason}"


def _shorten(value: object) -> str:
    """Return ``value`` as text, with the end of a long text cut off."""
    try:
        text = str(value)
    except ValueError:  # Python writes out no integer of more than 4300 digits
        return "of thousands of digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
