"""The stages of a latency budget: tables before the search, then networks built and measured until one meets it."""

from collections.abc import Mapping

import torch
from torch import Tensor

from optin_deploy.config.recipe import Recipe
from optin_deploy.errors import UserError
from optin_deploy.latency.budget import LatencySearch, LatencySolution, solve_latency_budget
from optin_deploy.latency.tables import LatencyModel, measure_latency_model
from optin_deploy.network import Network
from optin_deploy.nn.copies import copy_module
from optin_deploy.report.schema import LatencyBudget, LatencyRound
from optin_deploy.run import run_directory
from optin_deploy.run.context import RunContext
from optin_deploy.search.knapsack import check_budget
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.tokens.costs import TokenCosts, token_costs

_FILE = "latency.json"


def measure_tables(context: RunContext) -> LatencyModel:
    """Measure the latency tables, or take them from the cache; UserError if the latency cannot be reached."""
    prepared = context.prepared
    with context.stages.stage("latency tables"):
        tables = measure_latency_model(prepared.deployed(prepared.network), prepared.space.structure, prepared.target)
    if context.recipe.has_latency:
        check_latency(prepared.space.structure, context.recipe, tables)
    return tables


def check_latency(structure: Structure, recipe: Recipe, tables: LatencyModel) -> None:
    """Raise UserError if the latency of ``recipe`` is below what pruning can reach, or not below the dense latency."""
    check_budget(structure, tables.costs, latency_fraction(recipe, tables), "latency")


def latency_fraction(recipe: Recipe, tables: LatencyModel) -> float:
    """Return the latency budget as a fraction of the dense latency."""
    if recipe.latency is not None:
        return recipe.latency
    assert recipe.latency_ms is not None
    dense_ms = tables.costs.total
    if recipe.latency_ms >= dense_ms:
        raise UserError(f"--latency-ms {recipe.latency_ms:g}: the dense network takes {dense_ms:.3g} ms; ask for less")
    return recipe.latency_ms / dense_ms


def plan_for_latency(
    context: RunContext, dense: Network, scores: Mapping[str, Tensor], tables: LatencyModel, schedule: tuple[int, ...]
) -> Plan:
    """Return the plan that meets the latency budget, and keep its measurements in ``latency.json``.

    Args:
        dense: in the basis that ``scores`` are for.
        schedule: number of tokens that enter each block; empty if none merge.
    """
    prepared, recipe = context.prepared, context.recipe
    deployed = prepared.deployed(dense)
    if prepared.device.type != "cpu":
        deployed = deployed.with_module(copy_module(deployed.module).cpu())
        # Candidates are timed in other processes, which need the GPU memory that scoring reserved.
        torch.cuda.empty_cache()
    fraction = latency_fraction(recipe, tables)
    with context.stages.stage("meet the latency"):
        search = LatencySearch(
            deployed,
            prepared.space.structure,
            scores,
            tables,
            prepared.space.costs,
            fraction,
            flops=recipe.flops,
            align=recipe.alignment,
            tokens=_token_costs(context, dense, schedule),
        )
        solution = solve_latency_budget(search)
    run_directory.write_json(context.directory / _FILE, _latency_budget(context, tables, fraction, solution))
    return solution.plan


def _token_costs(context: RunContext, dense: Network, schedule: tuple[int, ...]) -> TokenCosts | None:
    space = context.space
    if space.stack is None or not schedule:
        return None
    return token_costs(dense.module, space.structure, space.costs, space.stack, dense.inputs).at(schedule)


def _latency_budget(
    context: RunContext, tables: LatencyModel, fraction: float, solution: LatencySolution
) -> LatencyBudget:
    target = context.prepared.target
    return LatencyBudget(
        runtime=target.runtime,
        batch_size=target.batch_size,
        fraction=fraction,
        dense_ms=tables.costs.total,
        floor_ms=tables.costs.floor,
        rounds=[
            LatencyRound(by=i.objective, predicted_ms=i.predicted_ms, measured_ms=i.measured_ms)
            for i in solution.iterations
        ],
        taken=solution.taken,
        tables=len(tables.tables),
        tables_cached=sum(table.cached for table in tables.tables),
    )


def read_latency(context: RunContext) -> LatencyBudget | None:
    """Read how the latency budget was met; None if there is no such budget."""
    if not context.recipe.has_latency:
        return None
    return run_directory.read_with_checkpoint(context.directory, _FILE, LatencyBudget)
