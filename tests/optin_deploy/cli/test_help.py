"""The help of every command, compared with a golden file: ``pytest --update-golden`` writes it anew."""

from __future__ import annotations

from itertools import groupby

import pytest
import typer.main
from renderings import CheckGolden

from optin_deploy.cli.main import app
from optin_deploy.structure.describe import prunable

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def _panel(option: object) -> str:
    return getattr(option, "rich_help_panel", None) or ""


def test_help_of_the_program(check_golden: CheckGolden) -> None:
    lines = [str(app.info.help), "", *(f"{name}: {command.help}" for name, command in COMMANDS.items())]
    check_golden("help/optin-deploy.txt", "\n".join(lines))


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_a_command(name: str, check_golden: CheckGolden) -> None:
    """As typer is asked to show it: how it draws its panels differs from version to version."""
    command = COMMANDS[name]
    lines = [f"optin-deploy {name}", "", command.help]
    for panel, options in groupby(sorted(command.params, key=_panel), _panel):
        lines += ["", f"{panel}:" if panel else "Options:"]
        lines += [f"  {', '.join([*o.opts, *o.secondary_opts])}  {getattr(o, 'help', None) or ''}" for o in options]
    # Brackets that are no markup for rich.
    check_golden(f"help/{name}.txt", "\n".join(lines).replace("\\[", "["))


def test_what_can_be_pruned(check_golden: CheckGolden) -> None:
    check_golden("prunable.txt", "\n".join(prunable()))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_explained(name: str) -> None:
    for option in COMMANDS[name].params:
        assert getattr(option, "help", None), option.name
