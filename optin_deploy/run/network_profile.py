"""One network measured as it is: its latency, the part of it that each kind of layer takes, and its latency tables."""

from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from numpy.typing import NDArray
from rich.console import Console

from optin_deploy.analysis.module_roles import PARTS, merging_places, places
from optin_deploy.config.recipe import Recipe
from optin_deploy.export.requirements import check_measurable, check_runtimes
from optin_deploy.latency.block_stacks import part_name
from optin_deploy.latency.budget import edges_of
from optin_deploy.latency.tables import Target, export_network, measure_network, target_of
from optin_deploy.models.load import load_network
from optin_deploy.network import Network
from optin_deploy.pruning.pruner import examine
from optin_deploy.report.profile_view import NetworkProfile, PartTable, PartTime, SizeRow, TableView
from optin_deploy.utils.progress import Stages, part, report_progress
from profilers import LAYER_RUNTIMES, layer_profile, measure_files
from profilers.layer_times import OTHER, LayerRow
from profilers.stats import summarise

BETWEEN = "between operators"


def run_profile(recipe: Recipe, *, console: Console | None = None, quiet: bool = False) -> NetworkProfile:
    """Measure the network that ``recipe`` names, at its runtime and batch size; progress goes to ``console``, the
    standard error stream when None.

    Raises:
        UserError: the network cannot be had, the runtime is not here, or nothing in the network is known by its parts.
        ProfilingError: the runtime failed.
    """
    with Stages(console or Console(stderr=True), quiet=quiet) as stages:
        network = _load(recipe, stages)
        with stages.stage("measure"):
            return profile_network(network, target_of(recipe), recipe.profile_seconds)


def run_tables(recipe: Recipe, *, console: Console | None = None, quiet: bool = False) -> TableView:
    """The latency tables of the network that ``recipe`` names, at its runtime and batch size; errors as above."""
    with Stages(console or Console(stderr=True), quiet=quiet) as stages:
        network = _load(recipe, stages)
        with stages.stage("latency tables"):
            return network_tables(network, target_of(recipe))


def _load(recipe: Recipe, stages: Stages) -> Network:
    with stages.checks():
        check_runtimes(recipe)
        check_measurable(recipe.target_runtime)
        return load_network(
            recipe.model,
            weights=recipe.weights,
            image_size=recipe.image_size,
            sequence_length=recipe.sequence_length,
            seed=recipe.seed,
        )


def profile_network(network: Network, target: Target, seconds: float) -> NetworkProfile:
    """Export and measure for ``seconds``, then profile by layer for at most as long again.

    Raises:
        UserError: nothing in the network is known by its parts.
        ProfilingError: the runtime failed.
    """
    sample = {name: t[:1].numpy() for name, t in network.inputs.items()}
    where = places(network.module, examine(network).structure) | merging_places(network.module)

    def part_of(row: LayerRow) -> str:
        return where[row.module].part if row.module in where else OTHER

    with TemporaryDirectory(prefix="optin-profile-") as folder:
        file = export_network(network, network.module, target, Path(folder, "network"))
        return _profiled(file, sample, target, seconds, list(where), part_of)


def profile_onnx(file: Path, sample: Mapping[str, NDArray[Any]], target: Target, seconds: float) -> NetworkProfile:
    """The same of an ONNX file, by types of operators.

    Args:
        sample: input name to array of one sample, leading dimension 1.

    Raises:
        ProfilingError: the file is missing, the sample does not fit, or the runtime failed.
    """
    return _profiled(file, dict(sample), target, seconds, [], lambda row: row.operator)


def _profiled(
    file: Path,
    sample: dict[str, NDArray[Any]],
    target: Target,
    seconds: float,
    modules: list[str],
    part_of: Callable[[LayerRow], str],
) -> NetworkProfile:
    with part(0.5):
        samples = measure_files({"network": file}, sample, target.case(seconds), (), report_progress)
    summary = summarise([ms for turn in samples.samples_ms["network"] for ms in turn])
    parts: dict[str, float] = {}
    if target.runtime in LAYER_RUNTIMES:
        layers = layer_profile(
            target.runtime,
            file,
            sample,
            modules,
            batch_size=target.batch_size,
            threads=target.threads,
            seconds=seconds,
            seed=target.seed,
            onnx=file.with_suffix(".onnx"),
            tf32=target.precision == "tf32",
            progress=lambda done: report_progress(0.5 + done / 2),
        )
        for row in layers.rows:
            name = part_of(row)
            parts[name] = parts.get(name, 0.0) + row.ms
        parts[BETWEEN] = layers.overhead_ms
    factor = summary.p50_ms / sum(parts.values()) if parts else 1.0
    # Parts in their own order, operators by their time.
    rest = sorted(parts.keys() - {*PARTS, OTHER, BETWEEN}, key=lambda name: -parts[name])
    order = [name for name in (*PARTS, OTHER, *rest, BETWEEN) if name in parts]
    times = tuple(PartTime(name, factor * parts[name]) for name in dict.fromkeys(order))
    return NetworkProfile(target.runtime, target.batch_size, target.threads, summary, times)


def network_tables(network: Network, target: Target) -> TableView:
    """The latency tables of a network, measured where the cache has none.

    Raises:
        UserError: the network has nothing to prune.
        ProfilingError: the runtime failed, or a cached table is damaged.
    """
    structure = examine(network).structure
    measured = measure_network(network, structure, target)
    edges = edges_of(structure, measured)
    parts = []
    for kind, table in zip(measured.types, measured.tables, strict=True):
        for group in kind.groups[0]:
            if group.outer is not None:
                continue
            name = part_name(kind.blocks[0], group)
            rows = []
            for row in sorted((r for r in table.rows if r.part == name), key=lambda r: (r.units, r.width or 0)):
                ms = [value for turn in row.samples_ms for value in turn]
                summary = summarise(ms)
                block_ms = table.block_ms - table.saved_ms(row)
                edge = group.name in edges and row.units in edges[group.name]
                spread = _middle_half(ms) / summary.p50_ms / 2
                rows.append(SizeRow(row.units, row.width, block_ms, block_ms / table.block_ms, spread, edge))
            parts.append(PartTable(kind.class_name, len(kind.blocks), name, table.block_ms, tuple(rows)))
    return TableView(
        target.runtime,
        target.batch_size,
        target.threads,
        measured.costs.total,
        measured.costs.floor,
        sum(measured.cached),
        tuple(parts),
    )


def _middle_half(values: list[float]) -> float:
    ordered = sorted(values)
    return ordered[3 * (len(ordered) - 1) // 4] - ordered[(len(ordered) - 1) // 4]
