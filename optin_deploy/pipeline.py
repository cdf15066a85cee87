"""The main job: prune, export, measure, report. Everything that the user can get wrong is checked before any work."""

import importlib.metadata
import importlib.util
import json
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.console import Console
from safetensors.torch import load_file
from torch import Tensor

from exporters import check_parity, onnx_from_program, save_program, trace
from optin_deploy import checkpoint, rundir
from optin_deploy.calibration import Calibration, load_calibration
from optin_deploy.costs import count_flops, flops_share
from optin_deploy.errors import UserError
from optin_deploy.evaluation import Dataset, agreement, load_dataset
from optin_deploy.files import write_text
from optin_deploy.models import load_network
from optin_deploy.network import Network, TensorOutputs
from optin_deploy.plan import Plan
from optin_deploy.progress import Stages
from optin_deploy.pruning import Anatomy, examine, remove, remove_in_rounds
from optin_deploy.recipe import Recipe, check_options
from optin_deploy.report import Report, write_report
from optin_deploy.rotation import in_principal_bases
from optin_deploy.scoring import Scoring, save_scores, score, scoring_steps
from optin_deploy.search import BUDGET_WINDOW, check_budget
from profilers import ProfileConfig, Variant, compare
from profilers import environment as environment_of_this_machine

VERSION = importlib.metadata.version("optin-deploy")
_VARIANTS = ("dense", "pruned")


@dataclass(frozen=True)
class Job:
    """A run whose inputs have all been read and checked."""

    recipe: Recipe
    network: Network
    earlier: Plan
    anatomy: Anatomy
    calibration: Calibration
    dataset: Dataset | None
    device: torch.device
    fingerprint: str


@dataclass(frozen=True)
class Result:
    """A finished run: its report, the pruned network, and where its files are."""

    report: Report
    network: Network
    directory: Path


def prune_export(
    recipe: Recipe,
    *,
    output: Path | None = None,
    network: Network | None = None,
    calibration: Calibration | None = None,
    command: str | None = None,
    console: Console | None = None,
    quiet: bool = False,
) -> Result:
    """Run ``recipe``: score, slice, repair, export, check, measure and report.

    Args:
        output: run directory; ``runs/MODEL-flopsF-HASH`` when None. A directory that holds the same run is continued.
        network: in place of what ``recipe.model`` names (which then is only a name), for a module of your own.
        calibration: in place of what ``recipe.calibration`` names.
        command: how to do it again, for the report.
        console: where progress goes; the standard error stream when None.

    Raises:
        UserError: something to be fixed by the user; nothing is left behind.
        ExportError, ProfilingError: the export or a runtime failed; what was done before is kept.
    """
    console = console or Console(stderr=True)
    with Stages(console, quiet=quiet) as stages:
        with stages.stage("load and check"):
            job = prepare(recipe, network, calibration)
            directory = output or rundir.default_directory(recipe, job.fingerprint)
            rundir.check(directory, job.fingerprint)
        rundir.create(directory, job.fingerprint, recipe)
        dense, scores = _scored(job, directory, stages)
        plan, small = _pruned(job, dense, scores, directory, stages)
        results = _compared(job, small, directory, stages)
        results |= _exported(job, small, directory, stages)
        report = _report(job, plan, small, results, directory, stages, command)
        write_report(report, directory)
    return Result(report, small, directory)


def prepare(recipe: Recipe, network: Network | None = None, calibration: Calibration | None = None) -> Job:
    """Read and check all inputs of a run; UserError for the first thing that is wrong."""
    _check_runtimes(recipe)
    check_options(recipe)
    device = _device(recipe.device)
    earlier = Plan({})
    if network is None:
        network = load_network(
            recipe.model,
            weights=recipe.weights,
            image_size=recipe.image_size,
            sequence_length=recipe.sequence_length,
            seed=recipe.seed,
        )
        if checkpoint.is_checkpoint(recipe.model):
            earlier = checkpoint.read_plan(Path(recipe.model))
    anatomy = examine(network, narrow=recipe.narrows_heads)
    check_budget(anatomy.costs, recipe.flops)
    calibration = calibration or load_calibration(
        network,
        recipe.calibration,
        column=recipe.calibration_column,
        labels=recipe.calibration_labels,
        samples=recipe.calibration_samples,
        seed=recipe.seed,
    )
    _check_labels(recipe, network, calibration)
    _check_finite(network, calibration)
    dataset = load_dataset(network, recipe.evaluate, recipe.evaluate_columns) if recipe.evaluate else None
    run = rundir.fingerprint(recipe, network.module, calibration.digest, VERSION)
    return Job(recipe, network, earlier, anatomy, calibration, dataset, device, run)


def _check_runtimes(recipe: Recipe) -> None:
    if importlib.util.find_spec("onnxruntime") is None:
        raise UserError("onnxruntime is not installed: pip install 'optin-deploy[cpu]' (or [gpu] for a CUDA machine)")
    if any("cuda" in runtime for runtime in recipe.runtimes) and not torch.cuda.is_available():
        raise UserError(f"--runtimes {','.join(recipe.runtimes)}: no CUDA device is present")
    if "ort-cuda" in recipe.runtimes:
        import onnxruntime

        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise UserError("ort-cuda: this onnxruntime has no CUDA provider: pip install 'optin-deploy[gpu]'")


def _check_labels(recipe: Recipe, network: Network, calibration: Calibration) -> None:
    if recipe.criterion != "fisher":
        return
    if network.logits is None:
        raise UserError("--criterion fisher: the network has no class logits; take another criterion")
    if calibration.labels is None:
        raise UserError("--criterion fisher needs labels for the calibration data: give --calibration-labels")


def _check_finite(network: Network, calibration: Calibration) -> None:
    with torch.inference_mode():
        outputs = network.forward(calibration.held_out[0])
    bad = next((name for name, output in outputs.items() if not output.isfinite().all()), None)
    if bad:
        raise UserError(f"the network gives NaN or infinity in {bad} on {calibration.source}: check its weights")


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: no CUDA device is present; use --device cpu")
    return torch.device(name)


def _batches(batches: tuple[dict[str, Tensor], ...], device: torch.device) -> list[Mapping[str, Tensor]]:
    return [{name: t.to(device) for name, t in batch.items()} for batch in batches]


def _scoring(recipe: Recipe) -> Scoring:
    return Scoring(recipe.criterion, recipe.scorer, recipe.probes, recipe.task_weight, recipe.seed)


def _scored(job: Job, directory: Path, stages: Stages) -> tuple[Network, dict[str, Tensor]]:
    """The network in the basis that it is scored and pruned in, on the run's device, and its scores."""
    path, structure, scoring = directory / "scores.safetensors", job.anatomy.structure, _scoring(job.recipe)
    calibration = job.calibration
    with stages.stage("score", scoring_steps(structure, calibration.batches, scoring)) as advance:
        job.network.module.to(job.device)
        if (directory / "checkpoint").exists() and path.is_file():
            return job.network, load_file(path)
        batches = _batches(calibration.batches, job.device)
        dense = in_principal_bases(job.network, structure, batches)
        if path.is_file():
            return dense, load_file(path)
        scores = score(
            dense, structure, job.anatomy.costs, batches, scoring, labels=calibration.labels, advance=advance
        )
        save_scores(scores, path)
        return dense, scores


def _pruned(
    job: Job, dense: Network, scores: Mapping[str, Tensor], directory: Path, stages: Stages
) -> tuple[Plan, Network]:
    """Search, slice and repair, or read the checkpoint of an earlier try; writes plan.json and the checkpoint."""
    recipe, structure, path = job.recipe, job.anatomy.structure, directory / "checkpoint"
    with stages.stage("slice and repair", len(structure.blocks) * recipe.rounds) as advance:
        if path.exists():
            plan = _read_plan(directory)
            small = remove(job.network, structure, plan, [], None)
            checkpoint.load_weights(small, path)
        else:
            plan, small = remove_in_rounds(
                dense,
                job.anatomy,
                scores,
                _batches(job.calibration.batches, job.device),
                recipe.flops,
                scoring=_scoring(recipe),
                labels=job.calibration.labels,
                align=recipe.align,
                ridge=recipe.ridge if recipe.compensate else None,
                rounds=recipe.rounds,
                advance=advance,
            )
            write_text(directory / "plan.json", json.dumps({"flops": recipe.flops, "kept": dict(plan.kept)}) + "\n")
        pruned = job.network.with_module(small.cpu())
        job.network.module.cpu()
        if not path.exists():
            checkpoint.save(pruned, plan.after(job.earlier), path)
    return plan, pruned


def _read_plan(directory: Path) -> Plan:
    path = directory / "plan.json"
    if not path.is_file():
        raise UserError(f"{path} is gone: remove {directory / 'checkpoint'} too, to prune again")
    kept = json.loads(path.read_text(encoding="utf-8"))["kept"]
    return Plan({name: tuple(units) for name, units in kept.items()})


def _compared(job: Job, small: Network, directory: Path, stages: Stages) -> dict[str, Any]:
    """Agreement on held-out inputs, and the labelled set where one is given."""
    with stages.stage("compare outputs"):
        agreed = rundir.kept_json(
            directory / "agreement.json",
            lambda: [asdict(a) for a in agreement(job.network, small.module, job.calibration.held_out)],
        )
    if job.dataset is None:
        return {"agreement": agreed, "evaluation": None}
    dataset = job.dataset
    with stages.stage("evaluate", 2 * dataset.steps) as advance:

        def measure() -> dict[str, Any]:
            figures = {}
            for name, module in zip(_VARIANTS, (job.network.module, small.module), strict=True):
                figures[name] = dataset.measure(module.to(job.device), advance)
                module.cpu()
            return {"metric": dataset.metric, "dataset": dataset.name, "samples": dataset.samples, **figures}

        evaluated = rundir.kept_json(directory / "evaluation.json", measure)
    return {"agreement": agreed, "evaluation": evaluated}


def _exported(job: Job, small: Network, directory: Path, stages: Stages) -> dict[str, Any]:
    """ONNX files, parity and profile. Programs for the torch runtime live only as long as they are measured."""
    recipe = job.recipe
    with TemporaryDirectory(prefix="optin-deploy-") as temporary:
        variants = {}
        with stages.stage("export ONNX", 2) as advance:
            for name, network in zip(_VARIANTS, (job.network, small), strict=True):
                program = Path(temporary) / f"{name}.pt2"
                variants[name] = Variant(directory / f"{name}.onnx", program)
                _export(network, variants[name].onnx, program, recipe.opset)
                advance(1)
        with stages.stage("check parity", 2) as advance:
            parity = rundir.kept_json(directory / "parity.json", lambda: _parity(job, small, variants, advance))
        with stages.stage("measure", 1) as advance:
            profile = rundir.kept_json(directory / "profile.json", lambda: _profile(job, variants, advance))
    return {"parity": parity, "profile": profile}


def _export(network: Network, onnx: Path, program: Path, opset: int) -> None:
    traced = trace(TensorOutputs(network.module, network.outputs), network.inputs, network.dynamic_axes)
    save_program(traced, program)
    if not onnx.is_file():
        onnx_from_program(
            traced, onnx, output_names=tuple(network.outputs), dynamic_axes=network.dynamic_axes, opset=opset
        )


def _parity(job: Job, small: Network, variants: Mapping[str, Variant], advance: Any) -> list[dict[str, Any]]:
    rows = []
    for name, network in zip(_VARIANTS, (job.network, small), strict=True):
        checked = check_parity(
            TensorOutputs(network.module, network.outputs),
            variants[name].onnx,
            parity_batches(network, job.calibration.held_out),
            tuple(network.outputs),
            tolerance=job.recipe.parity_tolerance,
        )
        rows += [
            {
                "variant": name,
                "output": p.output,
                "max_abs_error": p.max_abs_error,
                "max_abs_reference": p.max_abs_reference,
                "tolerance": p.tolerance,
                "passed": p.passed,
            }
            for p in checked
        ]
        advance(1)
    return rows


def parity_batches(network: Network, held_out: tuple[dict[str, Tensor], ...]) -> list[dict[str, Tensor]]:
    """Inputs of several batch sizes, and lengths for text, out of those that the network was not calibrated on."""
    batches = []
    for count in (1, 3, 8):
        batch = {name: t[:count] for name, t in held_out[0].items()}
        valid = network.valid_tokens(batch)
        length = int(valid.sum(1).max()) if valid is not None else 0
        batches.append(
            {name: t[:, :length] if name in network.sequence_inputs and length else t for name, t in batch.items()}
        )
    return batches


def _profile(job: Job, variants: Mapping[str, Variant], advance: Any) -> dict[str, Any]:
    recipe, done = job.recipe, 0.0

    def progress(fraction: float, _: str) -> None:
        nonlocal done
        advance(fraction - done)
        done = fraction

    config = ProfileConfig(
        runtimes=recipe.runtimes,
        batch_sizes=recipe.batch_sizes,
        threads=recipe.threads,
        seconds=recipe.profile_seconds,
        seed=recipe.seed,
    )
    sample = {name: t[:1].numpy() for name, t in job.network.inputs.items()}
    return compare(variants["dense"], variants["pruned"], sample, config, progress).to_dict()


def _report(
    job: Job,
    plan: Plan,
    small: Network,
    results: dict[str, Any],
    directory: Path,
    stages: Stages,
    command: str | None,
) -> Report:
    recipe, network, structure = job.recipe, job.network, job.anatomy.structure
    figures = {
        name: {
            "flops": count_flops(n.module, n.inputs),
            "parameters": sum(p.numel() for p in n.module.parameters()),
            "onnx_mib": sum(f.stat().st_size for f in directory.glob(f"{name}.onnx*")) / 2**20,
        }
        for name, n in zip(_VARIANTS, (network, small), strict=True)
    }
    ratio = figures["pruned"]["flops"] / figures["dense"]["flops"]
    failed = [p for p in results["parity"] if not p["passed"]]
    gates = [
        {
            "name": "budget",
            "passed": recipe.flops - BUDGET_WINDOW <= ratio <= recipe.flops,
            "detail": f"{ratio:.4f} of the dense FLOPs; wanted {recipe.flops - BUDGET_WINDOW:g} to {recipe.flops:g}",
        },
        {
            "name": "parity",
            "passed": not failed,
            "detail": "; ".join(f"{p['variant']} {p['output']} is off by {p['max_abs_error']:.1e}" for p in failed)
            or f"largest error {max(p['max_abs_error'] for p in results['parity']):.1e} on held-out inputs",
        },
    ]
    return Report.model_validate(
        {
            "created": datetime.now(UTC),
            "version": VERSION,
            "command": command
            or shlex.join(["optin-deploy", "prune-export", "--recipe", str(directory / "recipe.yaml")]),
            "model": {
                # The end of a path is what tells one directory from another.
                "name": "/".join(Path(recipe.model).parts[-2:]),
                "library": network.source.library,
                "weights": network.weights,
                "inputs": {n: _shape(network, n) for n in network.inputs},
            },
            "calibration": {
                "source": job.calibration.source,
                "builtin": job.calibration.builtin,
                "samples": job.calibration.samples,
                "seed": recipe.seed,
            },
            "budget": {"flops": recipe.flops},
            "settings": recipe.model_dump(mode="json"),
            **figures,
            "plan": [
                {"group": g.name, "kind": g.kind, "layer": g.layer, "units": g.units, "kept": len(plan.kept[g.name])}
                for g in structure.groups
                # Heads that have all left have no width.
                if plan.kept.get(g.heads or "") != ()
            ],
            "left_dense": [
                {**asdict(left), "flops_share": flops_share(network.module, network.inputs, left.module)}
                for left in structure.left_dense
            ],
            "agreement": results["agreement"],
            "evaluation": results["evaluation"],
            "parity": results["parity"],
            "profile": results["profile"]["measurements"],
            "protocol": results["profile"]["protocol"],
            "gates": gates,
            "warnings": [],
            "stage_seconds": stages.seconds,
            "environment": {**environment_of_this_machine(), "pruned on": str(job.device)},
        }
    )


def _shape(network: Network, name: str) -> list[int | str]:
    axes = network.dynamic_axes[name]
    return [axes.get(i, n) for i, n in enumerate(network.inputs[name].shape)]
