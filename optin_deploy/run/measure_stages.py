"""The stages of a run after pruning: ONNX files, whether they compute the same, how fast they run, and why."""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from exporters import BUILDERS, OnnxModule, OutputParity, check_engine, runnable_on_cpu
from optin_deploy.analysis.bottlenecks import summarize_breakdown
from optin_deploy.analysis.breakdown import break_down
from optin_deploy.analysis.module_roles import merging_roles, module_roles, narrow_widths, own_flops
from optin_deploy.analysis.results import LayerBreakdown, Unprofiled
from optin_deploy.config.recipe import Recipe
from optin_deploy.evaluation.dataset import Dataset
from optin_deploy.export.engine_parity import check_engine_parity, checkable_engines
from optin_deploy.export.engines import EngineRequest, build_engines, repeat_builds, requested_engines
from optin_deploy.export.onnx_file import check_onnx, export_files
from optin_deploy.export.requirements import is_measurable
from optin_deploy.network import Network
from optin_deploy.report.schema import VARIANTS, Parity, VariantName
from optin_deploy.run import run_directory
from optin_deploy.run.context import RunContext
from optin_deploy.run.run_directory import load_or_compute
from optin_deploy.structure.describe import describe
from optin_deploy.utils.progress import report_progress, track
from profilers import (
    LAYER_RUNTIMES,
    Case,
    Comparison,
    LayerProfile,
    Measurement,
    ProfileConfig,
    ProfilingError,
    Variant,
    compare,
    layer_profile,
    usable_cores,
)

# Time limit of one layer profile; averages over a hundred runs change little after it.
_LAYER_SECONDS = 5.0

Networks = Mapping[VariantName, Network]
Files = Mapping[VariantName, Variant]


@dataclass(frozen=True)
class DeploymentResults:
    """Measurements of the exported files.

    Attributes:
        metric: the labelled data's metric of the pruned ONNX file; None if its precision is that of the networks.
    """

    parity: list[Parity]
    profile: Comparison
    layers: list[LayerBreakdown | Unprofiled]
    metric: float | None


@dataclass(frozen=True)
class _EngineParity:
    """``engine_parity.json``: its rows are for the engines with these SHA-256, by file name."""

    engines: dict[str, str]
    rows: list[Parity]


def export_and_measure(context: RunContext, pruned: Network) -> DeploymentResults:
    """Export both networks, check their files against PyTorch, and measure them."""
    prepared, directory, stages = context.prepared, context.directory, context.stages
    networks: Networks = {"dense": prepared.deployed(prepared.network), "pruned": prepared.deployed(pruned)}
    # Programs for the torch runtimes exist only as long as they are measured.
    with TemporaryDirectory(prefix="optin-deploy-") as temporary:
        with stages.stage("export ONNX"):
            files: Files = {name: _export(context, networks, name, Path(temporary)) for name in track(VARIANTS)}
        with stages.stage("check parity"):
            path = directory / "parity.json"
            parity = load_or_compute(path, list[Parity], _check_onnx_files, context, networks, files)
        files = _with_engines(context, networks, files)
        parity += _check_engines(context, networks)
        with stages.stage("measure"):
            profile = _profile(context, networks, files)
        with stages.stage("profile layers"):
            path = directory / "layers.json"
            kind = list[LayerBreakdown | Unprofiled]
            layers = load_or_compute(path, kind, _break_down_layers, context, networks, files, profile.measurements)
        metric = _evaluate(context, networks["pruned"], files["pruned"].onnx)
    return DeploymentResults(parity, profile, layers, metric)


def _export(context: RunContext, networks: Networks, name: VariantName, programs: Path) -> Variant:
    """Export a network to the run's directory, where an ONNX file of an earlier try is kept."""
    program = programs / f"{name}.pt2"
    files = Variant(context.directory / f"{name}.onnx", program)
    is_kept = files.onnx.is_file()
    if is_kept:
        run_directory.keep(files.onnx)
    with nullcontext() if is_kept else run_directory.recording(files.onnx):
        export_files(networks[name], files.onnx, program, context.recipe, context.prepared.calibration.batches)
    return files


def _evaluate(context: RunContext, network: Network, onnx: Path) -> float | None:
    """Return the labelled data's metric of the pruned ONNX file; None without data, and if it computes in float32."""
    dataset, precision = context.prepared.dataset, context.recipe.precision
    if dataset is None or precision in ("fp32", "tf32"):
        return None
    with context.stages.stage(f"evaluate in {precision}"):
        path = context.directory / "deployed.json"
        metrics = load_or_compute(path, dict[str, float], _measure_onnx, context.recipe, network, onnx, dataset)
        return metrics[precision]


def _measure_onnx(recipe: Recipe, network: Network, onnx: Path, dataset: Dataset) -> dict[str, float]:
    with runnable_on_cpu(onnx, recipe.precision) as file:
        return {recipe.precision: dataset.measure(OnnxModule(file, network.outputs, recipe.threads))}


def _check_onnx_files(context: RunContext, networks: Networks, files: Files) -> list[Parity]:
    rows = []
    for name, network in track(networks.items()):
        parity = check_onnx(network, files[name].onnx, context.prepared.calibration.held_out, context.recipe)
        rows += _parity_rows(name, "ort-cpu", parity)
    return rows


def _parity_rows(variant: VariantName, runtime: str, parity: Sequence[OutputParity]) -> list[Parity]:
    return [
        Parity(
            variant=variant,
            runtime=runtime,
            output=p.output,
            max_abs_error=p.max_abs_error,
            max_abs_reference=p.max_abs_reference,
            tolerance=p.tolerance,
            passed=p.passed,
            samples=p.samples,
            near_ties=p.near_ties,
        )
        for p in parity
    ]


def _with_engines(context: RunContext, networks: Networks, files: Files) -> Files:
    """Build the engines that the recipe asks for, and return the files with them."""
    if not requested_engines(context.recipe):
        return files
    with context.stages.stage("build engines"):
        engines = build_engines(context.recipe, {name: networks[name] for name in VARIANTS}, context.directory)
    return {name: replace(variant, engines=engines[name]) for name, variant in files.items()}


def _check_engines(context: RunContext, networks: Networks) -> list[Parity]:
    """Check the engines that can run here; again if an engine has been built anew since."""
    engines = checkable_engines(context.recipe)
    if not engines:
        return []
    files = {engine.file(context.directory, name): (engine, name) for engine in engines for name in networks}
    hashes = {file.name: check_engine(file).engine_sha256 for file in files}
    path = context.directory / "engine_parity.json"
    if path.is_file() and run_directory.read_json(path, _EngineParity).engines != hashes:
        path.unlink()
    with context.stages.stage("check engines"):
        return load_or_compute(path, _EngineParity, _run_engines, context, networks, files, hashes).rows


def _run_engines(
    context: RunContext,
    networks: Networks,
    files: Mapping[Path, tuple[EngineRequest, VariantName]],
    hashes: dict[str, str],
) -> _EngineParity:
    rows = []
    for file, (engine, name) in track(files.items()):
        held_out = context.prepared.calibration.held_out
        parity = check_engine_parity(networks[name], engine.runtime, file, context.recipe, held_out)
        rows += _parity_rows(name, engine.runtime, parity)
    return _EngineParity(hashes, rows)


def _profile(context: RunContext, networks: Networks, files: Files) -> Comparison:
    """Measure all runtimes that have a device here; again if there are more of them than in an earlier try."""
    runtimes = tuple(r for r in context.recipe.measured_runtimes if is_measurable(r))
    if not runtimes:
        return Comparison((), {}, {})
    path = context.directory / "profile.json"
    if path.is_file():
        measured = {m.runtime for m in run_directory.read_json(path, Comparison).measurements}
        if not set(runtimes) <= measured:
            path.unlink()
            (context.directory / "layers.json").unlink(missing_ok=True)
    return load_or_compute(path, Comparison, _measure, context, networks, files, runtimes)


def _measure(context: RunContext, networks: Networks, files: Files, runtimes: tuple[str, ...]) -> Comparison:
    recipe = context.recipe
    config = ProfileConfig(
        runtimes=runtimes,
        batch_sizes=recipe.measured_batch_sizes,
        threads=recipe.threads,
        seconds=recipe.profile_seconds,
        seed=recipe.seed,
        tf32=recipe.precision == "tf32",
    )
    sample = networks["dense"].sample_arrays()
    with TemporaryDirectory(prefix="optin-builds-") as folder:
        dense, pruned = (_build_again(files[name], recipe, Path(folder)) for name in VARIANTS)
        return compare(dense, pruned, sample, config, lambda done, _: report_progress(done))


def _build_again(variant: Variant, recipe: Recipe, folder: Path) -> Variant:
    """Return the variant with several builds of each engine that can be measured.

    Builds differ by the tactics that the builder took, and the luck of one build would count as the network's.
    """
    measured = {case: file for case in variant.engines if is_measurable(case[0]) and (file := variant.file(*case))}
    # One engine may serve several batch sizes.
    builds = {
        file: repeat_builds(file, variant.onnx, recipe.engine_builds, folder)
        for file in dict.fromkeys(measured.values())
    }
    return replace(variant, engines={**variant.engines, **{case: builds[file] for case, file in measured.items()}})


def _break_down_layers(
    context: RunContext, networks: Networks, files: Files, measurements: Sequence[Measurement]
) -> list[LayerBreakdown | Unprofiled]:
    """Break the latency down by layer, for each runtime at the batch size of its headline figure."""
    dense, pruned = networks["dense"], networks["pruned"]
    roles = module_roles(dense.module, context.space.structure)
    merging = merging_roles(pruned.module)
    flops = (own_flops(dense.module, dense.inputs, roles), own_flops(pruned.module, pruned.inputs, roles | merging))
    roles |= merging
    widths = narrow_widths(describe(pruned.module, pruned.inputs))
    batch_size = context.recipe.headline_batch_size
    cases = [m for m in measurements if m.runtime in LAYER_RUNTIMES and m.batch_size == batch_size]
    breakdowns: list[LayerBreakdown | Unprofiled] = []
    for case in track(cases):
        try:
            before, after = (_profile_layers(context, dense, files[name], case, list(roles)) for name in VARIANTS)
        except ProfilingError as error:
            # An engine that runs may still not be profiled; the rest of the report does not need it.
            if case.runtime not in BUILDERS:
                raise
            breakdowns.append(Unprofiled(case.runtime, str(error)))
            continue
        p50s_ms = (case.summary.dense.p50_ms, case.summary.pruned.p50_ms)
        breakdowns.append(summarize_breakdown(break_down(before, after, flops, roles, p50s_ms), widths))
    return breakdowns


def _profile_layers(
    context: RunContext, network: Network, variant: Variant, case: Measurement, modules: list[str]
) -> LayerProfile:
    recipe, file = context.recipe, variant.file(case.runtime, case.batch_size)
    if file is None:
        raise ProfilingError(f"there is no file for {case.runtime} at batch size {case.batch_size}")
    settings = Case(
        case.runtime,
        case.batch_size,
        recipe.threads or usable_cores().physical,
        min(_LAYER_SECONDS, recipe.profile_seconds),
        recipe.seed,
        tf32=recipe.precision == "tf32",
    )
    sample = network.sample_arrays()
    return layer_profile(settings, file, sample, modules, onnx=variant.onnx)
