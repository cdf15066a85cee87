"""The report of a run, built from the results of its stages."""

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from exporters import BUILDERS, check_engine
from optin_deploy.analysis.results import LayerBreakdown, Unprofiled
from optin_deploy.compensation.sparsity import measure_sparsity
from optin_deploy.config.recipe import Recipe
from optin_deploy.export.engine_parity import why_unchecked
from optin_deploy.export.engines import requested_engines
from optin_deploy.network import Network
from optin_deploy.nn.flops import count_flops
from optin_deploy.report import Report
from optin_deploy.report.schema import (
    VARIANTS,
    BudgetInfo,
    CalibrationInfo,
    EngineSummary,
    Gate,
    LatencyBudget,
    ModelInfo,
    Parity,
    PlanEntry,
    Unmeasured,
    VariantInfo,
)
from optin_deploy.run.compare_stage import OutputResults
from optin_deploy.run.context import PrunedRun, RunContext
from optin_deploy.run.measure_stages import DeploymentResults
from optin_deploy.run.prepare import VERSION
from optin_deploy.search.knapsack import BUDGET_WINDOW
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.unpruned import find_unpruned
from profilers import Measurement, environment, lacking_device


@dataclass(frozen=True)
class StageResults:
    """The results of all stages after pruning; ``notes`` say how scoring differed from the options."""

    outputs: OutputResults
    deployment: DeploymentResults
    latency_budget: LatencyBudget | None
    notes: list[str]


def build_report(context: RunContext, pruned: PrunedRun, results: StageResults, command: str) -> Report:
    """Build the report of a run; ``command`` repeats it."""
    recipe, network, structure = context.recipe, context.network, context.space.structure
    data, outputs, deployment = context.prepared.calibration, results.outputs, results.deployment
    dense_size, pruned_size = (
        _measure_size(n, name, context.directory) for name, n in zip(VARIANTS, (network, pruned.network), strict=True)
    )
    sparse = recipe.sparsity is not None
    return Report(
        created=datetime.now(UTC),
        version=VERSION,
        command=command,
        model=_describe_model(recipe, network),
        calibration=CalibrationInfo(source=data.source, builtin=data.builtin, samples=data.samples, seed=recipe.seed),
        budget=BudgetInfo(flops=recipe.flops, latency=recipe.latency, latency_ms=recipe.latency_ms),
        latency_budget=results.latency_budget,
        settings=recipe.model_dump(mode="json"),
        dense=dense_size,
        pruned=pruned_size,
        plan=_plan_entries(context, pruned.plan),
        left_dense=list(find_unpruned(network.module, structure, network.inputs)),
        sparsity=measure_sparsity(pruned.network.module, structure, pruned.network.inputs) if sparse else None,
        agreement=outputs.agreement,
        pictures=outputs.pictures,
        precision=recipe.precision,
        evaluation=outputs.evaluation and outputs.evaluation.model_copy(update={"deployed": deployment.metric}),
        parity=deployment.parity,
        profile=list(deployment.profile.measurements),
        protocol=deployment.profile.protocol,
        layers=[layers for layers in deployment.layers if isinstance(layers, LayerBreakdown)],
        engines=_describe_engines(recipe, context.directory),
        unmeasured=[
            Unmeasured(runtime=r, reason=reason) for r in recipe.measured_runtimes if (reason := lacking_device(r))
        ],
        gates=[
            *_budget_gates(recipe, pruned_size.flops / dense_size.flops, deployment.profile.measurements),
            _parity_gate(deployment.parity),
        ],
        warnings=[*network.notes, *results.notes, *_warnings(recipe, deployment.layers)],
        stage_seconds=context.stages.seconds,
        environment={**environment(), "pruned on": str(context.prepared.device)},
    )


def rerun_command(directory: Path, replaced: Sequence[str]) -> str:
    """Return the command that repeats the run in ``directory``.

    This is a command, or Python code if arguments (``replaced``: network, calibration) were used instead of what the
    recipe names, since no command can name them.
    """
    recipe = str(directory / "recipe.yaml")
    if not replaced:
        return shlex.join(["optin-deploy", "prune-export", "--recipe", recipe])
    arguments = ", ".join(f"{name}={name}" for name in replaced)
    objects = " and ".join({"network": "a network", "calibration": "calibration data"}[name] for name in replaced)
    return (
        f"# Made from Python, with {objects} given there; recipe.yaml holds the options.\n"
        "from pathlib import Path\n"
        "from optin_deploy import prune_export\n"
        "from optin_deploy.config.recipe import make_recipe\n"
        f"recipe = make_recipe({{}}, Path({recipe!r}))\n"
        f"prune_export(recipe, {arguments})"
    )


def _measure_size(network: Network, name: str, directory: Path) -> VariantInfo:
    return VariantInfo(
        flops=count_flops(network.module, network.inputs),
        parameters=sum(p.numel() for p in network.module.parameters()),
        onnx_mib=sum(file.stat().st_size for file in directory.glob(f"{name}.onnx*")) / 2**20,
    )


def _describe_model(recipe: Recipe, network: Network) -> ModelInfo:
    return ModelInfo(
        # Directories differ at the end of their paths.
        name="/".join(Path(recipe.model).parts[-2:]),
        library=network.source.library,
        weights=_weights_origin(recipe, network),
        inputs={name: _input_shape(network, name) for name in network.inputs},
    )


def _weights_origin(recipe: Recipe, network: Network) -> str:
    """Return where the weights come from; "pretrained" only for a hub, not for a local directory."""
    is_local = network.weights == "pretrained" and Path(recipe.model).is_dir()
    return "the directory's own" if is_local else network.weights


def _input_shape(network: Network, name: str) -> list[int | str]:
    axes = network.dynamic_axes[name]
    return [axes.get(i, n) for i, n in enumerate(network.inputs[name].shape)]


def _plan_entries(context: RunContext, plan: Plan) -> list[PlanEntry]:
    """Return how many units are kept of every group, and how many tokens enter every block if they merge."""
    entries = [
        PlanEntry(group=g.name, kind=g.kind, layer=g.layer, units=g.units, kept=len(plan.kept[g.name]))
        for g in context.space.structure.groups
        # Without heads there is no width of heads.
        if plan.kept.get(g.parent or "") != ()
    ]
    stack = context.space.stack
    if stack is not None:
        entries += [
            PlanEntry(group=block, kind="token", layer=layer, units=stack.tokens, kept=tokens)
            for layer, (block, tokens) in enumerate(zip(stack.blocks, plan.tokens, strict=True))
        ]
    return entries


def _warnings(recipe: Recipe, layers: Sequence[LayerBreakdown | Unprofiled]) -> list[str]:
    """Return a sentence for each thing that was asked for and could not be done."""
    sentence = why_unchecked(recipe)
    unprofiled = [
        f"No account of where the time goes with {BUILDERS[entry.runtime].product}: {entry.unprofiled}."
        for entry in layers
        if isinstance(entry, Unprofiled)
    ]
    return [sentence, *unprofiled] if sentence else unprofiled


def _describe_engines(recipe: Recipe, directory: Path) -> list[EngineSummary]:
    engines = []
    for request in requested_engines(recipe):
        for name in VARIANTS:
            file = request.file(directory, name)
            info = check_engine(file)
            engine = EngineSummary(
                variant=name,
                runtime=request.runtime,
                file=file.name,
                mib=file.stat().st_size / 2**20,
                builder=f"{BUILDERS[request.runtime].product} {info.builder_version}",
                device=info.device,
                inputs=dict(info.inputs),
            )
            engines.append(engine)
    return engines


def _budget_gates(recipe: Recipe, flops: float, measurements: Sequence[Measurement]) -> list[Gate]:
    """Return a gate for each budget; with a latency budget too, the FLOPs may end below their window."""
    gates = []
    if recipe.flops is not None:
        lowest = 0.0 if recipe.has_latency else recipe.flops - BUDGET_WINDOW
        wanted = f"at most {recipe.flops:g}" if recipe.has_latency else f"{lowest:g} to {recipe.flops:g}"
        detail = f"{flops:.4f} of the dense FLOPs; wanted {wanted}"
        gates.append(Gate(name="budget", passed=lowest <= flops <= recipe.flops, detail=detail))
    if recipe.has_latency:
        gates.append(_latency_gate(recipe, measurements))
    return gates


def _latency_gate(recipe: Recipe, measurements: Sequence[Measurement]) -> Gate:
    """Return the gate of a latency budget: the final measurement may exceed it by the noise of dense against dense."""
    runtime, batch_size = recipe.target_runtime, recipe.target_batch_size
    measured = next(m for m in measurements if (m.runtime, m.batch_size) == (runtime, batch_size))
    noise = max(abs(measured.noise.low - 1), abs(measured.noise.high - 1))
    if recipe.latency is not None:
        latency, wanted, unit = 1 / measured.speedup.value, recipe.latency, "of the dense latency"
    else:
        latency, wanted, unit = measured.summary.pruned.p50_ms, recipe.latency_ms or 0.0, "ms"
    return Gate(
        name="latency",
        passed=latency <= wanted * (1 + noise),
        detail=f"{latency:.4g} {unit} ({runtime}, batch {batch_size}); wanted at most {wanted:g}, noise ±{noise:.1%}",
    )


def _parity_gate(parity: Sequence[Parity]) -> Gate:
    failed = [row for row in parity if not row.passed]
    details = [f"{_name_output(row)} is off by {row.max_abs_error:.1e}" for row in failed]
    details = details or [f"largest error {max(row.max_abs_error for row in parity):.1e} on held-out inputs"]
    tied = max(parity, key=lambda row: row.near_ties)
    if tied.near_ties:
        samples = f"{tied.near_ties} of {tied.samples} samples"
        details.append(f"{samples} compared with other tokens merged, where rounding decides")
    return Gate(name="parity", passed=not failed, detail="; ".join(details))


def _name_output(row: Parity) -> str:
    """Return the network and output of a row, and the product that built its engine, if it is one."""
    builder = BUILDERS.get(row.runtime)
    return f"{row.variant} {row.output}" + (f" with {builder.product}" if builder else "")
