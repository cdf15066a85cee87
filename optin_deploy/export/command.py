"""Export a network as it is: a checked ONNX file and engines, as plain files or for Triton."""

import re
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from exporters import BUILDERS, build_engine, is_quantized
from exporters.triton_repository import Backend, Engine, model_file, triton_config
from exporters.trt_engine import EngineInfo
from optin_deploy.config.recipe import Recipe
from optin_deploy.config.validation import Layout, check_effects, check_layout
from optin_deploy.data.calibration import Calibration, load_calibration
from optin_deploy.export.engine_parity import check_engine_parity, is_checkable, why_unchecked
from optin_deploy.export.engines import EngineRequest, engine_config, requested_engines, timing_cache
from optin_deploy.export.onnx_file import Parity, require_parity, write_onnx
from optin_deploy.export.requirements import check_pooling, check_runtimes
from optin_deploy.models.load import load_recipe_network
from optin_deploy.network import Network
from optin_deploy.utils.atomic_files import atomic_directory
from optin_deploy.utils.paths import check_new
from optin_deploy.utils.progress import Stages

_SUFFIXES: dict[Backend, str] = {"onnxruntime": "onnx", "tensorrt": "tensorrt"}
# Samples that the largest batch of the parity check is drawn from, and those that 8 bits are calibrated on.
_PARITY_SAMPLES, _CALIBRATION_SAMPLES = 16, 288


@dataclass(frozen=True)
class Exported:
    """The result of an export.

    Attributes:
        files: path -> size in bytes.
        parity: of the ONNX file.
        engines: parity of engines, by file name.
        unchecked: why engines were not checked; None where all were.
    """

    files: dict[str, int]
    parity: Parity
    engines: dict[str, Parity] = field(default_factory=dict)
    unchecked: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return the result as JSON-able values."""
        return asdict(self)


@dataclass(frozen=True)
class _Exporter:
    """Writes the checked files of one network."""

    network: Network
    recipe: Recipe
    samples: Calibration
    stages: Stages

    def write_onnx(self, path: Path) -> Parity:
        return write_onnx(self.network, path, self.recipe, self.samples, self.stages)

    def build_engine(self, onnx: Path, path: Path, request: EngineRequest) -> tuple[EngineInfo, Parity]:
        """Build an engine and, where it can be run, check it; GateError where it does not compute what torch does."""
        runtime = request.runtime
        with self.stages.stage(f"build {runtime} engine"):
            config = engine_config(self.recipe, runtime)
            info = build_engine(onnx, path, request.ranges(self.network), config, timing_cache(runtime))
        if not is_checkable(self.recipe, runtime):
            return info, ()
        with self.stages.stage(f"check {runtime} engine"):
            parity = check_engine_parity(self.network, runtime, path, self.recipe, self.samples.held_out)
            return info, require_parity(parity, BUILDERS[runtime].product)


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
        output: "plain": a new folder for `model.onnx` and `model.RUNTIME.engine`; "triton": a model repository, which
            may exist, for the models `NAME_onnx` and `NAME_tensorrt`.
        name: of the models in a repository; made of the model's name when None.
        console: where progress is shown; the standard error stream when None.

    Raises:
        UserError: the user can mend it; GateError: ONNX, or an engine that can be run here, does not compute what torch
            does; ExportError, ProfilingError. No file is left by any of them.
    """
    if "runtimes" not in recipe.model_fields_set:
        # Engines are only built on request.
        recipe = recipe.model_copy(update={"runtimes": ("ort-cpu",)})
    check_layout(recipe, layout, name)
    check_effects(recipe, "export")
    check_runtimes(recipe)
    models = _model_folders(recipe, output, name) if layout == "triton" else {}
    for folder in models.values() or [output]:
        check_new(folder, f"choose another --output{' or --name' if models else ''}")
    with Stages(console or Console(stderr=True), quiet=quiet) as stages:
        exporter = _load(recipe, stages)
        return _export_triton(exporter, models) if models else _export_plain(exporter, output)


def _model_folders(recipe: Recipe, repository: Path, name: str | None) -> dict[Backend, Path]:
    backends: tuple[Backend, ...] = ("onnxruntime", "tensorrt") if requested_engines(recipe) else ("onnxruntime",)
    return {backend: repository / f"{name or default_name(recipe.model)}_{_SUFFIXES[backend]}" for backend in backends}


def _load(recipe: Recipe, stages: Stages) -> _Exporter:
    """Load the network, and inputs to calibrate 8 bits on and to check it on."""
    with stages.checks():
        network = load_recipe_network(recipe)
        if recipe.pooling_in_graph:
            check_pooling(network)
            network = network.with_pooling()
        samples = load_calibration(
            network,
            recipe.calibration,
            column=recipe.calibration_column,
            samples=_CALIBRATION_SAMPLES if is_quantized(recipe.precision) else _PARITY_SAMPLES,
            seed=recipe.seed,
        )
    return _Exporter(network, recipe, samples, stages)


def _export_plain(exporter: _Exporter, output: Path) -> Exported:
    engines: dict[str, Parity] = {}
    with atomic_directory(output) as folder:
        onnx = folder / "model.onnx"
        parity = exporter.write_onnx(onnx)
        for request in requested_engines(exporter.recipe):
            engine = request.file(folder, "model")
            engines[engine.name] = exporter.build_engine(onnx, engine, request)[1]
        return _result(exporter.recipe, {output: folder}, parity, engines)


def _export_triton(exporter: _Exporter, models: Mapping[Backend, Path]) -> Exported:
    recipe, network = exporter.recipe, exporter.network
    engines: dict[str, Parity] = {}
    built: dict[Backend, Engine] = {}
    with ExitStack() as whole:
        folders = {backend: whole.enter_context(atomic_directory(model)) for backend, model in models.items()}
        onnx = model_file(folders["onnxruntime"], "onnxruntime")
        parity = exporter.write_onnx(onnx)
        for request in requested_engines(recipe):
            # A server gets requests of one sample, too.
            served = replace(request, batch_sizes=(1, *request.batch_sizes))
            info, checked = exporter.build_engine(onnx, model_file(folders["tensorrt"], "tensorrt"), served)
            engines[models["tensorrt"].name] = checked
            built["tensorrt"] = Engine(info.builder_version, recipe.version_compatible)
        sample = {name: tuple(tensor.shape) for name, tensor in network.inputs.items()}
        for backend, folder in folders.items():
            name, most = models[backend].name, max(recipe.batch_sizes)
            config = triton_config(name, onnx, most, sample, built.get(backend))
            (folder / "config.pbtxt").write_text(config, encoding="utf-8")
        return _result(recipe, {models[b]: folder for b, folder in folders.items()}, parity, engines)


def _result(recipe: Recipe, folders: Mapping[Path, Path], parity: Parity, engines: Mapping[str, Parity]) -> Exported:
    """Return the result; ``folders`` are temporary folders by the path that each of them gets."""
    files = {
        str(output / file.relative_to(folder)): file.stat().st_size
        for output, folder in folders.items()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
    checked = {name: parity for name, parity in engines.items() if parity}
    return Exported(files, parity, checked, why_unchecked(recipe))


def default_name(model: str) -> str:
    """Return a name for a model repository, made of the model's name or that of the run of its checkpoint."""
    path = Path(model)
    stem = path.parent.name if path.name == "checkpoint" and path.parent.name else path.name
    return re.sub(r"[^A-Za-z0-9_-]+", "_", stem) or "model"
