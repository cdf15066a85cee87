"""Options made from the fields of `Recipe`."""

from pathlib import Path
from typing import get_args

import pytest
from typer.main import get_command

from optin_deploy.cli.main import app
from optin_deploy.cli.options import _type, split_list
from optin_deploy.config.options import Command, Panel
from optin_deploy.config.recipe import Recipe, flag, recipe_options

GROUP = get_command(app)


def flags(command: str) -> dict[str, list[str]]:
    """The names of a command's options on the command line, by name."""
    return {p.name: [*p.opts, *p.secondary_opts] for p in GROUP.commands[command].params}  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", get_args(Command))
def test_a_command_has_the_options_that_name_it(command: Command) -> None:
    taken = {name for name, option in recipe_options().items() if option.of(command)}
    assert taken == flags(command).keys() & set(Recipe.model_fields)


def test_runs_take_every_field() -> None:
    for command in ("prune-export", "sweep"):
        assert set(Recipe.model_fields) <= flags(command).keys()


def test_only_flags_that_are_on_by_default_or_undecided_can_be_turned_off() -> None:
    negated = {name for name, names in flags("prune-export").items() if f"--no-{flag(name)[2:]}" in names}
    assert negated == {"compensate", "narrow_heads"}


@pytest.mark.parametrize("name", Recipe.model_fields)
def test_help_is_a_sentence_on_a_panel(name: str) -> None:
    option = recipe_options()[name]
    for shown in filter(None, (option, option.profile)):
        assert shown.panel in Panel
        assert shown.text[0].isupper() or shown.text[0].isdigit()
        assert not shown.text.endswith(".")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("model", str),
        ("flops", float),
        ("batch_size", int),
        ("table_seconds", float),
        ("task_weight", float),
        ("narrow_heads", bool),
        ("compensate", bool),
        ("calibration", Path),
        ("seed", int),
        # Read by Recipe, since they are of several types.
        ("align", str),
        ("ridge", str),
        ("tokens", str),
        ("criterion", str),
        ("sparsity", str),
        ("runtimes", str),
    ],
)
def test_the_parser_checks_simple_types(name: str, kind: type) -> None:
    assert _type(Recipe.model_fields[name].annotation) is kind


def test_lists_are_split_at_commas() -> None:
    assert split_list("1, 8,,") == ["1", "8"]
