"""The command line. Exit codes: 0 done, 2 something to fix, 3 a gate failed, 130 interrupted, 1 a bug."""

import logging
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.text import Text

from optin_deploy.errors import GateError, UserError

app = typer.Typer(
    help="Make trained transformers smaller without retraining, export them, and measure how much faster they got.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

_MODEL, _DATA, _PRUNE, _EXPORT, _MEASURE = "Model", "Calibration and evaluation", "Pruning", "Export", "Measuring"


def _option(help_text: str, panel: str) -> Any:
    return typer.Option(help=help_text, rich_help_panel=panel, show_default=False)


@app.command("prune-export")
def prune_export(
    model: Annotated[
        str | None,
        _option(
            "timm name (short forms work: deit_small), transformers id or directory, or a checkpoint of ours", _MODEL
        ),
    ] = None,
    flops: Annotated[float | None, _option("part of the dense FLOPs to keep, like 0.5", _PRUNE)] = None,
    output: Annotated[
        Path | None, typer.Option(help="run directory [runs/MODEL-flopsF-HASH]", show_default=False)
    ] = None,
    recipe: Annotated[
        Path | None, typer.Option(help="YAML file with any of these options; the command line wins", show_default=False)
    ] = None,
    weights: Annotated[str | None, _option("pretrained, random, or a .safetensors file [pretrained]", _MODEL)] = None,
    image_size: Annotated[
        int | None, _option("pixels, where a timm model should take another size than its own", _MODEL)
    ] = None,
    sequence_length: Annotated[
        int | None, _option("tokens at which FLOPs are counted and speed is measured [128]", _MODEL)
    ] = None,
    calibration: Annotated[
        Path | None,
        _option("unlabelled samples: image folder, text file, CSV/TSV, .npz or .safetensors [built-in samples]", _DATA),
    ] = None,
    calibration_column: Annotated[
        str | None, _option("text columns of a CSV/TSV, by name or number, comma-separated", _DATA)
    ] = None,
    calibration_labels: Annotated[
        str | None,
        _option("labels, for --criterion fisher: a column of a CSV/TSV, or `folders` for class folders", _DATA),
    ] = None,
    calibration_samples: Annotated[
        int | None, _option("how many samples to draw [128 images, 1024 texts]", _DATA)
    ] = None,
    evaluate: Annotated[
        Path | None,
        _option("labelled data: folder of class folders, or a CSV/TSV of text,label or first,second,score", _DATA),
    ] = None,
    evaluate_columns: Annotated[str | None, _option("these columns, by name or number, comma-separated", _DATA)] = None,
    criterion: Annotated[
        str | None,
        _option("trajectory-obs, trajectory (OPTIN), fisher, magnitude or random [trajectory-obs]", _PRUNE),
    ] = None,
    scorer: Annotated[
        str | None,
        _option("of trajectory: sketch (neurons by random probes, heads exactly), exact or forward [sketch]", _PRUNE),
    ] = None,
    probes: Annotated[
        int | None, _option("random probes per calibration batch [4 for trajectory, else 1]", _PRUNE)
    ] = None,
    task_weight: Annotated[float | None, _option("weight of the task term beside the trajectory [1]", _PRUNE)] = None,
    align: Annotated[int | None, _option("keep neurons in multiples of this [64]", _PRUNE)] = None,
    narrow_heads: Annotated[
        bool | None,
        typer.Option(
            "--narrow-heads/--no-narrow-heads",
            help="let heads lose width, too [on for trajectory-obs]",
            rich_help_panel=_PRUNE,
            show_default=False,
        ),
    ] = None,
    rounds: Annotated[
        int | None, _option("steps in which the budget is approached, scored anew each [1]", _PRUNE)
    ] = None,
    compensate: Annotated[
        bool | None,
        typer.Option(
            "--compensate/--no-compensate",
            help="refit linear maps in closed form [on]",
            rich_help_panel=_PRUNE,
            show_default=False,
        ),
    ] = None,
    ridge: Annotated[
        str | None, _option("strength of the ridge in that refit; auto chooses it on held-out batches [auto]", _PRUNE)
    ] = None,
    opset: Annotated[int | None, _option("ONNX opset [20]", _EXPORT)] = None,
    parity_tolerance: Annotated[float | None, _option("largest error of ONNX against torch [1e-4]", _EXPORT)] = None,
    runtimes: Annotated[
        str | None, _option("ort-cpu, ort-cuda, torch, torch-cuda, comma-separated [ort-cpu,torch]", _MEASURE)
    ] = None,
    batch_sizes: Annotated[str | None, _option("comma-separated [1,8]", _MEASURE)] = None,
    threads: Annotated[int | None, _option("CPU threads while measuring [all physical cores]", _MEASURE)] = None,
    profile_seconds: Annotated[float | None, _option("time limit per runtime and batch size [10]", _MEASURE)] = None,
    device: Annotated[str | None, _option("where to prune: auto, cpu or cuda [auto]", _PRUNE)] = None,
    seed: Annotated[int | None, _option("one seed makes one result [0]", _PRUNE)] = None,
    json_output: Annotated[bool, typer.Option("--json", help="print report.json instead of tables")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="no progress")] = False,
) -> None:
    """Prune a network to a FLOP budget, export both to ONNX, measure both here, and write a report."""
    options = {name: value for name, value in locals().items() if value is not None}
    for name in ("output", "recipe", "json_output", "quiet"):
        options.pop(name, None)
    for name in ("runtimes", "batch_sizes"):
        if name in options:
            options[name] = [part.strip() for part in options[name].split(",") if part.strip()]

    from optin_deploy.recipe import make_recipe

    # Wrong options are told before torch is loaded, which takes seconds.
    resolved = make_recipe(options, recipe)

    from optin_deploy.pipeline import prune_export as run
    from optin_deploy.report.terminal import summary

    result = run(resolved, output=output, command=_command(), quiet=quiet)
    if json_output:
        sys.stdout.write(result.report.model_dump_json(indent=1) + "\n")
    else:
        # Piped into a file, the tables keep the width they are made for.
        console = Console() if sys.stdout.isatty() else Console(width=100)
        console.print(summary(result.report))
        console.print(
            Text.assemble(
                "Everything is in ", (str(result.directory), "bold"), ": report.html, checkpoint, ONNX files."
            )
        )
    failed = [gate for gate in result.report.gates if not gate.passed]
    if failed:
        raise GateError("; ".join(f"{gate.name}: {gate.detail}" for gate in failed))


@app.command()
def models(
    name: Annotated[str, typer.Argument(help="show timm models whose name contains this")] = "",
    json_output: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """List what can be pruned by name, and by module type."""
    import json

    from optin_deploy.libraries.timm import prunable_names
    from optin_deploy.structure.registry import supported

    names = [n for n in prunable_names() if name in n]
    if json_output:
        sys.stdout.write(json.dumps({"modules": supported(), "timm": names}, indent=1) + "\n")
        return
    console = Console()
    console.print("[bold]Module types[/bold] (in any network, yours too)")
    for line in supported():
        console.print(f"  {line}", highlight=False)
    console.print("[bold]timm[/bold] by name; deit_small stands for deit_small_patch16_224")
    console.print("  " + ", ".join(names), highlight=False)
    console.print("[bold]transformers[/bold] by model id or local directory: encoders built of the module types above")


@app.command()
def env(json_output: Annotated[bool, typer.Option("--json", help="as JSON")] = False) -> None:
    """Show versions and devices, and what is missing."""
    import json

    from profilers import environment

    found = environment()
    if json_output:
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
        return
    console = Console()
    for key, value in found.items():
        if key != "versions":
            console.print(f"{key}: {value}", highlight=False)
    for package, version in found["versions"].items():
        console.print(f"{package}: {version or '[yellow]not installed[/yellow]'}", highlight=False)


def _command() -> str:
    return shlex.join(["optin-deploy", *sys.argv[1:]])


def main() -> None:
    """Entry point: turns the errors that are not bugs into one line and an exit code."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    errors = Console(stderr=True, soft_wrap=True)
    try:
        app(standalone_mode=True)
    except GateError as error:
        _tell(errors, "gate failed:", error)
        sys.exit(3)
    except _user_errors() as error:
        _tell(errors, "error:", error)
        sys.exit(2)
    except (KeyboardInterrupt, SystemExit) as error:
        # typer turns an interrupt into this exit code.
        if isinstance(error, SystemExit) and error.code != 130:
            raise
        errors.print(f"interrupted; finished stages are kept, go on with: {_command()}", highlight=False, markup=False)
        sys.exit(130)


def _tell(console: Console, what: str, error: Exception) -> None:
    """One line. The message is no markup: `[cpu]` names an extra and not a style."""
    console.print(Text.assemble((what, "red"), " ", " ".join(str(error).split())))


def _user_errors() -> tuple[type[Exception], ...]:
    """Exporters and profilers have errors of their own, which they can raise only once they are imported."""
    homes = (("exporters.errors", "ExportError"), ("profilers.errors", "ProfilingError"))
    return (UserError, *(getattr(sys.modules[home], name) for home, name in homes if home in sys.modules))
