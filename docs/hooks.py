"""What pages are filled with when the site is built: the command line's own help, and the recipes beside them."""

import re
from pathlib import Path
from typing import Any

import typer
from typer.main import get_command

MARK = "<!-- commands -->"
RECIPE = re.compile(r"<!-- recipe (\S+) -->")
RECIPES = Path(__file__).parent / "recipes"


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the options of every command, and recipes, in the places of their marks."""
    markdown = RECIPE.sub(lambda found: (RECIPES / found[1]).read_text(encoding="utf-8").rstrip(), markdown)
    return markdown.replace(MARK, commands()) if MARK in markdown else markdown


def commands() -> str:
    """A section for each command, with a table of its options."""
    from optin_deploy.cli.main import app

    group = get_command(app)
    context = typer.Context(group, info_name="optin-deploy")
    parts = []
    for name in group.list_commands(context):  # type: ignore[attr-defined]
        command = group.get_command(context, name)  # type: ignore[attr-defined]
        rows = [_row(option) for option in command.params if not getattr(option, "hidden", False)]
        own = [p.name or "" for p in command.params if p.param_type_name == "argument"]
        arguments = "".join(f" [{name.upper()}]" for name in own)
        text = " ".join((command.help or "").split())
        usage = f"`optin-deploy {name}{arguments} [options]`"
        head = [f"## {name}", "", usage, "", text, "", "| option | |", "| --- | --- |"]
        parts.append("\n".join([*head, *filter(None, rows)]))
    return "\n\n".join(parts)


def _row(option: Any) -> str:
    if option.param_type_name == "argument":
        return ""
    names = "/".join([*option.opts, *option.secondary_opts])
    told = " ".join((option.help or "").split()).replace("|", "\\|")
    return f"| `{names}` | {told} |"
