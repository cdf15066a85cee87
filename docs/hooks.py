"""Fill pages when the site is built: with the help of the command line, and with recipes."""

import re
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

MARK = "<!-- commands -->"
RECIPE = re.compile(r"<!-- recipe (\S+) -->")
RECIPES = Path(__file__).parent / "recipes"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replace marks in a page by the options of every command and by recipes."""
    markdown = RECIPE.sub(lambda match: (RECIPES / match[1]).read_text(encoding="utf-8").rstrip(), markdown)
    return markdown.replace(MARK, commands()) if MARK in markdown else markdown


def commands() -> str:
    """Return a section for each command, with a table of its options."""
    from optin_deploy.cli.main import app

    group = get_command(app)
    context = typer.Context(group, info_name="optin-deploy")
    parts = []
    for name in group.list_commands(context):  # type: ignore[attr-defined]
        command = group.get_command(context, name)  # type: ignore[attr-defined]
        rows = [_row(option) for option in command.params if not getattr(option, "hidden", False)]
        names = [p.name or "" for p in command.params if p.param_type_name == "argument"]
        arguments = "".join(f" [{argument.upper()}]" for argument in names)
        text = " ".join((command.help or "").split())
        usage = f"`optin-deploy {name}{arguments} [options]`"
        head = [f"## {name}", "", usage, "", text, "", "| option | |", "| --- | --- |"]
        parts.append("\n".join([*head, *filter(None, rows)]))
    return "\n\n".join(parts)


def _row(option: Any) -> str:
    if option.param_type_name == "argument":
        return ""
    names = "/".join([*option.opts, *option.secondary_opts])
    text = " ".join((option.help or "").split()).replace("|", "\\|")
    return f"| `{names}` | {text} |"
