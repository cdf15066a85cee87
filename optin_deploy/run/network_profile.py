"""Measurements of a single network: its latency, the share of each part in it, and its latency tables."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from numpy.typing import NDArray
from rich.console import Console

from optin_deploy.analysis.module_roles import PARTS, merging_roles, module_roles
from optin_deploy.config.recipe import Recipe
from optin_deploy.export.requirements import check_measurable, check_runtimes
from optin_deploy.latency.budget import find_step_sizes
from optin_deploy.latency.tables import measure_latency_model
from optin_deploy.latency.target import Target, target_of, write_network
from optin_deploy.models.load import load_recipe_network
from optin_deploy.network import Network
from optin_deploy.pruning.space import analyze
from optin_deploy.report.profile_tables import LatencyTables, NetworkProfile, PartTable, PartTime, SizeRow
from optin_deploy.utils.progress import Stages, progress_until, report_progress
from profilers import LAYER_RUNTIMES, LayerProfile, Summary, layer_profile, measure_files
from profilers.latency_table import LatencyTable
from profilers.layer_times import OTHER, LayerRow
from profilers.stats import summarise

BETWEEN = "between operators"


def run_profile(recipe: Recipe, *, console: Console | None = None, quiet: bool = False) -> NetworkProfile:
    """Measure the network that ``recipe`` names, at its runtime and batch size.

    Args:
        console: shows the progress; the standard error stream when None.

    Raises:
        UserError: the network cannot be loaded, the runtime is missing, or no part of the network is known.
        ProfilingError: the runtime failed.
    """
    with Stages(console or Console(stderr=True), quiet=quiet) as stages:
        network = _load(recipe, stages)
        with stages.stage("measure"):
            return profile_network(network, target_of(recipe), recipe.profile_seconds)


def run_tables(recipe: Recipe, *, console: Console | None = None, quiet: bool = False) -> LatencyTables:
    """Return the latency tables of the network that ``recipe`` names; arguments and errors as for `run_profile`."""
    with Stages(console or Console(stderr=True), quiet=quiet) as stages:
        network = _load(recipe, stages)
        with stages.stage("latency tables"):
            return network_tables(network, target_of(recipe))


def _load(recipe: Recipe, stages: Stages) -> Network:
    with stages.checks():
        check_runtimes(recipe)
        check_measurable(recipe.target_runtime)
        return load_recipe_network(recipe)


def profile_network(network: Network, target: Target, seconds: float) -> NetworkProfile:
    """Export a network, measure it for ``seconds``, then profile its layers for at most as long again.

    Raises:
        UserError: no part of the network is known.
        ProfilingError: the runtime failed.
    """
    sample = network.sample_arrays()
    roles = module_roles(network.module, analyze(network).structure) | merging_roles(network.module)
    with TemporaryDirectory(prefix="optin-profile-") as folder:
        file = write_network(network, network.module, target, Path(folder, "network"))
        summary = _measure_latency(file, sample, target, seconds)
        layers = _profile_layers(file, sample, target, seconds, list(roles))
    return _network_profile(
        target, summary, layers, lambda row: roles[row.module].part if row.module in roles else OTHER
    )


def profile_onnx(
    file: Path, sample: Mapping[str, NDArray[np.generic]], target: Target, seconds: float
) -> NetworkProfile:
    """Measure an ONNX file for ``seconds``, then profile it by operator type for at most as long again.

    Args:
        sample: input name to array of one sample, leading dimension 1.

    Raises:
        ProfilingError: the file is missing, the sample does not fit, or the runtime failed.
    """
    summary = _measure_latency(file, sample, target, seconds)
    layers = _profile_layers(file, sample, target, seconds, [])
    return _network_profile(target, summary, layers, lambda row: row.operator)


def _measure_latency(file: Path, sample: Mapping[str, NDArray[np.generic]], target: Target, seconds: float) -> Summary:
    with progress_until(0.5):
        samples = measure_files({"network": file}, dict(sample), target.case(seconds), (), report_progress)
    return summarise([ms for turn in samples.samples_ms["network"] for ms in turn])


def _profile_layers(
    file: Path, sample: Mapping[str, NDArray[np.generic]], target: Target, seconds: float, modules: list[str]
) -> LayerProfile | None:
    """Profile the layers; None if the runtime cannot do that."""
    if target.runtime not in LAYER_RUNTIMES:
        return None
    return layer_profile(
        target.case(seconds),
        file,
        dict(sample),
        modules,
        onnx=file.with_suffix(".onnx"),
        progress=lambda done: report_progress(0.5 + done / 2),
    )


def _network_profile(
    target: Target, summary: Summary, layers: LayerProfile | None, part_of: Callable[[LayerRow], str]
) -> NetworkProfile:
    """Sum the layers by part, and scale them to the measured latency."""
    if layers is None:
        return NetworkProfile(target.runtime, target.batch_size, target.threads, summary, ())
    parts_ms: dict[str, float] = {}
    for row in layers.rows:
        parts_ms[part_of(row)] = parts_ms.get(part_of(row), 0.0) + row.ms
    parts_ms[BETWEEN] = layers.overhead_ms
    factor = summary.p50_ms / sum(parts_ms.values())
    # Parts in their own order, operators by their time.
    operators = sorted(parts_ms.keys() - {*PARTS, OTHER, BETWEEN}, key=lambda name: -parts_ms[name])
    order = dict.fromkeys(name for name in (*PARTS, OTHER, *operators, BETWEEN) if name in parts_ms)
    times = tuple(PartTime(name, factor * parts_ms[name]) for name in order)
    return NetworkProfile(target.runtime, target.batch_size, target.threads, summary, times)


def network_tables(network: Network, target: Target) -> LatencyTables:
    """Return the latency tables of a network; those that are not in the cache are measured.

    Raises:
        UserError: the network has nothing to prune.
        ProfilingError: the runtime failed, or a cached table is damaged.
    """
    structure = analyze(network).structure
    model = measure_latency_model(network, structure, target)
    step_sizes = find_step_sizes(structure, model.costs)
    parts = []
    for block_table in model.tables:
        kind, table = block_table.kind, block_table.table
        for name, group in zip(kind.parts, kind.outer_groups, strict=True):
            rows = _size_rows(table, name, step_sizes.get(group.name, ()))
            parts.append(PartTable(kind.class_name, len(kind.blocks), name, table.block_ms, rows))
    return LatencyTables(
        target.runtime,
        target.batch_size,
        target.threads,
        model.costs.total,
        model.costs.floor,
        sum(block_table.cached for block_table in model.tables),
        tuple(parts),
    )


def _size_rows(table: LatencyTable, part: str, step_sizes: Collection[int]) -> tuple[SizeRow, ...]:
    """Return the rows of one part of a block; ``step_sizes`` are the sizes worth keeping."""
    rows = []
    for row in sorted((r for r in table.rows if r.part == part), key=lambda r: (r.units, r.width or 0)):
        ms = [value for turn in row.samples_ms for value in turn]
        block_ms = table.block_ms - table.saved_ms(row)
        spread = _middle_half(ms) / summarise(ms).p50_ms / 2
        rows.append(SizeRow(row.units, row.width, block_ms, block_ms / table.block_ms, spread, row.units in step_sizes))
    return tuple(rows)


def _middle_half(values: list[float]) -> float:
    """Return the distance between the quartiles."""
    ordered = sorted(values)
    return ordered[3 * (len(ordered) - 1) // 4] - ordered[(len(ordered) - 1) // 4]
