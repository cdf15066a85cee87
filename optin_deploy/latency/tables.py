"""Measuring latency tables of a network's blocks, and the dense network on the same scale."""

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from exporters import (
    BUILDERS,
    EngineConfig,
    Precision,
    build_engine,
    in_precision,
    input_ranges,
    onnx_in_precision,
    save_program,
    trace,
)
from exporters.trt_engine import builder_version
from optin_deploy.config.recipe import Recipe
from optin_deploy.export.engines import timing_cache
from optin_deploy.latency.block_stacks import BlockType, block_types, part_name, stack
from optin_deploy.latency.costs import LatencyCosts, latency_costs
from optin_deploy.network import Network
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.utils.progress import report_progress, track
from profilers import (
    GPU_RUNTIMES,
    RUNTIMES,
    Case,
    environment,
    loads_for,
    measure_each,
    measure_files,
    usable_cores,
)
from profilers.latency_table import LatencyTable, Row, check_cache, read_table, save_table, table_file
from profilers.stats import paired_ratio

_SHALLOW, _DEPTH = 1, 3
# Sizes measured per part: enough to see a staircase, few enough for a minute.
_MOST_SIZES = 12
_SIZE_STEP = 16
_HEAD_SIZES, _WIDTHS = 3, 4
# Beside the even sizes, some within one step, to find stairs that are narrower than it.
_WITHIN = (16, 32, 48, 64, 96)
_ANCHOR_SECONDS = 10.0
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Target:
    """Where a latency holds: runtime, batch size, CPU threads; ``seconds`` is the time limit of one table."""

    runtime: str
    batch_size: int
    threads: int
    opset: int = 20
    seconds: float = 60.0
    seed: int = 0
    precision: Precision = "fp32"

    def case(self, seconds: float, compared: Iterable[Path] = ()) -> Case:
        """What to measure for so long, or until ratios have settled to a hundredth; files that are ``compared`` are
        loaded as often as `profilers.loads_for` says."""
        return Case(
            self.runtime,
            self.batch_size,
            self.threads,
            seconds,
            self.seed,
            tolerance=0.01,
            loads=loads_for(self.runtime, compared),
            tf32=self.precision == "tf32",
        )


@dataclass(frozen=True)
class Measured:
    """The latency of a network as a cost, and the tables behind it; ``cached`` says for each whether it was there."""

    costs: LatencyCosts
    tables: tuple[LatencyTable, ...]
    types: tuple[BlockType, ...]
    cached: tuple[bool, ...]


def export(
    module: nn.Module, inputs: Mapping[str, Tensor], axes: Mapping[str, Mapping[int, str]], target: Target, stem: Path
) -> Path:
    """Write the file that the target's runtime runs, beside ``stem``; ``module`` gives a tensor or a tuple of them."""
    program = in_precision(trace(module, inputs, axes), target.precision, target.opset)
    if RUNTIMES[target.runtime] == "program":
        path = stem.with_suffix(".pt2")
        save_program(program, path)
        return path
    path = stem.with_suffix(".onnx")
    names = [f"y{i}" for i in range(len(program.graph_signature.user_outputs))]
    # Ranges do not change what 8 bits take: the sample is calibration enough.
    onnx_in_precision(
        program, path, target.precision, [inputs], output_names=names, dynamic_axes=axes, opset=target.opset
    )
    if RUNTIMES[target.runtime] == "onnx":
        return path
    shapes, size, engine = (
        {n: tuple(t.shape) for n, t in inputs.items()},
        target.batch_size,
        stem.with_suffix(".engine"),
    )
    ranges = input_ranges(shapes, axes, (size,), size, static=True)
    build_engine(
        path,
        engine,
        ranges,
        EngineConfig(target.runtime, tf32=target.precision == "tf32"),
        timing_cache(target.runtime),
    )
    return engine


def export_network(network: Network, module: nn.Module, target: Target, stem: Path) -> Path:
    """`export` of ``module`` in the place of the network's."""
    return export(network.tensor_outputs(module), network.inputs, network.dynamic_axes, target, stem)


def measure_network(network: Network, structure: Structure, target: Target) -> Measured:
    """Tables of all types of blocks, measured or from the cache, and the dense network beside their dense stacks."""
    module, inputs = network.module, network.inputs
    types = block_types(module, structure, inputs)
    tables, cached = [], []
    for kind in track(types):
        setting = _setting(kind, target)
        table = read_table(setting)
        cached.append(table is not None)
        if table is None:
            check_cache()
            table = _measure_table(module, structure, kind, target, setting)
            logger.info("latency table of %d × %s: measured, kept as %s", *_counted(kind), save_table(table))
        else:
            logger.info("latency table of %d × %s: from the cache, %s", *_counted(kind), table_file(setting))
        tables.append(table)
    with TemporaryDirectory(prefix="optin-anchor-") as folder:
        dense_ms, scales = _anchor(network, structure, types, tables, target, Path(folder))
    costs = latency_costs(structure, list(zip(types, tables, strict=True)), dense_ms, scales)
    return Measured(costs, tuple(tables), tuple(types), tuple(cached))


def _counted(kind: BlockType) -> tuple[int, str]:
    return len(kind.blocks), kind.class_name


def _measure_table(
    module: nn.Module,
    structure: Structure,
    kind: BlockType,
    target: Target,
    setting: dict[str, Any],
) -> LatencyTable:
    """All sizes of one type of block as stacks, interleaved in one process; where in memory a stack happens to lie
    makes it some percent faster or slower, so each is loaded as often as `profilers.loads_for` says."""
    points = [
        (part_name(kind.blocks[0], g), units, width, sizes)
        for g in kind.groups[0]
        if g.outer is None
        for units, width, sizes in _points(structure, g)
    ]
    with TemporaryDirectory(prefix="optin-table-") as name:
        folder = Path(name)
        stacks: dict[str, tuple[dict[str, int], int]] = {"shallow": ({}, _SHALLOW), "dense": ({}, _DEPTH)}
        stacks |= {f"size{i}": (sizes, _DEPTH) for i, (*_, sizes) in enumerate(points)}
        files: dict[str, Path] = {}
        sample: dict[str, np.ndarray] = {}
        for label, (sizes, depth) in track(stacks.items()):
            files[label], sample = _export_stack(module, structure, kind, sizes, depth, target, folder / label)
        case = target.case(target.seconds, files.values())
        found = measure_files(files, sample, case, (), report_progress)
        samples = found.samples_ms
    rows = [Row(part, units, width, samples[f"size{i}"]) for i, (part, units, width, _) in enumerate(points)]
    # All units at full width are the dense stack itself.
    for g in kind.groups[0]:
        if g.outer is None:
            width = structure.inner(g.name)
            rows.append(Row(part_name(kind.blocks[0], g), g.units, width.units if width else None, samples["dense"]))
    depths = {_SHALLOW: samples["shallow"], _DEPTH: samples["dense"]}
    return LatencyTable(setting, _DEPTH, depths, tuple(rows), found.loads)


def _export_stack(
    module: nn.Module,
    structure: Structure,
    kind: BlockType,
    sizes: Mapping[str, int],
    depth: int,
    target: Target,
    stem: Path,
) -> tuple[Path, dict[str, np.ndarray]]:
    made, inputs = stack(module, structure, kind, sizes, depth)
    path = export(made, inputs, {name: {0: "batch"} for name in inputs}, target, stem)
    return path, {name: t[:1].numpy() for name, t in inputs.items()}


def _points(structure: Structure, group: Group) -> list[tuple[int, int | None, dict[str, int]]]:
    """Sizes of a group to be measured, all but the whole: units, width, and the plan's sizes."""
    width = structure.inner(group.name)
    if width is None:
        sizes = head_sizes(group.units, group.units) if group.kind == "head" else even_sizes(group.units)
        return [(n, None, {group.name: n}) for n in _possible(sizes, group) if n < group.units]
    points: list[tuple[int, int | None, dict[str, int]]] = [(0, width.units, {group.name: 0})]
    for n in _possible(head_sizes(group.units, _HEAD_SIZES), group)[1:]:
        for w in head_sizes(width.units, _WIDTHS)[1:]:
            if (n, w) != (group.units, width.units):
                points.append((n, w, {group.name: n, width.name: w}))
    return points


def _possible(sizes: Sequence[int], group: Group) -> list[int]:
    """The sizes, rounded down to what units that leave together allow."""
    return sorted({n - n % group.step for n in sizes})


def even_sizes(units: int) -> list[int]:
    """From none to all, in even steps that are multiples of 16 where there is room, and some sizes within one step."""
    step = max(1, math.ceil(units / _MOST_SIZES))
    if units >= 4 * _SIZE_STEP:
        step = _SIZE_STEP * math.ceil(step / _SIZE_STEP)
    middle = step * (units // step // 2)
    within = [middle + w for w in _WITHIN if w < step]
    return sorted({0, *range(step, units, step), *within, units})


def head_sizes(units: int, steps: int) -> list[int]:
    """0 and about ``steps`` evenly spaced numbers up to ``units``."""
    return sorted({0, *(round(units * i / steps) for i in range(1, steps + 1))})


def _anchor(
    network: Network,
    structure: Structure,
    types: list[BlockType],
    tables: list[LatencyTable],
    target: Target,
    folder: Path,
) -> tuple[float, list[float]]:
    """The dense network's latency, and how much slower each type's dense stack is now than in its table.

    Tables are measured at another time, perhaps another day: machines change their pace in between.
    """
    file = export_network(network, network.module, target, folder / "network")
    sample = {name: t[:1].numpy() for name, t in network.inputs.items()}
    dense_ms, scales = 0.0, []
    for number, (kind, table) in enumerate(zip(types, tables, strict=True)):
        stacked, inputs = _export_stack(network.module, structure, kind, {}, _DEPTH, target, folder / f"stack{number}")
        case = target.case(_ANCHOR_SECONDS / len(types))
        pairs = [("network", "stack")]
        samples = measure_each({"network": (file, sample), "stack": (stacked, inputs)}, case, pairs)
        network_ms, stack_ms = samples.samples_ms["network"], samples.samples_ms["stack"]
        # One scale: that of the first measurement of the network.
        dense_ms = dense_ms or median(value for turn in network_ms for value in turn)
        scales.append(dense_ms * paired_ratio(stack_ms, network_ms) / table.dense_ms)
    return dense_ms, scales


def _setting(kind: BlockType, target: Target) -> dict[str, Any]:
    """What a table holds for."""
    found = environment()
    cuda = target.runtime in GPU_RUNTIMES
    packages = ["torch", "onnxruntime-gpu" if target.runtime in ("ort-cuda", "ort-tensorrt") else "onnxruntime"]
    if target.runtime == "ort-tensorrt":
        packages.append("tensorrt")
    versions = {name: found["versions"][name] for name in packages if name in found["versions"]}
    if target.runtime in BUILDERS:
        versions[target.runtime] = builder_version(target.runtime)
    return {
        "device": torch.cuda.get_device_name() if cuda else found["cpu"],
        "os": found["os"],
        "threads": target.threads,
        "runtime": target.runtime,
        "versions": {**versions, "optin-deploy": metadata.version("optin-deploy")},
        "precision": target.precision,
        "opset": target.opset,
        "batch_size": target.batch_size,
        "depth": _DEPTH,
        "block": kind.describe(),
    }


def target_of(recipe: Recipe) -> Target:
    """Where a latency budget of ``recipe`` holds, or would."""
    threads = recipe.threads or usable_cores().physical
    return Target(
        recipe.target_runtime,
        recipe.target_batch_size,
        threads,
        recipe.opset,
        recipe.table_seconds,
        recipe.seed,
        recipe.precision,
    )
