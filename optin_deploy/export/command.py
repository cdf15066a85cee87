"""Exporting a network as it is: checked ONNX, engines where asked for, as plain files or for Triton."""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from exporters import (
    BUILDERS,
    OutputParity,
    build_engine,
    input_ranges,
    is_quantized,
)
from exporters.triton_repository import Backend, Engine, model_file, triton_config
from exporters.trt_engine import EngineInfo
from optin_deploy.config.recipe import Layout, Recipe, check_engine_options, check_layout
from optin_deploy.data.calibration import Calibration, load_calibration
from optin_deploy.export.engine_parity import check_engine_parity, is_checkable, unchecked
from optin_deploy.export.engines import Wanted, engine_config, timing_cache, wanted_engines
from optin_deploy.export.onnx_file import _passed, parity_batches, parity_tolerance, write_onnx
from optin_deploy.export.requirements import check_pooling, check_runtimes
from optin_deploy.models.load import load_network
from optin_deploy.network import Network
from optin_deploy.utils.atomic_files import whole_directory
from optin_deploy.utils.paths import check_new
from optin_deploy.utils.progress import Stages

Parity = tuple[OutputParity, ...]
Checked = tuple[Parity, dict[str, Parity]]
"""How far the ONNX file is from torch, and how far the engines are, by name."""
_SUFFIXES: dict[Backend, str] = {"onnxruntime": "onnx", "tensorrt": "tensorrt"}
# The largest batch that parity is checked at, and some to draw from; and what 8 bits are calibrated on.
_SAMPLES, _CALIBRATING = 16, 288


@dataclass(frozen=True)
class Exported:
    """What an export has written, each path with its size in bytes, how far ONNX is from torch, and how far the engines
    are, by file name; ``unchecked`` says why there are none of these."""

    files: dict[str, int]
    parity: Parity
    engines: dict[str, Parity] = field(default_factory=dict)
    unchecked: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it."""
        engines = {name: [asdict(p) for p in parity] for name, parity in self.engines.items()}
        parity = [asdict(p) for p in self.parity]
        return {"files": self.files, "parity": parity, "engines": engines, "unchecked": self.unchecked}


def export_network(
    recipe: Recipe,
    output: Path,
    layout: Layout = "plain",
    name: str | None = None,
    *,
    console: Console | None = None,
    quiet: bool = False,
) -> Exported:
    """Write the network that ``recipe`` names: one ONNX file, and an engine for each of its runtimes that takes one.

    Args:
        output: "plain": a new folder for `model.onnx` and `model.RUNTIME.engine`; "triton": a model repository, new or
            not, that gets the models `NAME_onnx` and `NAME_tensorrt`.
        name: of the models in a repository; made of the model's when None.
        console: where progress goes; the standard error stream when None.

    Raises:
        UserError: something to be fixed by the user; GateError: ONNX, or an engine that can be run here, does not
            compute what torch does; ExportError, ProfilingError. Nothing is left behind by any of them.
    """
    if "runtimes" not in recipe.model_fields_set:
        # Engines are built where they are asked for.
        recipe = recipe.model_copy(update={"runtimes": ("ort-cpu",)})
    check_layout(recipe, layout, name)
    check_engine_options(recipe)
    check_runtimes(recipe)
    folders: dict[Backend, Path] = {}
    if layout == "triton":
        backends: tuple[Backend, ...] = ("onnxruntime", "tensorrt") if wanted_engines(recipe) else ("onnxruntime",)
        folders = {b: output / f"{name or default_name(recipe.model)}_{_SUFFIXES[b]}" for b in backends}
    for folder in folders.values() or [output]:
        check_new(folder, f"choose another --output{' or --name' if folders else ''}")
    with Stages(console or Console(stderr=True), quiet=quiet) as stages:
        network, samples = _load(recipe, stages)
        with ExitStack() as whole:
            if layout == "plain":
                places = {output: whole.enter_context(whole_directory(output))}
                parity, engines = _plain(network, places[output], recipe, samples, stages)
            else:
                places = {folder: whole.enter_context(whole_directory(folder)) for folder in folders.values()}
                inside = {backend: places[folder] for backend, folder in folders.items()}
                parity, engines = _triton(network, inside, folders, recipe, samples, stages)
            files = {str(f / part): size for f, place in places.items() for part, size in _sizes(place).items()}
    return Exported(files, parity, engines, unchecked(recipe))


def _load(recipe: Recipe, stages: Stages) -> tuple[Network, Calibration]:
    """The network, and inputs to calibrate 8 bits on and to check it on."""
    with stages.checks():
        network = load_network(
            recipe.model,
            weights=recipe.weights,
            image_size=recipe.image_size,
            sequence_length=recipe.sequence_length,
            max_text_length=recipe.max_text_length,
            seed=recipe.seed,
        )
        if recipe.pooling_in_graph:
            check_pooling(network)
            network = network.with_pooling()
        samples = load_calibration(
            network,
            recipe.calibration,
            column=recipe.calibration_column,
            samples=_CALIBRATING if is_quantized(recipe.precision) else _SAMPLES,
            seed=recipe.seed,
        )
    return network, samples


def _plain(network: Network, place: Path, recipe: Recipe, samples: Calibration, stages: Stages) -> Checked:
    onnx = place / "model.onnx"
    parity, engines = write_onnx(network, onnx, recipe, samples, stages), {}
    for each in wanted_engines(recipe):
        engine = each.file(place, "model")
        engines[engine.name] = _engine(network, onnx, engine, each, recipe, samples, stages)[1]
    return parity, {name: found for name, found in engines.items() if found}


def _triton(
    network: Network,
    places: Mapping[Backend, Path],
    folders: Mapping[Backend, Path],
    recipe: Recipe,
    samples: Calibration,
    stages: Stages,
) -> Checked:
    onnx, built = model_file(places["onnxruntime"], "onnxruntime"), None
    parity, engines = write_onnx(network, onnx, recipe, samples, stages), {}
    for each in wanted_engines(recipe):
        engine = model_file(places["tensorrt"], "tensorrt")
        # A server gets requests of one sample, whatever it is measured at.
        served = replace(each, batch_sizes=(1, *each.batch_sizes))
        info, found = _engine(network, onnx, engine, served, recipe, samples, stages)
        engines[folders["tensorrt"].name] = found
        built = Engine(info.builder_version, recipe.version_compatible)
    sample = {name: tuple(tensor.shape) for name, tensor in network.inputs.items()}
    for backend, place in places.items():
        served_engine = built if backend == "tensorrt" else None
        text = triton_config(folders[backend].name, onnx, max(recipe.batch_sizes), sample, served_engine)
        (place / "config.pbtxt").write_text(text, encoding="utf-8")
    return parity, {name: found for name, found in engines.items() if found}


def _engine(
    network: Network, onnx: Path, path: Path, each: Wanted, recipe: Recipe, samples: Calibration, stages: Stages
) -> tuple[EngineInfo, Parity]:
    """Build an engine and, where it can be run, check it; GateError where it is not what torch computes."""
    shapes = {name: tuple(tensor.shape) for name, tensor in network.inputs.items()}
    ranges = input_ranges(shapes, network.dynamic_axes, each.batch_sizes, each.best, static=each.static)
    with stages.stage(f"build {each.runtime} engine"):
        info = build_engine(onnx, path, ranges, engine_config(recipe, each.runtime), timing_cache(each.runtime))
    if not is_checkable(recipe, each.runtime):
        return info, ()
    with stages.stage(f"check {each.runtime} engine"):
        batches, tolerance = parity_batches(network, samples.held_out, recipe.precision), parity_tolerance(recipe)
        found = check_engine_parity(network, each.runtime, path, batches, tolerance, recipe.threads)
        return info, _passed(found, f" with {BUILDERS[each.runtime].product}")


def _sizes(place: Path) -> dict[Path, int]:
    return {file.relative_to(place): file.stat().st_size for file in sorted(place.rglob("*")) if file.is_file()}


def default_name(model: str) -> str:
    """A name for a model repository out of what the model is called, or the run that its checkpoint stands in."""
    path = Path(model)
    stem = path.parent.name if path.name == "checkpoint" and path.parent.name else path.name
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem) or "model"
