"""Build the engines of a run: for every runtime that takes engines, of both networks, by the recipe's options."""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from exporters import BUILDERS, EngineConfig, ExportError, build_engine, check_engine, input_ranges
from exporters.shapes import Range
from exporters.trt_engine import builder_version, device_name
from optin_deploy.config.recipe import Recipe
from optin_deploy.network import Network
from optin_deploy.utils.atomic_files import log_kept, log_written
from optin_deploy.utils.progress import track
from profilers.table_cache import cache_folder


@dataclass(frozen=True)
class EngineRequest:
    """One engine to build: the batch sizes that it takes, and the one that it is fastest at."""

    runtime: str
    batch_sizes: tuple[int, ...]
    best: int
    static: bool

    def file(self, directory: Path, variant: str) -> Path:
        """Return the engine's path. The runtime is in its name: no other product runs the engine."""
        size = f".b{self.best}" if self.static else ""
        return directory / f"{variant}.{self.runtime}{size}.engine"

    def ranges(self, network: Network) -> dict[str, Range]:
        """Return the shapes that an engine of ``network`` takes."""
        shapes = {name: tuple(tensor.shape) for name, tensor in network.inputs.items()}
        return input_ranges(shapes, network.dynamic_axes, self.batch_sizes, self.best, static=self.static)


def requested_engines(recipe: Recipe) -> list[EngineRequest]:
    """Return the engines of each network: one per runtime for all batch sizes, or one per batch size if static."""
    sizes, requests = recipe.measured_batch_sizes, []
    for runtime in recipe.measured_runtimes:
        if runtime in BUILDERS and recipe.static:
            requests += [EngineRequest(runtime, (size,), size, True) for size in sizes]
        elif runtime in BUILDERS:
            requests.append(EngineRequest(runtime, sizes, recipe.headline_batch_size, False))
    return requests


def engine_config(recipe: Recipe, runtime: str) -> EngineConfig:
    """Return the build options of engines for ``runtime``."""
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
    """Build the engines that are missing or outdated, from the ONNX files in ``directory``.

    Returns:
        For each variant, the engine of each runtime and batch size.
    """
    engines: dict[str, dict[tuple[str, int], Path]] = {name: {} for name in networks}
    for request in track(requested_engines(recipe)):
        config = engine_config(recipe, request.runtime)
        for name, network in track(networks.items()):
            file, onnx, ranges = request.file(directory, name), directory / f"{name}.onnx", request.ranges(network)
            if _is_built(file, onnx, config, ranges):
                log_kept(file)
            else:
                build_engine(onnx, file, ranges, config, timing_cache(request.runtime))
                log_written(file)
            engines[name] |= {(request.runtime, size): file for size in request.batch_sizes}
    return engines


def repeat_builds(engine: Path, onnx: Path, count: int, folder: Path) -> tuple[Path, ...]:
    """Return ``engine`` and further builds of it in ``folder``, ``count`` in all.

    They are built without the cache of earlier timings, which would lead to the same tactics.
    """
    info = check_engine(engine, onnx)
    repeated = tuple(folder / f"{engine.stem}.{number}.engine" for number in range(2, count + 1))
    for file in repeated:
        build_engine(onnx, file, info.inputs, info.config)
    return (engine, *repeated)


def timing_cache(runtime: str) -> Path:
    """Return the file in which builds of that product and version keep their measurements.

    There is a file for each GPU model: a builder refuses another model's and then saves nothing.
    """
    device = re.sub(r"[^A-Za-z0-9.]+", "-", device_name() or "no-gpu").strip("-")
    return cache_folder().with_name("engines") / f"{runtime}-{builder_version(runtime)}-{device}.cache"


def _is_built(file: Path, onnx: Path, config: EngineConfig, ranges: Mapping[str, Range]) -> bool:
    try:
        info = check_engine(file, onnx)
    except ExportError:
        return False
    return info.config == config and info.inputs == dict(ranges)
