"""The report of a run, put together from what its stages found."""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from itertools import product
from pathlib import Path
from typing import Any

from exporters import BUILDERS, check_engine
from optin_deploy.compensation.sparsity import measure_sparsity
from optin_deploy.config.recipe import Recipe
from optin_deploy.export.engine_parity import unchecked
from optin_deploy.export.engines import wanted_engines
from optin_deploy.network import Network
from optin_deploy.nn.flops import count_flops
from optin_deploy.report import Report
from optin_deploy.run.job import VERSION, Job
from optin_deploy.search.knapsack import BUDGET_WINDOW
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.unpruned import unpruned
from profilers import environment, lacking_device

VARIANTS = ("dense", "pruned")


def assemble(
    job: Job,
    plan: Plan,
    small: Network,
    results: dict[str, Any],
    directory: Path,
    stage_seconds: dict[str, float],
    command: str,
) -> Report:
    """The report of a run: figures of both networks, gates, and all that the stages found (``results``)."""
    recipe, network, structure = job.recipe, job.network, job.anatomy.structure
    figures = {
        name: {
            "flops": count_flops(n.module, n.inputs),
            "parameters": sum(p.numel() for p in n.module.parameters()),
            "onnx_mib": sum(f.stat().st_size for f in directory.glob(f"{name}.onnx*")) / 2**20,
        }
        for name, n in zip(VARIANTS, (network, small), strict=True)
    }
    ratio = figures["pruned"]["flops"] / figures["dense"]["flops"]
    gates = [*_budget_gates(recipe, ratio, results), _parity_gate(results["parity"])]
    return Report.model_validate(
        {
            "created": datetime.now(UTC),
            "version": VERSION,
            "command": command,
            "model": {
                # The end of a path is what tells one directory from another.
                "name": "/".join(Path(recipe.model).parts[-2:]),
                "library": network.source.library,
                "weights": _weights(recipe, network),
                "inputs": {n: _shape(network, n) for n in network.inputs},
            },
            "calibration": {
                "source": job.calibration.source,
                "builtin": job.calibration.builtin,
                "samples": job.calibration.samples,
                "seed": recipe.seed,
            },
            "budget": {"flops": recipe.flops, "latency": recipe.latency, "latency_ms": recipe.latency_ms},
            "latency_budget": results["latency_budget"],
            "settings": recipe.model_dump(mode="json"),
            **figures,
            "plan": _plan_rows(job, plan),
            "left_dense": [asdict(each) for each in unpruned(network.module, structure, network.inputs)],
            "sparsity": _sparsity(job, small),
            "agreement": results["agreement"],
            "pictures": results["pictures"],
            "precision": recipe.precision,
            "evaluation": results["evaluation"] and {**results["evaluation"], "deployed": results["deployed"]},
            "parity": results["parity"],
            "profile": results["profile"]["measurements"],
            "protocol": results["profile"]["protocol"],
            "layers": [entry for entry in results["layers"] if "unprofiled" not in entry],
            "engines": _engine_rows(recipe, directory),
            "unmeasured": [
                {"runtime": r, "reason": why} for r in recipe.measured_runtimes if (why := lacking_device(r))
            ],
            "gates": gates,
            "warnings": [*job.network.notes, *results["notes"], *_warnings(recipe, results["layers"])],
            "stage_seconds": stage_seconds,
            "environment": {**environment(), "pruned on": str(job.device)},
        }
    )


def again(directory: Path, given: Sequence[str]) -> str:
    """How to do the run in ``directory`` again: a command, or Python where arguments ``given`` there (network,
    calibration) took the place of what the recipe names, since no command could name them."""
    recipe = str(directory / "recipe.yaml")
    if not given:
        return shlex.join(["optin-deploy", "prune-export", "--recipe", recipe])
    arguments = ", ".join(f"{name}={name}" for name in given)
    told = " and ".join({"network": "a network", "calibration": "calibration data"}[name] for name in given)
    return (
        f"# Made from Python, with {told} given there; recipe.yaml holds the options.\n"
        "from pathlib import Path\n"
        "from optin_deploy import prune_export\n"
        "from optin_deploy.config.recipe import make_recipe\n"
        f"recipe = make_recipe({{}}, Path({recipe!r}))\n"
        f"prune_export(recipe, {arguments})"
    )


def _weights(recipe: Recipe, network: Network) -> str:
    """Where the weights are from. "pretrained" is what a hub has; those of a local directory are its own."""
    own = network.weights == "pretrained" and Path(recipe.model).is_dir()
    return "the directory's own" if own else network.weights


def _plan_rows(job: Job, plan: Plan) -> list[dict[str, Any]]:
    """What is left of every group, and of the tokens of every block where they merge."""
    rows = [
        {"group": g.name, "kind": g.kind, "layer": g.layer, "units": g.units, "kept": len(plan.kept[g.name])}
        for g in job.anatomy.structure.groups
        # Heads that have all left have no width.
        if plan.kept.get(g.outer or "") != ()
    ]
    stack = job.anatomy.stack
    if stack is not None:
        rows += [
            {"group": block, "kind": "token", "layer": layer, "units": stack.tokens, "kept": tokens}
            for layer, (block, tokens) in enumerate(zip(stack.blocks, plan.tokens, strict=True))
        ]
    return rows


def _warnings(recipe: Recipe, layers: list[dict[str, Any]]) -> list[str]:
    """What was asked for and could not be done, a sentence each."""
    sentence = unchecked(recipe)
    unprofiled = [
        f"No account of where the time goes with {BUILDERS[entry['runtime']].product}: {entry['unprofiled']}."
        for entry in layers
        if "unprofiled" in entry
    ]
    return [sentence, *unprofiled] if sentence else unprofiled


def _sparsity(job: Job, small: Network) -> dict[str, Any] | None:
    if job.recipe.sparsity is None:
        return None
    found = measure_sparsity(small.module, job.anatomy.structure, small.inputs)
    return {"pattern": job.recipe.sparsity, **asdict(found)}


def _engine_rows(recipe: Recipe, directory: Path) -> list[dict[str, Any]]:
    rows = []
    for each, name in product(wanted_engines(recipe), VARIANTS):
        file = each.file(directory, name)
        info = check_engine(file)
        rows.append(
            {
                "variant": name,
                "runtime": each.runtime,
                "file": file.name,
                "mib": file.stat().st_size / 2**20,
                "builder": f"{BUILDERS[each.runtime].product} {info.builder_version}",
                "device": info.device,
                "inputs": {n: asdict(r) for n, r in info.inputs.items()},
            }
        )
    return rows


def _budget_gates(recipe: Recipe, flops: float, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A gate per budget; together with a latency, FLOPs may end below their window."""
    gates = []
    if recipe.flops is not None:
        lowest = 0.0 if recipe.has_latency else recipe.flops - BUDGET_WINDOW
        wanted = f"at most {recipe.flops:g}" if recipe.has_latency else f"{lowest:g} to {recipe.flops:g}"
        gates.append(
            {
                "name": "budget",
                "passed": lowest <= flops <= recipe.flops,
                "detail": f"{flops:.4f} of the dense FLOPs; wanted {wanted}",
            }
        )
    if recipe.has_latency:
        gates.append(_latency_gate(recipe, results["profile"]["measurements"]))
    return gates


def _latency_gate(recipe: Recipe, measurements: list[dict[str, Any]]) -> dict[str, Any]:
    """Met when the final measurement is not above the budget by more than dense differs from itself."""
    where = (recipe.target_runtime, recipe.target_batch_size)
    measured = next(m for m in measurements if (m["runtime"], m["batch_size"]) == where)
    noise = max(abs(measured["noise"]["low"] - 1), abs(measured["noise"]["high"] - 1))
    if recipe.latency is not None:
        found, wanted, unit = 1 / measured["speedup"]["value"], recipe.latency, "of the dense latency"
    else:
        found, wanted, unit = measured["summary"]["pruned"]["p50_ms"], recipe.latency_ms or 0.0, "ms"
    return {
        "name": "latency",
        "passed": found <= wanted * (1 + noise),
        "detail": f"{found:.4g} {unit} ({where[0]}, batch {where[1]}); wanted at most {wanted:g}, noise ±{noise:.1%}",
    }


def _parity_gate(parity: list[dict[str, Any]]) -> dict[str, Any]:
    failed = [p for p in parity if not p["passed"]]
    details = [f"{_checked(p)} is off by {p['max_abs_error']:.1e}" for p in failed]
    details = details or [f"largest error {max(p['max_abs_error'] for p in parity):.1e} on held-out inputs"]
    most = max(parity, key=lambda p: int(p["near_ties"]))
    if most["near_ties"]:
        which = f"{most['near_ties']} of {most['samples']} samples"
        details.append(f"{which} compared with other tokens merged, where rounding decides")
    return {"name": "parity", "passed": not failed, "detail": "; ".join(details)}


def _checked(row: Mapping[str, Any]) -> str:
    """What a row of the parity gate is about; ONNX files go without saying."""
    builder = BUILDERS.get(row.get("runtime", "ort-cpu"))
    return f"{row['variant']} {row['output']}" + (f" with {builder.product}" if builder else "")


def _shape(network: Network, name: str) -> list[int | str]:
    axes = network.dynamic_axes[name]
    return [axes.get(i, n) for i, n in enumerate(network.inputs[name].shape)]
