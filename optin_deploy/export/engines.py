"""The engines of a run: for every runtime that takes engines, of both networks, as the recipe says."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from exporters import BUILDERS, EngineConfig, ExportError, build_engine, check_engine, input_ranges
from exporters.trt_engine import Range, builder_version, device_name
from optin_deploy.config.recipe import Recipe
from optin_deploy.network import Network
from optin_deploy.utils.atomic_files import tell_kept, tell_written
from optin_deploy.utils.progress import track
from profilers.latency_table import cache_folder


@dataclass(frozen=True)
class Wanted:
    """One engine to be had: the batch sizes that it takes, and the one it is fastest at."""

    runtime: str
    batch_sizes: tuple[int, ...]
    best: int
    static: bool

    def file(self, directory: Path, variant: str) -> Path:
        """Where it is kept. The runtime stands in the name: engines of one product are none of another's."""
        size = f".b{self.best}" if self.static else ""
        return directory / f"{variant}.{self.runtime}{size}.engine"


def wanted_engines(recipe: Recipe) -> list[Wanted]:
    """The engines of each network: one for all batch sizes, or one for each."""
    sizes = recipe.measured_batch_sizes
    found = []
    for runtime in recipe.measured_runtimes:
        if runtime in BUILDERS and recipe.static:
            found += [Wanted(runtime, (size,), size, True) for size in sizes]
        elif runtime in BUILDERS:
            found.append(Wanted(runtime, sizes, recipe.headline_batch_size, False))
    return found


def engine_config(recipe: Recipe, runtime: str) -> EngineConfig:
    """How engines of that runtime are built."""
    return EngineConfig(
        builder=runtime,
        optimization_level=recipe.builder_optimization_level,
        workspace_mib=recipe.workspace_mib,
        refittable=recipe.refittable,
        weight_stripped=recipe.weight_stripped,
        version_compatible=recipe.version_compatible,
        tf32=recipe.precision == "tf32",
        sparse_weights=recipe.sparsity is not None,
    )


def build_engines(
    recipe: Recipe, networks: Mapping[str, Network], directory: Path
) -> dict[str, dict[tuple[str, int], Path]]:
    """Build what is not there yet from the ONNX files in ``directory``.

    Returns:
        by variant, the engine for each runtime and batch size.
    """
    engines: dict[str, dict[tuple[str, int], Path]] = {name: {} for name in networks}
    for each in track(wanted_engines(recipe)):
        config = engine_config(recipe, each.runtime)
        for name, network in track(networks.items()):
            file, onnx = each.file(directory, name), directory / f"{name}.onnx"
            shapes = {n: tuple(t.shape) for n, t in network.inputs.items()}
            ranges = input_ranges(shapes, network.dynamic_axes, each.batch_sizes, each.best, static=each.static)
            if not _is_built(file, onnx, config, ranges):
                build_engine(onnx, file, ranges, config, timing_cache(each.runtime))
                tell_written(file)
            else:
                tell_kept(file)
            engines[name] |= {(each.runtime, size): file for size in each.batch_sizes}
    return engines


def more_builds(engine: Path, onnx: Path, count: int, folder: Path) -> tuple[Path, ...]:
    """``engine`` and so many builds of the same, ``count`` in all, in ``folder``.

    They are built without the cache of earlier timings, by which they would take the same tactics.
    """
    info = check_engine(engine, onnx)
    again = tuple(folder / f"{engine.stem}.{number}.engine" for number in range(2, count + 1))
    for file in again:
        build_engine(onnx, file, info.inputs, info.config)
    return (engine, *again)


def timing_cache(runtime: str) -> Path:
    """Where builds of that product and version keep what they have measured; a file for each GPU model, since a builder
    refuses another model's and then saves nothing."""
    device = re.sub(r"[^A-Za-z0-9.]+", "-", device_name() or "no-gpu").strip("-")
    return cache_folder().with_name("engines") / f"{runtime}-{builder_version(runtime)}-{device}.cache"


def _is_built(file: Path, onnx: Path, config: EngineConfig, ranges: Mapping[str, Range]) -> bool:
    try:
        info = check_engine(file, onnx)
    except ExportError:
        return False
    return info.config == config and info.inputs == dict(ranges)
