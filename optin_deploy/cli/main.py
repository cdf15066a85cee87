"""The command line."""

import json
import logging
import os
import shlex
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlparse

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from optin_deploy.cli.exit_codes import exit_code
from optin_deploy.cli.options import (
    EXPORT,
    EXPORT_OPTIONS,
    MEASURE,
    MODEL,
    PRUNE,
    RUN_OPTIONS,
    Quiet,
    RecipeFile,
    Verbose,
    listed,
    option,
    takes_options,
)
from optin_deploy.cli.streams import flush_stdout, prepare_streams, write_json
from optin_deploy.distributed.torchrun import quiet_unless_main, refuse_several
from optin_deploy.errors import GateError, UserError
from optin_deploy.utils.paths import check_new, check_place, check_there
from optin_deploy.utils.signals import Interruptible

if TYPE_CHECKING:
    from optin_deploy.config.recipe import Recipe

app = typer.Typer(
    help="Make trained transformers smaller without retraining, export them, and measure how much faster they got.",
    cls=Interruptible,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.command("prune-export")
@takes_options(*RUN_OPTIONS)
def prune_export(
    options: dict[str, Any],
    flops: Annotated[float | None, option("part of the dense FLOPs to keep, like 0.5", PRUNE)] = None,
    latency: Annotated[
        float | None,
        option("part of the dense latency to keep, as measured, like 0.6; with --flops both hold", PRUNE),
    ] = None,
    latency_ms: Annotated[float | None, option("the same in milliseconds, like 4.0", PRUNE)] = None,
    output: Annotated[Path | None, option("run directory [runs/MODEL-flopsF-HASH]")] = None,
    recipe: RecipeFile = None,
    json_output: Annotated[bool, typer.Option("--json", help="print report.json instead of tables")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Prune a network to a budget of FLOPs or latency, export to ONNX, measure both here, and write a report."""
    _check_not_both(quiet, verbose)
    from optin_deploy.config.recipe import make_recipe

    # Wrong options are told before torch is loaded, which takes seconds.
    resolved = make_recipe(options | _given(flops=flops, latency=latency, latency_ms=latency_ms), recipe)
    _check_paths(resolved, output)

    from optin_deploy.report.terminal import summary
    from optin_deploy.run.pipeline import prune_export_together

    with _progress(quiet, verbose) as progress:
        result = prune_export_together(resolved, output=output, command=_command(), **progress)
    if result is None:
        return
    _show(result.report, summary, result.directory, "report.html, report.md, checkpoint, ONNX files", json_output)
    failed = [gate for gate in result.report.gates if not gate.passed]
    if failed:
        raise GateError("; ".join(f"{gate.name}: {gate.detail}" for gate in failed))
    unmeasured = [f"--runtimes {item.runtime}: {item.reason}" for item in result.report.unmeasured]
    if unmeasured:
        raise UserError(f"{'; '.join(unmeasured)}; its engines are in {result.directory}, and all else is done")


@app.command()
@takes_options(*RUN_OPTIONS)
def sweep(
    options: dict[str, Any],
    flops: Annotated[
        str | None, option("parts of the dense FLOPs to keep, comma-separated, like 0.8,0.6; a run each", PRUNE)
    ] = None,
    latency: Annotated[
        str | None, option("parts of the dense latency to keep, as measured, like 0.8,0.6; a run each", PRUNE)
    ] = None,
    latency_ms: Annotated[str | None, option("the same in milliseconds, like 4.0,3.0", PRUNE)] = None,
    output: Annotated[Path | None, option("sweep directory, with a run directory each [runs/MODEL-sweep-HASH]")] = None,
    recipe: RecipeFile = None,
    json_output: Annotated[bool, typer.Option("--json", help="print sweep.json instead of tables")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run prune-export at several budgets, scored once, and show which of the networks none of the others beats."""
    _check_not_both(quiet, verbose)
    from optin_deploy.config.sweep_plan import plan, read_sweep

    refuse_several("sweep")
    budgets = {name: listed(text) for name, text in _given(flops=flops, latency=latency, latency_ms=latency_ms).items()}
    resolved, asked = read_sweep(options | budgets, recipe)
    # Wrong options are told before torch is loaded, which takes seconds.
    plan(resolved, asked)
    _check_paths(resolved, output)

    from optin_deploy.sweeps.run import sweep as run
    from optin_deploy.sweeps.terminal import summary

    with _progress(quiet, verbose) as progress:
        result = run(resolved, asked, output=output, command=_command(), **progress)
    _show(result.report, summary, result.directory, "sweep.html, sweep.json, a run directory per budget", json_output)
    failed = [(run.name, gate) for run in result.report.runs for gate in run.gates if not gate.passed]
    if failed:
        raise GateError("; ".join(f"{name}, {gate.name}: {gate.detail}" for name, gate in failed))


def _check_not_both(quiet: bool, verbose: bool) -> None:
    if quiet and verbose:
        raise UserError("--quiet and --verbose: give one of them")


def _check_paths(recipe: "Recipe", output: Path | None) -> None:
    """Raise UserError for data that are not there, and for a directory that cannot be made."""
    check_there(recipe.calibration, "calibration data")
    check_there(recipe.evaluate, "evaluation data")
    if output is not None:
        check_place(output, f"--output {output}")


@contextmanager
def _progress(quiet: bool, verbose: bool) -> Iterator[dict[str, Any]]:
    """Where progress goes, and whether there is any, as arguments of a run; with ``verbose``, log records go there too.

    These tell of every stage, so that off a terminal they take the place of its other lines.
    """
    console = Console(stderr=True)
    if not verbose:
        yield {"console": console, "quiet": quiet}
        return
    from optin_deploy.cli.log_output import logs_shown

    with logs_shown(console):
        yield {"console": console, "quiet": not console.is_terminal}


def _given(**options: Any) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def _show(report: Any, summary: Callable[[Any], RenderableType], directory: Path, files: str, as_json: bool) -> None:
    if as_json:
        write_json(report.model_dump_json(indent=1))
        return
    # Piped into a file, the tables keep the width they are made for.
    console = Console() if sys.stdout.isatty() else Console(width=100)
    console.print(summary(report))
    console.print(Text.assemble("Everything is in ", (str(directory), "bold"), f": {files}."))


@app.command()
@takes_options(*EXPORT_OPTIONS)
def export(
    options: dict[str, Any],
    layout: Annotated[str, option("plain files, or triton: a model repository [plain]", EXPORT)] = "plain",
    name: Annotated[str | None, option("of the models in a repository [the model's]", EXPORT)] = None,
    output: Annotated[Path | None, option("new folder, or the repository [exports/MODEL]")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Export one network as it is: ONNX checked against torch, and an engine for each of --runtimes that takes one."""
    refuse_several("export")
    _check_not_both(quiet, verbose)
    from optin_deploy.config.recipe import check_layout, make_recipe

    # Wrong options are told before torch is loaded, which takes seconds.
    resolved = make_recipe(options)
    kind = check_layout(resolved, layout, name)
    _check_paths(resolved, None)
    if output is not None:
        (check_new if kind == "plain" else check_place)(output)

    from optin_deploy.export.command import default_name, export_network
    from optin_deploy.report.terminal import exported_view

    place = output or Path("exports") / default_name(resolved.model)
    with _progress(quiet, verbose) as progress:
        made = export_network(resolved, place, kind, name, **progress)
    if json_output:
        sys.stdout.write(json.dumps(made.to_dict(), indent=1) + "\n")
    else:
        (Console() if sys.stdout.isatty() else Console(width=100)).print(exported_view(made))


@app.command()
def profile(
    model: Annotated[str | None, option("as for prune-export; without it --table lists the tables kept", MODEL)] = None,
    weights: Annotated[
        str | None,
        option("pretrained, random, or a .safetensors file, with #PART where it holds several [pretrained]", MODEL),
    ] = None,
    image_size: Annotated[int | None, option("pixels, for a timm model", MODEL)] = None,
    sequence_length: Annotated[int | None, option("tokens of the sample [128]", MODEL)] = None,
    runtime: Annotated[str | None, option("what runs it [ort-cpu]", MEASURE)] = None,
    batch_size: Annotated[int | None, option("samples in one run [1]", MEASURE)] = None,
    threads: Annotated[int | None, option("CPU threads [all physical cores]", MEASURE)] = None,
    profile_seconds: Annotated[float | None, option("time limit of the measurement [10]", MEASURE)] = None,
    table: Annotated[
        bool,
        typer.Option("--table", help="what the sizes of its blocks cost instead", rich_help_panel=MEASURE),
    ] = False,
    table_seconds: Annotated[float | None, option("time limit of one table, if it is not kept [60]", MEASURE)] = None,
    json_output: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure one network as it is: latency, and where the time goes; or, with --table, its latency tables."""
    refuse_several("profile")
    _check_not_both(quiet, verbose)
    given = _given(
        model=model,
        weights=weights,
        image_size=image_size,
        sequence_length=sequence_length,
        runtime=runtime,
        batch_size=batch_size,
        threads=threads,
        profile_seconds=profile_seconds,
        table_seconds=table_seconds,
    )
    if model is None and not table:
        raise UserError("--model is needed: the network to profile (or --table alone, to list the tables kept)")
    if model is None and len(given) > 0:
        raise UserError(f"--{next(iter(given)).replace('_', '-')} needs --model: --table alone lists the tables kept")
    if table_seconds is not None and not table:
        raise UserError(f"--table-seconds {table_seconds:g}: it has an effect only with --table")
    if profile_seconds is not None and table:
        raise UserError(f"--profile-seconds {profile_seconds:g}: it has an effect only without --table")

    with _progress(quiet, verbose) as progress:
        shown, data = _profiled(given, progress) if not table else _tables(given, progress)
    if json_output:
        sys.stdout.write(json.dumps(data, indent=1) + "\n")
    else:
        (Console() if sys.stdout.isatty() else Console(width=100)).print(shown)


def _profiled(given: dict[str, Any], progress: dict[str, Any]) -> tuple[RenderableType, Any]:
    from optin_deploy.config.recipe import make_recipe

    # Wrong options are told before torch is loaded, which takes seconds.
    recipe = make_recipe(given)

    from optin_deploy.report.profile_view import profile_view
    from optin_deploy.run.network_profile import run_profile

    found = run_profile(recipe, **progress)
    return profile_view(recipe.model, found), found.to_dict()


def _tables(given: dict[str, Any], progress: dict[str, Any]) -> tuple[RenderableType, Any]:
    from optin_deploy.config.recipe import make_recipe

    recipe = make_recipe(given) if given else None

    from optin_deploy.report.profile_view import cache_view, table_view
    from optin_deploy.run.network_profile import run_tables
    from profilers.latency_table import cache_folder, cached_settings

    if recipe is None:
        settings = cached_settings()
        return cache_view(settings, str(cache_folder())), settings
    found = run_tables(recipe, **progress)
    return table_view(recipe.model, found), found.to_dict()


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="run directories, or report.json files", show_default=False)],
    markdown: Annotated[bool, typer.Option("--markdown", help="as Markdown, for a pull request")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """Show the report of a run, or compare those of several."""
    if markdown and json_output:
        raise UserError("--markdown and --json: give one of them")

    from optin_deploy.report import read_report

    reports = {str(run): read_report(run) for run in runs}
    if json_output or markdown:
        (write_json if json_output else sys.stdout.write)(_report_text(reports, as_json=json_output))
        return

    from optin_deploy.report import comparison
    from optin_deploy.report.terminal import summary

    shown = comparison.view(comparison.lines(reports)) if len(runs) > 1 else summary(*reports.values())
    (Console() if sys.stdout.isatty() else Console(width=160)).print(shown)


def _report_text(reports: Mapping[str, Any], *, as_json: bool) -> str:
    from optin_deploy.report import comparison, markdown

    if len(reports) == 1:
        (only,) = reports.values()
        return str(only.model_dump_json(indent=1) if as_json else markdown.render(only))
    compared = comparison.lines(reports)
    if as_json:
        return json.dumps([asdict(line) for line in compared], indent=1)
    return comparison.as_markdown(compared)


@app.command()
def models(
    name: Annotated[str, typer.Argument(help="show timm models whose name contains this")] = "",
    json_output: Annotated[bool, typer.Option("--json", help="as JSON")] = False,
) -> None:
    """List what can be pruned by name, and by module type."""
    from optin_deploy.models.timm_models import prunable_names
    from optin_deploy.structure.describe import prunable

    names = [n for n in prunable_names() if name in n]
    if json_output:
        sys.stdout.write(json.dumps({"modules": prunable(), "timm": names}, indent=1) + "\n")
        return
    console = Console()
    console.print("[bold]Module types[/bold] (in any network, yours too)")
    for line in prunable():
        console.print(f"  {line}", highlight=False)
    console.print("[bold]timm[/bold] by name; deit_small stands for deit_small_patch16_224")
    console.print("  " + ", ".join(names), highlight=False)
    console.print("[bold]transformers[/bold] by model id or local directory: networks built of the module types above")


@app.command()
def env(json_output: Annotated[bool, typer.Option("--json", help="as JSON")] = False) -> None:
    """Show versions and devices, and what is missing."""
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
    """Entry point."""
    # Read when huggingface_hub is imported, which no command has done yet; workers inherit it.
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    prepare_streams()
    sys.exit(exit_code(_run, _command()))


def _run() -> int:
    """The command, and the exit code of what the parser does by itself, like telling its help."""
    _check_arguments()
    _check_endpoint()
    try:
        with quiet_unless_main():
            return app(standalone_mode=False) or 0
    finally:
        flush_stdout()


def _check_arguments() -> None:
    """Raise UserError for an argument that is not UTF-8, as a file's name may be: no report could name it."""
    for argument in sys.argv[1:]:
        if argument.encode("utf-8", "surrogateescape") != argument.encode("utf-8", "replace"):
            raise UserError(f"{os.fsencode(argument)!r} is not UTF-8: rename the file")


def _check_endpoint() -> None:
    """Raise UserError for a hub whose address is none: its client fails of it when it is imported."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    try:
        _ = urlparse(endpoint).port
    except ValueError as error:
        raise UserError(f"HF_ENDPOINT {endpoint} is no address: {error}; mend or unset it") from error
