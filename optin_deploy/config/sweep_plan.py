"""From a recipe and budgets to the recipes of a sweep's runs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from optin_deploy.config.recipe import Recipe, check_options, make_recipe, validated
from optin_deploy.config.recipe_yaml import FileOptions, read_options
from optin_deploy.errors import UserError

# Options of a recipe that hold a budget; a sweep has a list of values of each.
KINDS = ("flops", "latency", "latency_ms")
# Options that tell where a latency budget holds: without effect on a budget of FLOPs.
_OF_LATENCY = ("runtime", "batch_size", "table_seconds")

Budgets = Mapping[str, Sequence[float | str]]


@dataclass(frozen=True)
class Planned:
    """One run of a sweep; ``name``, like ``flops-0.8``, is that of its directory."""

    name: str
    recipe: Recipe


def read_sweep(options: Mapping[str, Any], file: Path | None = None) -> tuple[Recipe, dict[str, list[Any]]]:
    """The recipe that all runs share, which has no budget, and the budgets, not validated.

    Args:
        options: of `Recipe`; a budget (`KINDS`) may be one value or a list.
        file: YAML for what they leave out.

    Raises:
        UserError: see `recipe.make_recipe`.
    """
    held = read_options(file) if file else FileOptions({}, {})
    given = {**held.values, **options}
    places = {name: place for name, place in held.places.items() if name not in options}
    budgets = {kind: given.pop(kind, None) for kind in KINDS}
    lists = {kind: value if isinstance(value, list | tuple) else [value] for kind, value in budgets.items()}
    return validated(given, places), {kind: list(values) for kind, values in lists.items() if values != [None]}


def plan(recipe: Recipe, budgets: Budgets) -> tuple[Planned, ...]:
    """One run per budget, in the order given: FLOPs first, then latencies. Budgets given twice count once.

    Args:
        recipe: without a budget.
        budgets: of each of `KINDS`, values as `Recipe` takes them.

    Raises:
        UserError: a budget or an option is wrong, or there is no budget.
    """
    own = next((kind for kind in KINDS if getattr(recipe, kind) is not None), None)
    if own:
        raise UserError(f"a sweep's recipe has no {own} of its own: give {getattr(recipe, own):g} among its budgets")
    unknown = next((kind for kind in budgets if kind not in KINDS), None)
    if unknown:
        raise UserError(f"unknown budget {unknown!r}: a sweep takes {', '.join(KINDS)}")
    runs: dict[str, Planned] = {}
    for kind in KINDS:
        for value in budgets.get(kind, ()):
            made = _recipe(recipe, kind, value, timed=any(budgets.get(k) for k in KINDS[1:]))
            check_options(made)
            name = f"{kind.replace('_', '-')}-{getattr(made, kind):.12g}"
            runs.setdefault(name, Planned(name, made))
    if not runs:
        raise UserError("--flops is needed (or --latency, --latency-ms): give the parts to keep, like 0.8,0.6")
    return tuple(runs.values())


def _recipe(recipe: Recipe, kind: str, value: Any, *, timed: bool) -> Recipe:
    """With one budget. In a sweep with latencies (``timed``) all runs are measured wherever one of those holds."""
    options = recipe.model_dump()
    if timed:
        options |= {"runtimes": recipe.measured_runtimes, "batch_sizes": recipe.measured_batch_sizes}
    made = make_recipe({**options, kind: value})
    if timed and not made.needs_table:
        return made.model_copy(update={name: Recipe.model_fields[name].default for name in _OF_LATENCY})
    return made


def as_yaml(recipe: Recipe, runs: Sequence[Planned]) -> str:
    """The sweep as a YAML file that `read_sweep` reads."""
    values = {kind: [v for run in runs if (v := getattr(run.recipe, kind)) is not None] or None for kind in KINDS}
    return yaml.safe_dump(recipe.model_dump(mode="json") | values, sort_keys=False)
