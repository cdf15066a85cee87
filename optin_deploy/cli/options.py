"""Options of the command line, made from the fields of `Recipe`."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer
from rich.markup import escape

from optin_deploy.config.options import Command, Option, Panel
from optin_deploy.config.recipe import Recipe, flag, recipe_options

Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress: no bars, and no lines off a terminal.")]
Verbose = Annotated[
    bool, typer.Option("--verbose", help="Log what is found, kept, measured and written, each stage, and all warnings.")
]
RecipeFile = Annotated[Path | None, typer.Option(help="YAML file with any of these options; the command line wins.")]


def split_list(text: str) -> list[str]:
    """Return the values of a comma-separated list."""
    return [value.strip() for value in text.split(",") if value.strip()]


def takes_recipe(command: Command) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add the options of `Recipe` that ``command`` takes. Those given are the function's first argument, by name."""
    options = {name: option for name, field in recipe_options().items() if (option := field.of(command))}

    def decorate(function: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(function)
        def run(**arguments: object) -> None:
            given = {name: value for name in options if (value := arguments.pop(name)) is not None}
            lists = {name: split_list(str(value)) for name, value in given.items() if options[name].several}
            function(given | lists, **arguments)

        keyword = inspect.Parameter.KEYWORD_ONLY
        own = [p.replace(kind=keyword) for p in list(inspect.signature(function).parameters.values())[1:]]
        shared = [inspect.Parameter(n, keyword, default=None, annotation=_annotate(n, o)) for n, o in options.items()]
        # typer reads the options from the signature.
        run.__signature__ = inspect.Signature(sorted([*own, *shared], key=_panel))  # type: ignore[attr-defined]
        return run

    return decorate


def _annotate(name: str, option: Option) -> Any:
    """Return the annotation from which typer makes an option."""
    field = Recipe.model_fields[name]
    kind = str if option.several else _type(field.annotation)
    names = f"{flag(name)}/--no-{flag(name)[2:]}" if kind is bool and field.default is not False else flag(name)
    default = option.default or ("" if field.is_required() else _in_words(field.default))
    text = escape(f"{option.text}{f' (default: {default})' if default else ''}.")
    return Annotated[kind | None, typer.Option(names, help=text, rich_help_panel=option.panel, show_default=False)]


def _type(annotation: Any) -> type:
    """Return the type that typer parses. All other types are text, which `Recipe` parses."""
    kinds = [kind for kind in get_args(annotation) or [annotation] if kind is not NoneType]
    kinds = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds]
    return kinds[0] if len(kinds) == 1 and kinds[0] in (bool, int, float, Path) else str


def _in_words(default: object) -> str:
    if default is None or isinstance(default, bool):
        return "on" if default else ""
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return f"{default:g}" if isinstance(default, float) else str(default)


def _panel(parameter: inspect.Parameter) -> int:
    """Return the place of a parameter's panel: help shows panels in the order of their first options."""
    panel = parameter.annotation.__metadata__[0].rich_help_panel
    return list(Panel).index(panel) if panel else len(Panel)
