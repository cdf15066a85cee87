"""The stages of a run after pruning: ONNX files, whether they compute the same, how fast they run, and why."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from exporters import (
    BUILDERS,
    OnnxModule,
    check_engine,
    runnable_on_cpu,
)
from optin_deploy.analysis.bottlenecks import told
from optin_deploy.analysis.breakdown import account
from optin_deploy.analysis.module_roles import merging_places, narrow_widths, own_flops, places
from optin_deploy.config.recipe import Recipe
from optin_deploy.export.engine_parity import check_engine_parity, checkable_engines
from optin_deploy.export.engines import build_engines, more_builds, wanted_engines
from optin_deploy.export.onnx_file import Batches, Parity, checked, export_files, parity_batches, parity_tolerance
from optin_deploy.export.requirements import is_measurable
from optin_deploy.network import Network
from optin_deploy.run import run_directory
from optin_deploy.run.job import Job
from optin_deploy.run.report_builder import VARIANTS
from optin_deploy.structure.describe import describe
from optin_deploy.utils.progress import Stages, report_progress, track
from profilers import LAYER_RUNTIMES, ProfileConfig, ProfilingError, Variant, compare, layer_profile

# Time limit of one layer profile; averages over a hundred runs move little after it.
_LAYER_SECONDS = 5.0


def export_and_measure(job: Job, small: Network, directory: Path, stages: Stages) -> dict[str, Any]:
    """ONNX files, parity and profile. Programs for the torch runtime live only as long as they are measured."""
    recipe = job.recipe
    with TemporaryDirectory(prefix="optin-deploy-") as temporary:
        variants = {}
        with stages.stage("export ONNX"):
            for name, network in track([*zip(VARIANTS, (job.network, small), strict=True)]):
                program = Path(temporary) / f"{name}.pt2"
                variants[name] = Variant(directory / f"{name}.onnx", program)
                _export_kept(network, variants[name].onnx, program, recipe, job.calibration.batches)
        with stages.stage("check parity"):
            parity = run_directory.kept_json(directory / "parity.json", lambda: _parity(job, small, variants))
        engines = _engines(job, small, directory, stages)
        parity += _engine_parity(job, small, directory, stages)
        variants = {name: replace(v, engines=engines.get(name, {})) for name, v in variants.items()}
        with stages.stage("measure"):
            profile = _kept_profile(job, variants, directory)
        with stages.stage("profile layers"):
            layers = run_directory.kept_json(
                directory / "layers.json",
                lambda: _layers(job, small, variants, profile["measurements"]),
            )
        deployed = _evaluated(job, variants["pruned"].onnx, directory, stages)
    return {"parity": parity, "profile": profile, "layers": layers, "deployed": deployed}


def _export_kept(network: Network, onnx: Path, program: Path, recipe: Recipe, batches: Batches) -> None:
    """`export_files` into a run's directory, where an ONNX file that is there is kept."""
    if onnx.is_file():
        run_directory.keep(onnx)
        export_files(network, onnx, program, recipe, batches)
        return
    with run_directory.recorded(onnx):
        export_files(network, onnx, program, recipe, batches)


def _evaluated(job: Job, onnx: Path, directory: Path, stages: Stages) -> float | None:
    """The labelled set's metric of the pruned ONNX file, where that is of another precision than the module."""
    dataset, recipe, network = job.dataset, job.recipe, job.network
    if dataset is None or recipe.precision in ("fp32", "tf32"):
        return None
    with stages.stage(f"evaluate in {recipe.precision}"):

        def measure() -> dict[str, float]:
            with runnable_on_cpu(onnx, recipe.precision) as file:
                module = OnnxModule(file, network.outputs, recipe.threads)
                return {recipe.precision: dataset.measure(module)}

        return run_directory.kept_json(directory / "deployed.json", measure)[recipe.precision]


def _parity(job: Job, small: Network, variants: Mapping[str, Variant]) -> list[dict[str, Any]]:
    rows = []
    for name, network in track([*zip(VARIANTS, (job.network, small), strict=True)]):
        found = checked(network, variants[name].onnx, job.calibration.held_out, job.recipe)
        rows += _parity_rows(name, "ort-cpu", found)
    return rows


def _parity_rows(variant: str, runtime: str, parity: Parity) -> list[dict[str, Any]]:
    return [
        {
            "variant": variant,
            "runtime": runtime,
            "output": p.output,
            "max_abs_error": p.max_abs_error,
            "max_abs_reference": p.max_abs_reference,
            "tolerance": p.tolerance,
            "passed": p.passed,
            "samples": p.samples,
            "near_ties": p.near_ties,
        }
        for p in parity
    ]


def _engines(job: Job, small: Network, directory: Path, stages: Stages) -> dict[str, dict[tuple[str, int], Path]]:
    wanted = wanted_engines(job.recipe)
    if not wanted:
        return {}
    networks = dict(zip(VARIANTS, (job.network, small), strict=True))
    with stages.stage("build engines"):
        return build_engines(job.recipe, networks, directory)


def _engine_parity(job: Job, small: Network, directory: Path, stages: Stages) -> list[dict[str, Any]]:
    """Rows of the parity gate for the engines that can be run here; checked again where an engine is another one."""
    recipe, networks = job.recipe, (job.network, small)
    wanted = checkable_engines(recipe)
    if not wanted:
        return []
    files = {each.file(directory, name): (each, name) for each in wanted for name in VARIANTS}
    hashes = {file.name: check_engine(file).engine_sha256 for file in files}
    path = directory / "engine_parity.json"
    if path.is_file() and run_directory.read_json(path)["engines"] != hashes:
        path.unlink()
    with stages.stage("check engines"):

        def check() -> dict[str, Any]:
            rows = []
            for file, (each, name) in track(files.items()):
                network = networks[VARIANTS.index(name)]
                batches = parity_batches(network, job.calibration.held_out, recipe.precision)
                threshold = parity_tolerance(recipe)
                found = check_engine_parity(network, each.runtime, file, batches, threshold, recipe.threads)
                rows += _parity_rows(name, each.runtime, found)
            return {"engines": hashes, "rows": rows}

        return run_directory.kept_json(path, check)["rows"]


def _kept_profile(job: Job, variants: Mapping[str, Variant], directory: Path) -> dict[str, Any]:
    """The measurements of all runtimes that there is a device for; made again where there are more of them now."""
    runtimes = tuple(r for r in job.recipe.measured_runtimes if is_measurable(r))
    if not runtimes:
        return {"measurements": [], "protocol": {}}
    path = directory / "profile.json"
    profile = run_directory.kept_json(path, lambda: _profile(job, runtimes, variants))
    if set(runtimes) <= {m["runtime"] for m in profile["measurements"]}:
        return profile
    path.unlink()
    (directory / "layers.json").unlink(missing_ok=True)
    return run_directory.kept_json(path, lambda: _profile(job, runtimes, variants))


def _profile(job: Job, runtimes: tuple[str, ...], variants: Mapping[str, Variant]) -> dict[str, Any]:
    recipe = job.recipe
    config = ProfileConfig(
        runtimes=runtimes,
        batch_sizes=recipe.measured_batch_sizes,
        threads=recipe.threads,
        seconds=recipe.profile_seconds,
        seed=recipe.seed,
        tf32=recipe.precision == "tf32",
    )
    sample = {name: t[:1].numpy() for name, t in job.network.inputs.items()}
    with TemporaryDirectory(prefix="optin-builds-") as folder:
        dense, pruned = (_built_again(variants[name], recipe, Path(folder)) for name in VARIANTS)
        return compare(dense, pruned, sample, config, lambda done, _: report_progress(done)).to_dict()


def _built_again(variant: Variant, recipe: Recipe, folder: Path) -> Variant:
    """The variant with several builds of each engine that can be measured: they differ by the tactics they were built
    with, and one alone would pass its luck for the network's."""
    measured = {case: file for case in variant.engines if is_measurable(case[0]) and (file := variant.file(*case))}
    # One engine may serve several batch sizes.
    builds = {
        file: more_builds(file, variant.onnx, recipe.engine_builds, folder) for file in dict.fromkeys(measured.values())
    }
    return replace(variant, engines={**variant.engines, **{case: builds[file] for case, file in measured.items()}})


def _layers(
    job: Job, small: Network, variants: Mapping[str, Variant], measurements: list[dict[str, Any]]
) -> list[dict[str, Any]]:
    """The account of where the time goes, for the case that each runtime is judged by; or why there is none."""
    recipe, dense = job.recipe, job.network
    where = places(dense.module, job.anatomy.structure)
    merging = merging_places(small.module)
    flops = [own_flops(dense.module, dense.inputs, where), own_flops(small.module, small.inputs, {**where, **merging})]
    where |= merging
    widths = narrow_widths(describe(small.module, small.inputs))
    sample = {name: t[:1].numpy() for name, t in dense.inputs.items()}
    batch_size = recipe.headline_batch_size
    cases = [m for m in measurements if m["runtime"] in LAYER_RUNTIMES and m["batch_size"] == batch_size]
    found = []
    for measured in track(cases):
        files = {name: variants[name].file(measured["runtime"], batch_size) for name in VARIANTS}
        try:
            profiles = [
                layer_profile(
                    measured["runtime"],
                    file,
                    sample,
                    list(where),
                    batch_size=batch_size,
                    threads=recipe.threads,
                    seconds=min(_LAYER_SECONDS, recipe.profile_seconds),
                    seed=recipe.seed,
                    onnx=variants[name].onnx,
                    tf32=recipe.precision == "tf32",
                )
                for name, file in files.items()
                if file is not None
            ]
        except ProfilingError as error:
            # An engine that runs may still tell nothing of its layers; all else of the report stands.
            if measured["runtime"] not in BUILDERS:
                raise
            found.append({"runtime": measured["runtime"], "unprofiled": str(error)})
            continue
        p50s_ms = (measured["summary"]["dense"]["p50_ms"], measured["summary"]["pruned"]["p50_ms"])
        found.append(told(account(profiles[0], profiles[1], flops[0], flops[1], where, p50s_ms), widths))
    return found
