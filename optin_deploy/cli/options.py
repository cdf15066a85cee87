"""Options of the command line, made from the fields of `Recipe`."""

import functools
import inspect
from collections.abc import Callable
from pathlib import Path
from types import NoneType
from typing import Annotated, Any, get_args, get_origin

import typer
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined
from rich.markup import escape

from optin_deploy.config.options import PANELS, Command, Option
from optin_deploy.config.recipe import Recipe, flag, recipe_options

Quiet = Annotated[bool, typer.Option("--quiet", help="Show no progress: no bars, and no lines off a terminal.")]
Verbose = Annotated[
    bool,
    typer.Option("--verbose", help="Log what is found, kept, measured and written, each stage, and all warnings."),
]
RecipeFile = Annotated[
    Path | None,
    typer.Option(help="YAML file with any of these options; the command line wins.", show_default=False),
]


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
        shared = [
            inspect.Parameter(name, keyword, default=None, annotation=_annotation(name, option))
            for name, option in options.items()
        ]
        # typer reads the options from the signature.
        run.__signature__ = inspect.Signature(sorted([*own, *shared], key=_panel))  # type: ignore[attr-defined]
        return run

    return decorate


def _annotation(name: str, option: Option) -> Any:
    """Return what typer reads an option from: its type and how ``--help`` shows it."""
    field = Recipe.model_fields[name]
    kind = str if option.several else _type(field.annotation)
    names = [f"{flag(name)}/--no-{flag(name)[2:]}" if kind is bool and field.default is not False else flag(name)]
    text = typer.Option(*names, help=_help(option, field), rich_help_panel=option.panel, show_default=False)
    return Annotated[kind | None, text]


def _type(annotation: Any) -> type:
    """Return the type that typer parses. All other types are text, which `Recipe` parses."""
    kinds = [kind for kind in get_args(annotation) or [annotation] if kind is not NoneType]
    kinds = [get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds]
    return kinds[0] if len(kinds) == 1 and kinds[0] in (bool, int, float, Path) else str


def _help(option: Option, field: FieldInfo) -> str:
    default = option.default or _in_words(field.default)
    return escape(f"{option.text}{f' (default: {default})' if default else ''}.")


def _in_words(default: object) -> str:
    if default is None or default is False or default is PydanticUndefined:
        return ""
    if isinstance(default, tuple):
        return ",".join(map(str, default))
    return "on" if default is True else f"{default:g}" if isinstance(default, float) else str(default)


def _panel(parameter: inspect.Parameter) -> int:
    """Return the place of a parameter's panel: help shows panels in the order of their first options."""
    panel = parameter.annotation.__metadata__[0].rich_help_panel
    return PANELS.index(panel) if panel in PANELS else len(PANELS)
