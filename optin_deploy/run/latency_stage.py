"""The stages that a latency budget adds to a run: tables before the search, then building and measuring within it."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from optin_deploy.config.recipe import Recipe
from optin_deploy.errors import UserError
from optin_deploy.latency.budget import Met, meet
from optin_deploy.latency.tables import Measured, measure_network
from optin_deploy.network import Network
from optin_deploy.nn.copies import copied
from optin_deploy.run import run_directory
from optin_deploy.run.job import Job
from optin_deploy.search.knapsack import check_budget
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.tokens.costs import token_costs
from optin_deploy.utils.atomic_files import write_text
from optin_deploy.utils.progress import Stages


def latency_tables(job: Job, directory: Path, stages: Stages) -> Measured | None:
    """Latency tables where the search needs them. An unreachable latency is told before anything is written."""
    recipe = job.recipe
    if not recipe.needs_table or (directory / "checkpoint").exists():
        return None
    with stages.stage("latency tables"):
        measured = measure_network(job.served(job.network), job.anatomy.structure, job.target)
    if recipe.has_latency:
        check_latency(job.anatomy.structure, recipe, measured)
    return measured


def check_latency(structure: Structure, recipe: Recipe, measured: Measured) -> None:
    """Raise UserError when the latency that ``recipe`` asks for cannot be reached, or is no less than the dense one."""
    check_budget(structure, measured.costs, latency_fraction(recipe, measured), "latency")


def latency_fraction(recipe: Recipe, measured: Measured) -> float:
    """The latency asked for, as a part of the dense network's."""
    if recipe.latency is not None:
        return recipe.latency
    assert recipe.latency_ms is not None
    dense_ms = measured.costs.total
    if recipe.latency_ms >= dense_ms:
        raise UserError(f"--latency-ms {recipe.latency_ms:g}: the dense network takes {dense_ms:.3g} ms; ask for less")
    return recipe.latency_ms / dense_ms


def plan_for_latency(
    job: Job,
    dense: Network,
    scores: Mapping[str, Tensor],
    measured: Measured,
    schedule: tuple[int, ...],
    directory: Path,
    stages: Stages,
) -> Plan:
    """The plan that meets the latency budget, by building and measuring; how is kept in latency.json.

    Args:
        schedule: tokens that enter each block; empty where none merge.
    """
    recipe, anatomy = job.recipe, job.anatomy
    fraction = latency_fraction(recipe, measured)
    tokens = None
    if anatomy.stack is not None and schedule:
        costs = token_costs(dense.module, anatomy.structure, anatomy.costs, anatomy.stack, dense.inputs)
        tokens = costs.at(schedule)
    dense = job.served(dense)
    on_cpu = dense if job.device.type == "cpu" else dense.with_module(copied(dense.module).cpu())
    with stages.stage("meet the latency"):
        met = meet(
            on_cpu,
            job.anatomy.structure,
            scores,
            measured,
            job.anatomy.costs,
            fraction,
            job.target,
            flops=recipe.flops,
            align=recipe.alignment,
            tokens=tokens,
        )
    with run_directory.recorded(directory / "latency.json"):
        write_text(directory / "latency.json", json.dumps(_record(job, measured, fraction, met), indent=1) + "\n")
    return met.plan


def _record(job: Job, measured: Measured, fraction: float, met: Met) -> dict[str, Any]:
    return {
        "runtime": job.target.runtime,
        "batch_size": job.target.batch_size,
        "fraction": fraction,
        "dense_ms": measured.costs.total,
        "floor_ms": measured.costs.floor,
        "rounds": [{"by": r.by, "predicted_ms": r.predicted_ms, "measured_ms": r.measured_ms} for r in met.rounds],
        "taken": met.taken,
        "tables": len(measured.tables),
        "tables_cached": sum(measured.cached),
    }


def read_latency(directory: Path) -> dict[str, Any]:
    path = directory / "latency.json"
    if not path.is_file():
        raise UserError(f"{path} is gone: remove {directory / 'checkpoint'} too, to prune again")
    found: dict[str, Any] = run_directory.read_json(path)
    return found
