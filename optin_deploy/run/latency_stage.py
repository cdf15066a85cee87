"""The stages of a latency budget: tables before the search, then networks built and measured until one meets it."""

from collections.abc import Mapping

from torch import Tensor

from optin_deploy.config.recipe import Recipe
from optin_deploy.errors import UserError
from optin_deploy.latency.budget import Met, meet
from optin_deploy.latency.tables import Measured, measure_network
from optin_deploy.network import Network
from optin_deploy.nn.copies import copied
from optin_deploy.report.schema import LatencyBudget, LatencyRound
from optin_deploy.run import run_directory
from optin_deploy.run.context import RunContext
from optin_deploy.search.knapsack import check_budget
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.tokens.costs import TokenCosts, token_costs

_FILE = "latency.json"


def measure_tables(context: RunContext) -> Measured:
    """Measure the latency tables, or take them from the cache; UserError if the latency cannot be reached."""
    prepared = context.prepared
    with context.stages.stage("latency tables"):
        tables = measure_network(prepared.deployed(prepared.network), prepared.anatomy.structure, prepared.target)
    if context.recipe.has_latency:
        check_latency(prepared.anatomy.structure, context.recipe, tables)
    return tables


def check_latency(structure: Structure, recipe: Recipe, tables: Measured) -> None:
    """Raise UserError if the latency of ``recipe`` is below what pruning can reach, or not below the dense latency."""
    check_budget(structure, tables.costs, latency_fraction(recipe, tables), "latency")


def latency_fraction(recipe: Recipe, tables: Measured) -> float:
    """Return the latency budget as a fraction of the dense latency."""
    if recipe.latency is not None:
        return recipe.latency
    assert recipe.latency_ms is not None
    dense_ms = tables.costs.total
    if recipe.latency_ms >= dense_ms:
        raise UserError(f"--latency-ms {recipe.latency_ms:g}: the dense network takes {dense_ms:.3g} ms; ask for less")
    return recipe.latency_ms / dense_ms


def plan_for_latency(
    context: RunContext, dense: Network, scores: Mapping[str, Tensor], tables: Measured, schedule: tuple[int, ...]
) -> Plan:
    """Return the plan that meets the latency budget, and keep its measurements in ``latency.json``.

    Args:
        dense: in the basis that ``scores`` are for.
        schedule: number of tokens that enter each block; empty if none merge.
    """
    prepared, recipe = context.prepared, context.recipe
    deployed = prepared.deployed(dense)
    if prepared.device.type != "cpu":
        deployed = deployed.with_module(copied(deployed.module).cpu())
    fraction = latency_fraction(recipe, tables)
    with context.stages.stage("meet the latency"):
        met = meet(
            deployed,
            prepared.anatomy.structure,
            scores,
            tables,
            prepared.anatomy.costs,
            fraction,
            prepared.target,
            flops=recipe.flops,
            align=recipe.alignment,
            tokens=_token_costs(context, dense, schedule),
        )
    run_directory.write_json(context.directory / _FILE, _latency_budget(context, tables, fraction, met))
    return met.plan


def _token_costs(context: RunContext, dense: Network, schedule: tuple[int, ...]) -> TokenCosts | None:
    anatomy = context.anatomy
    if anatomy.stack is None or not schedule:
        return None
    return token_costs(dense.module, anatomy.structure, anatomy.costs, anatomy.stack, dense.inputs).at(schedule)


def _latency_budget(context: RunContext, tables: Measured, fraction: float, met: Met) -> LatencyBudget:
    target = context.prepared.target
    return LatencyBudget(
        runtime=target.runtime,
        batch_size=target.batch_size,
        fraction=fraction,
        dense_ms=tables.costs.total,
        floor_ms=tables.costs.floor,
        rounds=[LatencyRound(by=r.by, predicted_ms=r.predicted_ms, measured_ms=r.measured_ms) for r in met.rounds],
        taken=met.taken,
        tables=len(tables.tables),
        tables_cached=sum(tables.cached),
    )


def read_latency(context: RunContext) -> LatencyBudget | None:
    """Read how the latency budget was met; None if there is no such budget."""
    if not context.recipe.has_latency:
        return None
    return run_directory.read_with_checkpoint(context.directory, _FILE, LatencyBudget)
