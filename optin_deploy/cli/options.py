"""The options that commands share, each written down once."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape

MODEL, PRUNE, DATA, EXPORT, MEASURE = PANELS = (
    "Model",
    "Pruning",
    "Calibration and evaluation",
    "Export",
    "Measuring",
)


def option(help_text: str, panel: str | None = None) -> Any:
    """An option without a default of its own, on one of the `PANELS` or, with None, among the general ones."""
    # Defaults stand in brackets, which are no markup.
    return typer.Option(help=escape(help_text), rich_help_panel=panel, show_default=False)


def _engine_flag(name: str, help_text: str) -> Any:
    return Annotated[bool | None, typer.Option(f"--{name}", help=help_text, rich_help_panel=EXPORT, show_default=False)]


RecipeFile = Annotated[Path | None, option("YAML file with any of these options; the command line wins")]
Quiet = Annotated[bool, typer.Option("--quiet", help="no progress: no bars, nor lines where there is no terminal")]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", help="tell what is found, kept, measured and written, when stages start and end, and all warnings"
    ),
]

# Every option of a run but its budget: name -> type and help. What is not given is left to `Recipe`'s defaults.
RUN_OPTIONS: dict[str, Any] = {
    "model": Annotated[
        str | None,
        option(
            "timm name (short forms work: deit_small), transformers id or directory, or a checkpoint of ours", MODEL
        ),
    ],
    "runtime": Annotated[
        str | None,
        option("runtime that it is for: that of a latency budget; measured, too [the first of --runtimes]", PRUNE),
    ],
    "batch_size": Annotated[
        int | None, option("batch size that the latency is for [the first of --batch-sizes]", PRUNE)
    ],
    "table_seconds": Annotated[
        float | None, option("time limit of measuring one type of block; tables are kept and used again [60]", PRUNE)
    ],
    "weights": Annotated[
        str | None,
        option("pretrained, random, or a .safetensors file, with #PART where it holds several [pretrained]", MODEL),
    ],
    "image_size": Annotated[
        int | None, option("pixels, where a timm model should take another size than its own", MODEL)
    ],
    "sequence_length": Annotated[
        int | None, option("tokens at which FLOPs are counted and speed is measured [128]", MODEL)
    ],
    "max_text_length": Annotated[
        int | None,
        option("tokens that texts for calibration and evaluation are cut to [what the model takes]", DATA),
    ],
    "calibration": Annotated[
        Path | None,
        option("unlabelled samples: image folder, text file, table, .npz or .safetensors [built-in samples]", DATA),
    ],
    "calibration_column": Annotated[
        str | None,
        option("text columns of a table, by name or number, comma-separated; first+second are pairs, one input", DATA),
    ],
    "calibration_labels": Annotated[
        str | None,
        option("labels, for --criterion fisher: a column of a table, or `folders` for class folders", DATA),
    ],
    "calibration_samples": Annotated[int | None, option("how many samples to draw [128 images, 1024 texts]", DATA)],
    "evaluate": Annotated[
        Path | None,
        option("labelled data: folder of class folders, or a table of text,label or first,second,label", DATA),
    ],
    "evaluate_columns": Annotated[str | None, option("these columns, by name or number, comma-separated", DATA)],
    "criterion": Annotated[
        str | None,
        option("trajectory-obs, trajectory (OPTIN), fisher, magnitude or random [trajectory-obs]", PRUNE),
    ],
    "scorer": Annotated[
        str | None,
        option("of trajectory: sketch (neurons by random probes, heads exactly), exact or forward [sketch]", PRUNE),
    ],
    "probes": Annotated[int | None, option("random probes per calibration batch [4 for trajectory, else 1]", PRUNE)],
    "task_weight": Annotated[
        float | None,
        option("weight of the task term beside the trajectory [1; classifiers, convolutions: task only]", PRUNE),
    ],
    "align": Annotated[
        str | None,
        option("keep neurons in multiples of this; auto measures which are worth it [64, auto for a latency]", PRUNE),
    ],
    "narrow_heads": Annotated[
        bool | None,
        typer.Option(
            "--narrow-heads/--no-narrow-heads",
            help="let heads lose width, too [on for trajectory-obs]",
            rich_help_panel=PRUNE,
            show_default=False,
        ),
    ],
    "tokens": Annotated[
        str | None,
        option("merge tokens between blocks; auto, off, or how many enter each block, like 197,197,160,… [off]", PRUNE),
    ],
    "tokens_share": Annotated[
        float | None, option("part of the FLOPs removed that tokens are to remove [what auto finds]", PRUNE)
    ],
    "rounds": Annotated[int | None, option("steps in which the budget is approached, scored anew each [1]", PRUNE)],
    "sparsity": Annotated[
        str | None,
        option("2:4: zero two of every four weights, for sparse tensor cores; also without a budget", PRUNE),
    ],
    "compensate": Annotated[
        bool | None,
        typer.Option(
            "--compensate/--no-compensate",
            help="refit linear maps in closed form [on]",
            rich_help_panel=PRUNE,
            show_default=False,
        ),
    ],
    "ridge": Annotated[
        str | None, option("strength of the ridge in that refit; auto chooses it on held-out batches [auto]", PRUNE)
    ],
    "pooling_in_graph": Annotated[
        bool | None,
        typer.Option(
            "--pooling-in-graph",
            help="export sentence embeddings, pooled as evaluated, in place of token features",
            rich_help_panel=EXPORT,
            show_default=False,
        ),
    ],
    "opset": Annotated[int | None, option("ONNX opset, 17 to 23 [20]", EXPORT)],
    "precision": Annotated[
        str | None, option("of what is exported and measured: fp32, tf32, fp16, bf16, int8 or fp8 [fp32]", EXPORT)
    ],
    "parity_tolerance": Annotated[
        float | None,
        option("largest error of ONNX against torch [1e-4; tf32, fp16: 1e-2, bf16: 5e-2, int8, fp8: 0.15]", EXPORT),
    ],
    "static": _engine_flag("static", "an engine for each batch size, in place of one for all"),
    "builder_optimization_level": Annotated[int | None, option("of engines, 0 to 5 [the builder's own]", EXPORT)],
    "workspace_mib": Annotated[int | None, option("most scratch memory of an engine [the builder's own]", EXPORT)],
    "refittable": _engine_flag("refittable", "engines whose weights can be exchanged"),
    "weight_stripped": _engine_flag("weight-stripped", "engines saved without weights, to be refitted"),
    "version_compatible": _engine_flag("version-compatible", "engines that later versions of TensorRT run, too"),
    "engine_builds": Annotated[
        int | None, option("builds of each engine that are measured, where there is a GPU; one is kept [3]", EXPORT)
    ],
    "runtimes": Annotated[
        str | None,
        option(
            "ort-cpu, torch, torch-compile, ort-cuda, ort-tensorrt, torch-cuda, torch-graph-cuda, torch-compile-cuda, "
            "tensorrt, rtx [ort-cpu,torch, as far as they compute in --precision]",
            MEASURE,
        ),
    ],
    "batch_sizes": Annotated[str | None, option("comma-separated [1,8]", MEASURE)],
    "threads": Annotated[int | None, option("CPU threads while measuring [all physical cores]", MEASURE)],
    "profile_seconds": Annotated[float | None, option("time limit per runtime and batch size [10]", MEASURE)],
    "device": Annotated[str | None, option("where to prune: auto, cpu or cuda [auto]", PRUNE)],
    "seed": Annotated[int | None, option("one seed makes one result [0]", PRUNE)],
}
_LISTS = ("runtimes", "batch_sizes")
EXPORT_OPTIONS = (
    "model",
    "weights",
    "image_size",
    "sequence_length",
    "max_text_length",
    "calibration",
    "calibration_column",
    "pooling_in_graph",
    "opset",
    "precision",
    "parity_tolerance",
    "static",
    "builder_optimization_level",
    "workspace_mib",
    "refittable",
    "weight_stripped",
    "version_compatible",
    "runtimes",
    "batch_sizes",
    "seed",
)
"""Those of a run that an export takes, too."""


def listed(text: str) -> list[str]:
    """The parts of a comma-separated list."""
    return [part.strip() for part in text.split(",") if part.strip()]


def takes_options(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A command with the named `RUN_OPTIONS` beside its own options; those given are its first argument, a mapping."""

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = list(inspect.signature(command).parameters.values())[1:]
        shared = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=RUN_OPTIONS[name])
            for name in names
        ]

        @functools.wraps(command)
        def called(**given: Any) -> None:
            options = {name: given.pop(name) for name in names}
            options = {name: value for name, value in options.items() if value is not None}
            command(options | {name: listed(options[name]) for name in _LISTS if name in options}, **given)

        keywords = [parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own]
        signature = inspect.Signature(sorted([*keywords, *shared], key=_panel))
        called.__signature__ = signature  # type: ignore[attr-defined]
        return called

    return decorate


def _panel(parameter: inspect.Parameter) -> int:
    """Help shows panels in the order in which their first options come."""
    panel = parameter.annotation.__metadata__[0].rich_help_panel
    return PANELS.index(panel) if panel in PANELS else len(PANELS)
