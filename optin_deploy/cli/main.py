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
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, TypeVar
from urllib.parse import urlparse

import typer
from rich.console import Console, RenderableType
from rich.text import Text

from optin_deploy.cli.exit_codes import exit_code
from optin_deploy.cli.options import Quiet, RecipeFile, Verbose, takes_recipe
from optin_deploy.cli.streams import flush_stdout, prepare_streams, write_json
from optin_deploy.config.options import Panel
from optin_deploy.config.recipe import Recipe, make_recipe
from optin_deploy.config.sweep_plan import plan, read_sweep
from optin_deploy.config.validation import check_layout, check_profile
from optin_deploy.distributed.torchrun import quiet_unless_main, refuse_several
from optin_deploy.errors import GateError, UserError
from optin_deploy.utils.paths import check_exists, check_new, check_writable
from optin_deploy.utils.signals import Interruptible

if TYPE_CHECKING:
    from pydantic import BaseModel

    from optin_deploy.report import Report

Options = dict[str, object]
R = TypeVar("R", bound="BaseModel")

# Commands check their options before they import torch, which takes seconds.
app = typer.Typer(
    help="Make trained transformers smaller without retraining, export them, and measure how much faster they got.",
    cls=Interruptible,
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def _print_version(asked: bool) -> None:
    if asked:
        print(metadata.version("optin-deploy"))
        raise typer.Exit


@app.callback()
def show_version(
    asked: Annotated[
        bool, typer.Option("--version", help="Print the version.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Handle options that come before a command."""


@app.command("prune-export")
@takes_recipe("prune-export")
def prune_export(
    options: Options,
    output: Annotated[Path | None, typer.Option(help="Run directory (default: runs/MODEL-flopsF-HASH).")] = None,
    recipe: RecipeFile = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print report.json instead of tables.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Prune a network to a budget of FLOPs or latency, export to ONNX, measure both here, and write a report."""
    _check_not_both(quiet, verbose)
    resolved = make_recipe(options, recipe)
    _check_paths(resolved, output)

    from optin_deploy.report.terminal import summary
    from optin_deploy.run.pipeline import prune_export_together

    with _progress(quiet, verbose) as screen:
        result = prune_export_together(resolved, output=output, command=_command(), **screen._asdict())
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
@takes_recipe("sweep")
def sweep(
    options: Options,
    output: Annotated[
        Path | None,
        typer.Option(help="Sweep directory, with one subdirectory per run (default: runs/MODEL-sweep-HASH)."),
    ] = None,
    recipe: RecipeFile = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print sweep.json instead of tables.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Run prune-export at several budgets with the same scores, and show the best networks (Pareto front)."""
    _check_not_both(quiet, verbose)
    refuse_several("sweep")
    resolved, budgets = read_sweep(options, recipe)
    plan(resolved, budgets)
    _check_paths(resolved, output)

    from optin_deploy.sweeps.run import sweep as run
    from optin_deploy.sweeps.terminal import summary

    with _progress(quiet, verbose) as screen:
        result = run(resolved, budgets, output=output, command=_command(), **screen._asdict())
    _show(result.report, summary, result.directory, "sweep.html, sweep.json, a run directory per budget", json_output)
    failed = [(run.name, gate) for run in result.report.runs for gate in run.gates if not gate.passed]
    if failed:
        raise GateError("; ".join(f"{name}, {gate.name}: {gate.detail}" for name, gate in failed))


def _check_not_both(quiet: bool, verbose: bool) -> None:
    if quiet and verbose:
        raise UserError("--quiet and --verbose: give one of them")


def _check_paths(recipe: Recipe, output: Path | None = None) -> None:
    """Raise UserError for data that do not exist, and for a directory that cannot be made."""
    check_exists(recipe.calibration, "calibration data")
    check_exists(recipe.evaluate, "evaluation data")
    if output is not None:
        check_writable(output, f"--output {output}")


class _Screen(NamedTuple):
    """Where progress goes, and whether none is shown."""

    console: Console
    quiet: bool


@contextmanager
def _progress(quiet: bool, verbose: bool) -> Iterator[_Screen]:
    """Yield where progress goes. With ``verbose``, log records go there too; off a terminal they replace its lines."""
    console = Console(stderr=True)
    if not verbose:
        yield _Screen(console, quiet)
        return
    from optin_deploy.cli.log_output import show_logs

    with show_logs(console):
        yield _Screen(console, quiet=not console.is_terminal)


def _print(shown: RenderableType, width: int = 100) -> None:
    """Print to stdout. Off a terminal, tables have the ``width`` they are made for."""
    (Console() if sys.stdout.isatty() else Console(width=width)).print(shown)


def _show(report: R, summary: Callable[[R], RenderableType], directory: Path, files: str, as_json: bool) -> None:
    if as_json:
        write_json(report.model_dump_json(indent=1))
        return
    _print(summary(report))
    _print(Text.assemble("Everything is in ", (str(directory), "bold"), f": {files}."))


def _show_plain(shown: RenderableType, data: object, as_json: bool) -> None:
    if as_json:
        write_json(json.dumps(data, indent=1))
    else:
        _print(shown)


@app.command()
@takes_recipe("export")
def export(
    options: Options,
    layout: Annotated[
        str,
        typer.Option(
            help="Write plain files, or triton: a model repository (default: plain).",
            rich_help_panel=Panel.EXPORT,
            show_default=False,
        ),
    ] = "plain",
    name: Annotated[
        str | None,
        typer.Option(help="Name of the models in a repository (default: the model's).", rich_help_panel=Panel.EXPORT),
    ] = None,
    output: Annotated[Path | None, typer.Option(help="New folder, or the repository (default: exports/MODEL).")] = None,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Export one network as it is: ONNX, checked against torch, and engines for the --runtimes that use them."""
    _check_not_both(quiet, verbose)
    refuse_several("export")
    resolved = make_recipe(options)
    kind = check_layout(resolved, layout, name)
    _check_paths(resolved)
    if output is not None:
        (check_new if kind == "plain" else check_writable)(output)

    from optin_deploy.export.command import default_name, export_network
    from optin_deploy.report.terminal import render_exported

    folder = output or Path("exports") / default_name(resolved.model)
    with _progress(quiet, verbose) as screen:
        exported = export_network(resolved, folder, kind, name, **screen._asdict())
    _show_plain(render_exported(exported), exported.to_dict(), json_output)


@app.command()
@takes_recipe("profile")
def profile(
    options: Options,
    table: Annotated[
        bool,
        typer.Option("--table", help="Show the latency of its blocks by size instead.", rich_help_panel=Panel.MEASURE),
    ] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quiet: Quiet = False,
    verbose: Verbose = False,
) -> None:
    """Measure one network as it is: its latency and where the time goes, or, with --table, its latency tables."""
    _check_not_both(quiet, verbose)
    refuse_several("profile")
    check_profile(options, table=table)
    if not options:
        shown, data = _cached_tables()
    else:
        resolved = make_recipe(options)
        with _progress(quiet, verbose) as screen:
            shown, data = (_tables if table else _profile)(resolved, screen)
    _show_plain(shown, data, json_output)


def _profile(recipe: Recipe, screen: _Screen) -> tuple[RenderableType, object]:
    from optin_deploy.report.profile_tables import render_profile
    from optin_deploy.run.network_profile import run_profile

    profiled = run_profile(recipe, **screen._asdict())
    return render_profile(recipe.model, profiled), profiled.to_dict()


def _tables(recipe: Recipe, screen: _Screen) -> tuple[RenderableType, object]:
    from optin_deploy.report.profile_tables import render_latency_tables
    from optin_deploy.run.network_profile import run_tables

    tables = run_tables(recipe, **screen._asdict())
    return render_latency_tables(recipe.model, tables), tables.to_dict()


def _cached_tables() -> tuple[RenderableType, object]:
    from optin_deploy.report.profile_tables import render_cache
    from profilers.table_cache import cache_folder, cached_settings

    settings = cached_settings()
    return render_cache(settings, str(cache_folder())), settings


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(help="Run directories, or report.json files.", show_default=False)],
    markdown: Annotated[bool, typer.Option("--markdown", help="Print Markdown, for a pull request.")] = False,
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Show the report of a run, or compare the reports of several."""
    if markdown and json_output:
        raise UserError("--markdown and --json: give one of them")

    from optin_deploy.report import comparison, read_report
    from optin_deploy.report.terminal import summary

    reports = {str(run): read_report(run) for run in runs}
    if json_output:
        write_json(_report_json(reports))
    elif markdown:
        sys.stdout.write(_report_markdown(reports))
    else:
        shown = comparison.view(comparison.lines(reports)) if len(runs) > 1 else summary(*reports.values())
        _print(shown, width=160)


def _report_json(reports: "Mapping[str, Report]") -> str:
    from optin_deploy.report import comparison

    if len(reports) == 1:
        return next(iter(reports.values())).model_dump_json(indent=1)
    return json.dumps([asdict(line) for line in comparison.lines(reports)], indent=1)


def _report_markdown(reports: "Mapping[str, Report]") -> str:
    from optin_deploy.report import comparison, markdown

    if len(reports) == 1:
        return markdown.render(next(iter(reports.values())))
    return comparison.as_markdown(comparison.lines(reports))


@app.command()
def models(
    name: Annotated[str, typer.Argument(help="Show timm models whose name contains this.")] = "",
    json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """List the networks that can be pruned, by name and by module type."""
    from optin_deploy.models.timm_models import prunable_names
    from optin_deploy.structure.describe import prunable

    names = [n for n in prunable_names() if name in n]
    if json_output:
        write_json(json.dumps({"modules": prunable(), "timm": names}, indent=1))
        return
    console = Console()
    console.print("[bold]Module types[/bold] (in any network, yours too)")
    for line in prunable():
        console.print(f"  {line}", highlight=False)
    console.print("[bold]timm[/bold] by name; deit_small is short for deit_small_patch16_224")
    console.print("  " + ", ".join(names), highlight=False)
    console.print("[bold]transformers[/bold] by model id or local directory: networks built of the module types above")


@app.command()
def env(json_output: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False) -> None:
    """Show versions, devices and missing packages."""
    from profilers import environment

    facts = environment()
    if json_output:
        write_json(json.dumps(facts, indent=1))
        return
    console = Console()
    for key, value in facts.items():
        if key != "versions":
            console.print(f"{key}: {value}", highlight=False)
    for package, version in facts["versions"].items():
        console.print(f"{package}: {version or '[yellow]not installed[/yellow]'}", highlight=False)


def _command() -> str:
    return shlex.join(["optin-deploy", *sys.argv[1:]])


def main() -> None:
    """Entry point."""
    # huggingface_hub reads this when it is imported, which no command has done yet. Workers inherit it.
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    prepare_streams()
    sys.exit(exit_code(_run, _command()))


def _run() -> int:
    """Run the command; return its exit code, or that of the parser, which shows help by itself."""
    _check_arguments()
    _check_endpoint()
    try:
        with quiet_unless_main():
            return app(standalone_mode=False) or 0
    finally:
        flush_stdout()


def _check_arguments() -> None:
    """Raise UserError for an argument that is not UTF-8, as a file name may be: no report could contain it."""
    for argument in sys.argv[1:]:
        if argument.encode("utf-8", "surrogateescape") != argument.encode("utf-8", "replace"):
            raise UserError(f"{os.fsencode(argument)!r} is not UTF-8: rename the file")


def _check_endpoint() -> None:
    """Raise UserError for an invalid address of the hub, on which its client fails while it is imported."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    try:
        _ = urlparse(endpoint).port
    except ValueError as error:
        raise UserError(f"HF_ENDPOINT={endpoint} is not a valid URL ({error}): fix or unset it") from error
