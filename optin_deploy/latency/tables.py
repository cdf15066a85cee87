"""Measure latency tables of a network's blocks, and the dense network on the same scale."""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import NamedTuple, TypedDict

import torch
from torch import nn

from exporters import BUILDERS, Precision
from exporters.trt_engine import builder_version
from optin_deploy.latency.block_stacks import BlockDescription, BlockType, block_types, build_stack
from optin_deploy.latency.costs import LatencyCosts, latency_costs
from optin_deploy.latency.target import LatencySettings, Target, write_module, write_network
from optin_deploy.network import Network
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.utils.progress import progress_until, report_progress, track
from profilers import GPU_RUNTIMES, environment, measure_each, measure_files
from profilers.latency_table import LatencyTable, Row
from profilers.runners.base import Feeds
from profilers.stats import paired_ratio
from profilers.table_cache import check_cache, read_table, save_table, table_file

_SHALLOW = 1
_SIZE_STEP = 16
logger = logging.getLogger(__name__)


class TableKey(TypedDict):
    """Conditions under which a table was measured. Their hash names its file in the cache."""

    device: str
    os: str
    threads: int
    runtime: str
    versions: dict[str, str]
    precision: Precision
    opset: int
    batch_size: int
    depth: int
    block: BlockDescription


@dataclass(frozen=True)
class BlockTable:
    """A type of block with its latency table; ``cached`` tables were not measured in this run."""

    kind: BlockType
    table: LatencyTable
    cached: bool = False


@dataclass(frozen=True)
class LatencyModel:
    """The latency of a network at ``target`` as a cost, and the tables that the cost was made of."""

    target: Target
    costs: LatencyCosts
    tables: tuple[BlockTable, ...] = ()


class TablePoint(NamedTuple):
    """One size of a group: units, the width of each unit for heads, and the sizes that a plan needs for it."""

    units: int
    width: int | None
    sizes: dict[str, int]


@dataclass(frozen=True)
class _StackWriter:
    """Writes stacks of a network's blocks as files of the target's runtime."""

    module: nn.Module
    structure: Structure
    target: Target

    def write(self, kind: BlockType, sizes: Mapping[str, int], depth: int, stem: Path) -> tuple[Path, Feeds]:
        """Write a stack of ``depth`` blocks cut to ``sizes``; return the file and one sample of its inputs."""
        stack, inputs = build_stack(self.module, self.structure, kind, sizes, depth)
        path = write_module(stack, inputs, {name: {0: "batch"} for name in inputs}, self.target, stem)
        return path, {name: tensor[:1].numpy() for name, tensor in inputs.items()}


def measure_latency_model(network: Network, structure: Structure, target: Target) -> LatencyModel:
    """Measure tables of all types of blocks, or read them from the cache, and measure the dense network.

    Raises:
        ProfilingError: the runtime failed, a cached table is damaged, or tables cannot be cached.
    """
    writer = _StackWriter(network.module, structure, target)
    types = block_types(network.module, structure, network.inputs)
    tables = tuple(_find_table(writer, kind) for kind in track(types))
    with TemporaryDirectory(prefix="optin-anchor-") as folder:
        dense_ms, scales = _measure_anchor(network, writer, tables, Path(folder))
    costs = latency_costs(structure, [(measured.kind, measured.table) for measured in tables], dense_ms, scales)
    return LatencyModel(target, costs, tables)


def _find_table(writer: _StackWriter, kind: BlockType) -> BlockTable:
    """Return the table from the cache, or measure it and keep it there."""
    key = table_key(kind, writer.target)
    blocks = f"{len(kind.blocks)} × {kind.class_name}"
    table = read_table(key)
    if table is not None:
        logger.info("latency table of %s: from the cache, %s", blocks, table_file(key))
        return BlockTable(kind, table, cached=True)
    check_cache()
    table = _measure_table(writer, kind, key)
    logger.info("latency table of %s: measured, kept as %s", blocks, save_table(table))
    return BlockTable(kind, table)


def _measure_table(writer: _StackWriter, kind: BlockType, key: TableKey) -> LatencyTable:
    """Measure all sizes of one type of block as stacks, interleaved in one process.

    Where a stack lies in memory makes it some percent faster or slower, so each is loaded as often as
    `profilers.loads_for` says.
    """
    target, structure = writer.target, writer.structure
    depth = target.settings.depth
    groups = list(zip(kind.parts, kind.outer_groups, strict=True))
    points = [(name, point) for name, g in groups for point in table_points(structure, g, target.settings)]
    stacks: dict[str, tuple[dict[str, int], int]] = {"shallow": ({}, _SHALLOW), "dense": ({}, depth)}
    stacks |= {f"size{i}": (point.sizes, depth) for i, (_, point) in enumerate(points)}
    files: dict[str, Path] = {}
    sample: Feeds = {}
    with TemporaryDirectory(prefix="optin-table-") as folder:
        with progress_until(0.5):
            for label, (sizes, blocks) in track(stacks.items()):
                files[label], sample = writer.write(kind, sizes, blocks, Path(folder, label))
        with progress_until(1.0):
            case = target.case(target.seconds, files.values())
            measured = measure_files(files, sample, case, (), report_progress)
    samples = measured.samples_ms
    rows = [Row(name, point.units, point.width, samples[f"size{i}"]) for i, (name, point) in enumerate(points)]
    # All units at full width are the dense stack itself.
    for name, group in groups:
        width = structure.child(group.name)
        rows.append(Row(name, group.units, width.units if width else None, samples["dense"]))
    depths = {_SHALLOW: samples["shallow"], depth: samples["dense"]}
    return LatencyTable(key, depth, depths, tuple(rows), measured.loads)


def table_points(structure: Structure, group: Group, settings: LatencySettings) -> list[TablePoint]:
    """Return the sizes at which a group is measured, all but the whole group."""
    width = structure.child(group.name)
    if width is None:
        heads = group.kind == "head"
        sizes = spread_sizes(group.units, group.units) if heads else even_sizes(group.units, settings)
        return [TablePoint(n, None, {group.name: n}) for n in _allowed_sizes(sizes, group) if n < group.units]
    points = [TablePoint(0, width.units, {group.name: 0})]
    for n in _allowed_sizes(spread_sizes(group.units, settings.head_counts), group)[1:]:
        for w in spread_sizes(width.units, settings.head_widths)[1:]:
            if (n, w) != (group.units, width.units):
                points.append(TablePoint(n, w, {group.name: n, width.name: w}))
    return points


def _allowed_sizes(sizes: Sequence[int], group: Group) -> list[int]:
    """Return the sizes rounded down to multiples of what must leave together."""
    return sorted({n - n % group.step for n in sizes})


def even_sizes(units: int, settings: LatencySettings) -> list[int]:
    """Return sizes from 0 to all units in even steps, and some sizes within one step.

    Steps are multiples of 16 where a group has 64 units or more.
    """
    step = max(1, math.ceil(units / settings.sizes))
    if units >= 4 * _SIZE_STEP:
        step = _SIZE_STEP * math.ceil(step / _SIZE_STEP)
    middle = step * (units // step // 2)
    within = [middle + distance for distance in settings.sizes_within_step if distance < step]
    return sorted({0, *range(step, units, step), *within, units})


def spread_sizes(units: int, steps: int) -> list[int]:
    """Return 0 and about ``steps`` evenly spaced numbers up to ``units``."""
    return sorted({0, *(round(units * i / steps) for i in range(1, steps + 1))})


def _measure_anchor(
    network: Network, writer: _StackWriter, tables: Sequence[BlockTable], folder: Path
) -> tuple[float, list[float]]:
    """Return the dense network's latency in ms, and how much slower each dense stack is now than in its table.

    Tables are measured at another time, perhaps on another day, when the machine had another speed.
    """
    target = writer.target
    file = write_network(network, network.module, target, folder / "network")
    sample = {name: tensor[:1].numpy() for name, tensor in network.inputs.items()}
    dense_ms, scales = 0.0, []
    for number, measured in enumerate(tables):
        stack, inputs = writer.write(measured.kind, {}, target.settings.depth, folder / f"stack{number}")
        case = target.case(target.settings.anchor_seconds / len(tables))
        files = {"network": (file, sample), "stack": (stack, inputs)}
        samples = measure_each(files, case, [("network", "stack")]).samples_ms
        # All scales refer to the first measurement of the network.
        dense_ms = dense_ms or median(ms for turn in samples["network"] for ms in turn)
        scales.append(dense_ms * paired_ratio(samples["stack"], samples["network"]) / measured.table.dense_ms)
    return dense_ms, scales


def table_key(kind: BlockType, target: Target) -> TableKey:
    """Return what a table of ``kind`` at ``target`` holds for on this machine."""
    machine = environment()
    packages = ["torch", "onnxruntime-gpu" if target.runtime in ("ort-cuda", "ort-tensorrt") else "onnxruntime"]
    if target.runtime == "ort-tensorrt":
        packages.append("tensorrt")
    versions = {name: machine["versions"][name] for name in packages if name in machine["versions"]}
    if target.runtime in BUILDERS:
        versions[target.runtime] = builder_version(target.runtime)
    return {
        "device": torch.cuda.get_device_name() if target.runtime in GPU_RUNTIMES else machine["cpu"],
        "os": machine["os"],
        "threads": target.threads,
        "runtime": target.runtime,
        "versions": {**versions, "optin-deploy": metadata.version("optin-deploy")},
        "precision": target.precision,
        "opset": target.opset,
        "batch_size": target.batch_size,
        "depth": target.settings.depth,
        "block": kind.describe(),
    }
