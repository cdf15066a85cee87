"""Options that depend on each other."""

import pytest

from optin_deploy.config.recipe import Recipe, recipe_options
from optin_deploy.config.validation import check_effects, check_layout, check_options, check_profile
from optin_deploy.errors import UserError

VALUES = {"criterion": "magnitude", "tokens": (5, 4), "narrow_heads": True, "align": 8, "calibration_labels": "class"}


@pytest.mark.parametrize("name", [name for name, option in recipe_options().items() if option.needs])
def test_an_option_is_refused_without_what_it_needs(name: str) -> None:
    """The message names the option and the first of the conditions, none of which holds."""
    field = Recipe.model_fields[name]
    value = VALUES.get(name, {bool: True, float: 0.5}.get(type(field.default), 2))
    recipe = Recipe(model="m", sparsity="2:4", compensate=False).model_copy(update={name: value})
    with pytest.raises(UserError) as caught:
        check_effects(recipe, "prune-export")
    message = str(caught.value)
    assert f"--{name.replace('_', '-')}" in message and recipe_options()[name].needs[0].words in message


def test_what_a_command_does_not_take_is_not_checked() -> None:
    recipe = Recipe(model="m", scorer="exact")
    check_effects(recipe, "export")
    with pytest.raises(UserError, match="--scorer exact"):
        check_options(recipe.model_copy(update={"flops": 0.5}))


@pytest.mark.parametrize(
    ("given", "table", "named"),
    [
        ({}, False, "--model"),
        ({"weights": "random"}, True, "--weights"),
        ({"model": "m", "table_seconds": 5.0}, False, "--table-seconds 5:"),
        ({"model": "m", "profile_seconds": 5.0}, True, "--profile-seconds 5:"),
    ],
)
def test_options_of_a_profile(given: dict[str, object], table: bool, named: str) -> None:
    with pytest.raises(UserError, match=named):
        check_profile(given, table=table)
    check_profile({}, table=True)
    check_profile({"model": "m"}, table=table)


@pytest.mark.parametrize(
    ("options", "layout", "name", "named"),
    [
        ({}, "folders", None, "--layout folders"),
        ({}, "plain", "x", "--name x"),
        ({}, "triton", ".x", "--name .x"),
        ({"runtimes": ("rtx",)}, "triton", None, "rtx"),
        ({"weight_stripped": True}, "triton", None, "--weight-stripped"),
        ({"static": True}, "triton", None, "--static"),
    ],
)
def test_a_layout_and_what_contradicts_it(
    options: dict[str, object], layout: str, name: str | None, named: str
) -> None:
    recipe = Recipe.model_validate({"model": "m", **options})
    with pytest.raises(UserError, match=named):
        check_layout(recipe, layout, name)
    assert check_layout(recipe, "plain", None) == "plain"
