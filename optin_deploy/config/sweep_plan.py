"""The runs of a sweep: one recipe for each budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from optin_deploy.config.recipe import Recipe, make_recipe, recipe_options, validate
from optin_deploy.config.recipe_yaml import FileOptions, read_options
from optin_deploy.config.validation import check_options
from optin_deploy.errors import UserError

KINDS = tuple(name for name, option in recipe_options().items() if option.swept)
"""Options of a recipe that hold a budget; a sweep has a list of values for each."""

# Options of a latency budget, which have no effect on a budget of FLOPs.
_OF_LATENCY = ("runtime", "batch_size", "table_seconds")

Budgets = Mapping[str, Sequence[float | str]]


@dataclass(frozen=True)
class Planned:
    """One run of a sweep. Its ``name``, like ``flops-0.8``, is that of its directory."""

    name: str
    recipe: Recipe


def read_sweep(options: Mapping[str, object], file: Path | None = None) -> tuple[Recipe, Budgets]:
    """Return the recipe that all runs share, without a budget, and the budgets, not validated.

    Args:
        options: fields of `Recipe`; a budget (`KINDS`) may be one value or a list.
        file: YAML file with the options left out.

    Raises:
        UserError: see `make_recipe`.
    """
    from_file = read_options(file) if file else FileOptions({}, {})
    values = {**from_file.values, **options}
    lines = {name: line for name, line in from_file.lines.items() if name not in options}
    given = {kind: value for kind in KINDS if (value := values.pop(kind, None)) is not None}
    budgets: dict[str, list[Any]] = {
        kind: list(value) if isinstance(value, list | tuple) else [value] for kind, value in given.items()
    }
    return validate(values, lines), budgets


def plan(recipe: Recipe, budgets: Budgets) -> tuple[Planned, ...]:
    """Return one run per budget, in the order given: FLOPs first, then latencies. Equal budgets make one run.

    Args:
        recipe: without a budget.
        budgets: for each of `KINDS`, values as `Recipe` takes them.

    Raises:
        UserError: a budget or an option is wrong, or there is no budget.
    """
    kind_in_recipe = next((kind for kind in KINDS if getattr(recipe, kind) is not None), None)
    if kind_in_recipe:
        value = getattr(recipe, kind_in_recipe)
        raise UserError(f"a sweep's recipe has no {kind_in_recipe} of its own: give {value:g} among its budgets")
    unknown = next((kind for kind in budgets if kind not in KINDS), None)
    if unknown:
        raise UserError(f"unknown budget {unknown!r}: a sweep takes {', '.join(KINDS)}")
    runs: dict[str, Planned] = {}
    timed = any(budgets.get(kind) for kind in KINDS if kind != "flops")
    for kind in KINDS:
        for value in budgets.get(kind, ()):
            run_recipe = _with_budget(recipe, kind, value, timed=timed)
            check_options(run_recipe)
            name = f"{kind.replace('_', '-')}-{getattr(run_recipe, kind):.12g}"
            runs.setdefault(name, Planned(name, run_recipe))
    if not runs:
        raise UserError("--flops is needed (or --latency, --latency-ms): give the parts to keep, like 0.8,0.6")
    return tuple(runs.values())


def _with_budget(recipe: Recipe, kind: str, value: object, *, timed: bool) -> Recipe:
    """Return the recipe with one budget.

    In a sweep with latency budgets (``timed``), every run is measured at the runtimes and batch sizes of all of them.
    """
    options = recipe.model_dump()
    if timed:
        options |= {"runtimes": recipe.measured_runtimes, "batch_sizes": recipe.measured_batch_sizes}
    run_recipe = make_recipe({**options, kind: value})
    if timed and not run_recipe.needs_table:
        return run_recipe.model_copy(update={name: Recipe.model_fields[name].default for name in _OF_LATENCY})
    return run_recipe


def as_yaml(recipe: Recipe, runs: Sequence[Planned]) -> str:
    """Return the sweep as YAML that `read_sweep` reads."""
    values = {kind: [v for run in runs if (v := getattr(run.recipe, kind)) is not None] or None for kind in KINDS}
    return yaml.safe_dump(recipe.model_dump(mode="json") | values, sort_keys=False)
