"""The Python interface. Each function is one step, and takes and returns plain values that can be displayed.

score → plan → prune → save, load → export_onnx → build_engine → profile, compare. `optin_deploy.prune_export` does a
whole run, with its report, latency budgets and precisions.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Unpack, overload

import torch
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from exporters import EngineConfig, Precision, check_builder, input_ranges, is_quantized
from exporters import build_engine as build_engine_file
from exporters.files import staged
from optin_deploy.api_results import Compared, EngineFile, OnnxFile, Scores
from optin_deploy.config.recipe import Recipe, make_recipe
from optin_deploy.criteria import scoring as scorers
from optin_deploy.criteria.scoring import Scoring
from optin_deploy.data.calibration import Calibration
from optin_deploy.errors import UserError
from optin_deploy.export.engines import build_engines, requested_engines, timing_cache
from optin_deploy.export.onnx_file import export_files, write_onnx
from optin_deploy.export.requirements import check_measurable, check_runtimes
from optin_deploy.latency.target import target_of
from optin_deploy.models.custom import custom_network
from optin_deploy.models.validation.adopt import validate
from optin_deploy.network import Network
from optin_deploy.nn.batches import Batches, batch_size
from optin_deploy.nn.flops import count_flops
from optin_deploy.pruning import pruner
from optin_deploy.pruning.head_rotation import rotate_heads_to_pca
from optin_deploy.pruning.pruner import Pruned
from optin_deploy.pruning.settings import PruneOptions, Ridge, check_share
from optin_deploy.pruning.space import analyze, analyze_for, validate_on
from optin_deploy.report.profile_tables import NetworkProfile
from optin_deploy.run.network_profile import profile_network, profile_onnx
from optin_deploy.search.knapsack import search
from optin_deploy.structure.plan import Plan
from optin_deploy.utils.progress import Stages, report_progress, track
from profilers import RUNTIMES, ProfileConfig, Variant
from profilers import compare as compare_files

__all__ = [
    "Compared",
    "EngineConfig",
    "EngineFile",
    "OnnxFile",
    "PruneOptions",
    "Scores",
    "build_engine",
    "compare",
    "export_onnx",
    "plan",
    "profile",
    "prune",
    "score",
]


Files = OnnxFile | str | Path


@torch.inference_mode(False)
def score(
    network: Network,
    batches: Batches,
    scoring: Scoring | None = None,
    *,
    labels: Sequence[Tensor] | None = None,
    narrow: bool | None = None,
) -> Scores:
    """Score every head, head dimension, neuron and channel; higher scores matter more.

    Args:
        batches: calibration inputs by forward's argument names, on the network's device.
        scoring: the criterion and its settings; `Scoring()` when None.
        labels: class numbers ``(samples,)`` for each batch, for the criterion "fisher".
        narrow: whether heads may also get narrower; when None, the criterion decides.

    Raises:
        UserError: nothing is prunable, or the network returns NaN or infinity on the calibration data.

    Example:
        >>> import optin_deploy
        >>> network = optin_deploy.load_network("test_vit", weights="random", image_size=32)
        >>> scores = optin_deploy.score(network, [network.inputs])
        >>> scores
        <Scores by trajectory-obs on 2 samples: ... units in 18 groups>
        >>> scores["blocks.0.mlp"].shape
        torch.Size([192])
    """
    scoring = scoring or Scoring()
    network = validate_on(network, batches)
    space = analyze(network, narrow=scoring.narrows_heads if narrow is None else narrow)
    dense = rotate_heads_to_pca(network, space.structure, batches)
    scores = scorers.score(dense, space.structure, space.costs, batches, scoring, labels=labels)
    return Scores(scores, scoring, sum(map(batch_size, batches)))


def plan(network: Network, scores: Mapping[str, Tensor], flops: float, *, align: int = 64) -> Plan:
    """Choose the units to keep: an exact search for the largest total score within a FLOPs budget.

    `optin_deploy.prune_export` also takes latency budgets, for which it builds and measures networks, and merges
    tokens.

    Args:
        scores: from `score`, or from the file scores.safetensors of a run.
        flops: fraction of the network's FLOPs to keep, above 0 and below 1.
        align: neurons are kept in multiples of this number, finer in narrow layers.

    Raises:
        UserError: the budget is out of range or below the floor, or the scores are of another network.

    Example:
        >>> import optin_deploy
        >>> network = optin_deploy.load_network("test_vit", weights="random", image_size=32)
        >>> scores = optin_deploy.score(network, [network.inputs], optin_deploy.Scoring("magnitude"))
        >>> optin_deploy.plan(network, scores, flops=0.5)
        Plan(blocks.0.attn: ..., blocks.0.mlp: ..., ...)
    """
    check_share(flops)
    space = analyze_for(validate(network), scores)
    for group in space.structure.groups:
        if group.name not in scores or len(scores[group.name]) != group.units:
            raise UserError(f"the scores are of another network: they have none for the {group.units} of {group.name}")
    return search(space.structure, scores, space.costs, flops, align)


@overload
def prune(
    network: Network, batches: Batches, flops: float, *, ridge: Ridge = "auto", **options: Unpack[PruneOptions]
) -> Pruned: ...
@overload
def prune(network: Network, batches: Batches, *, plan: Plan, ridge: Ridge = "auto") -> Pruned: ...
def prune(
    network: Network,
    batches: Batches,
    flops: float | None = None,
    *,
    plan: Plan | None = None,
    ridge: Ridge = "auto",
    **options: Unpack[PruneOptions],
) -> Pruned:
    """Return a smaller network: score, search, slice and compensate; or slice and compensate by a given plan.

    ``network`` is not changed.

    Args:
        batches: calibration inputs by forward's argument names, on the network's device.
        flops: fraction of the network's FLOPs to keep, above 0 and below 1.
        plan: the units to keep, from `plan`, instead of a budget; ``options`` do not apply then.
        ridge: strength of the ridge in compensation, "auto" to choose it on held-out batches, None for no compensation.
        **options: see `PruneOptions`: ``scoring``, ``labels``, ``align``, ``rounds``, ``narrow``, ``tokens``,
            ``tokens_share``.

    Raises:
        UserError: nothing is prunable, tokens cannot merge, the budget is out of range or below the floor, the plan
            does not fit, or not exactly one of ``flops`` and ``plan`` is given.

    Example:
        >>> import optin_deploy
        >>> network = optin_deploy.load_network("test_vit", weights="random", image_size=32)
        >>> calibration = optin_deploy.load_calibration(network, None, samples=16)
        >>> pruned = optin_deploy.prune(network, calibration.batches, flops=0.5)
        >>> pruned
        <Pruned test_vit: 0.4... of its FLOPs, ...>
        >>> smaller = pruned.network.module  # a plain nn.Module, no masks and no hooks
        >>> again = optin_deploy.prune(network, calibration.batches, plan=pruned.plan)
        >>> again.plan == pruned.plan
        True
    """
    if plan is None and flops is not None:
        return pruner.prune(network, batches, flops, ridge=ridge, **options)
    if plan is None or flops is not None:
        raise UserError("prune takes flops=0.5, say, or plan=a plan: give one of the two")
    if options:
        raise UserError(f"prune with a plan neither scores nor searches: leave out {', '.join(options)}")
    return pruner.prune_to(network, batches, plan, ridge)


def export_onnx(
    network: Network | nn.Module,
    path: str | Path,
    *,
    inputs: Mapping[str, Tensor] | None = None,
    calibration: Calibration | None = None,
    precision: Precision = "fp32",
    opset: int = 20,
    tolerance: float | None = None,
    quiet: bool = True,
) -> OnnxFile:
    """Write an ONNX file and check it against PyTorch; an existing file is replaced only if that succeeds.

    The batch is a dynamic axis, and so is the sequence of a `Network` for texts.

    Args:
        path: ends in ``.onnx``.
        inputs: for a module only: a sample batch by forward's argument names, first axis the batch.
        calibration: its batches calibrate int8 and fp8, and its held-out samples check the file; when None, the sample
            inputs check it.
        precision: of weights and activations.
        tolerance: largest error allowed, relative to the largest output; when None, that of the precision.
        quiet: show no progress.

    Raises:
        UserError: an argument is wrong.
        GateError: the file does not compute the same as PyTorch.
        ExportError: the network cannot be exported.

    Example:
        >>> import timm, torch, optin_deploy
        >>> module = timm.create_model("test_vit", img_size=32, num_classes=10, depth=1)
        >>> network = optin_deploy.custom_network(module, {"x": torch.randn(2, 3, 32, 32)}, logits="output")
        >>> optin_deploy.export_onnx(network, "dense.onnx")
        <OnnxFile dense.onnx (... MiB, fp32): x [batch, 3, 32, 32] -> output; largest error against torch ...>
    """
    path, network = Path(path), _as_network(network, inputs)
    if path.suffix != ".onnx":
        raise UserError(f"{path}: the name of an ONNX file ends in .onnx")
    if calibration is None and is_quantized(precision):
        raise UserError(
            f"precision={precision!r} is calibrated: give calibration=, of load_calibration or from_batches"
        )
    sample = dict(network.inputs)
    data = calibration or Calibration((sample,), (sample,), "sample inputs", False, batch_size(sample), "")
    recipe = _make_recipe(network, precision=precision, opset=opset, parity_tolerance=tolerance)
    check_runtimes(recipe)
    with Stages(Console(stderr=True), quiet=quiet) as stages, staged(path) as temporary:
        parity = write_onnx(network, temporary, recipe, data, stages)
    axes = network.dynamic_axes
    sizes = {label: sample[name].shape[axis] for name, labels in axes.items() for axis, label in labels.items()}
    shapes = {name: tuple(axes[name].get(i, n) for i, n in enumerate(t.shape)) for name, t in sample.items()}
    return OnnxFile(path, precision, shapes, tuple(network.outputs), sizes, parity)


def build_engine(
    onnx: Files,
    path: str | Path,
    config: EngineConfig | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    best: int | None = None,
    static: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> EngineFile:
    """Build a TensorRT engine from an ONNX file, with a description of it in ``ENGINE.json``.

    Args:
        path: of the engine.
        config: the product that builds it, and its settings; when None TensorRT for RTX, which builds without a GPU.
        batch_sizes: the engine takes every size from the smallest to the largest of them.
        best: the batch size that the engine is optimised for; the largest when None.
        static: the engine takes ``best`` only, and the largest size of all other dynamic axes.
        sizes: largest size of each dynamic axis except the batch, by name; an `OnnxFile` has those of its sample.

    Raises:
        UserError: an axis has no size.
        ExportError: the builder is missing or cannot build the engine.

    Example:
        >>> import timm, torch, optin_deploy
        >>> module = timm.create_model("test_vit", img_size=32, num_classes=10, depth=1)
        >>> network = optin_deploy.custom_network(module, {"x": torch.randn(2, 3, 32, 32)}, logits="output")
        >>> onnx = optin_deploy.export_onnx(network, "dense.onnx")
        >>> optin_deploy.build_engine(onnx, "dense.rtx.engine", optin_deploy.EngineConfig("rtx"), batch_sizes=(1, 4))
        <EngineFile dense.rtx.engine (rtx ...): x [1, 3, 32, 32] to [4, 3, 32, 32]>
    """
    config = config or EngineConfig("rtx")
    file = _path_of(onnx)
    known = {**(onnx.sizes if isinstance(onnx, OnnxFile) else {}), **(sizes or {}), "batch": max(batch_sizes)}
    named = _read_input_shapes(file)
    unknown = sorted({d for shape in named.values() for d in shape if isinstance(d, str) and d not in known})
    if unknown:
        raise UserError(f"{file}: how large may {', '.join(unknown)} be? Give sizes={{{unknown[0]!r}: 128}}, say")
    axes = {n: {i: d for i, d in enumerate(shape) if isinstance(d, str)} for n, shape in named.items()}
    shapes = {n: tuple(known[d] if isinstance(d, str) else d for d in shape) for n, shape in named.items()}
    ranges = input_ranges(shapes, axes, batch_sizes, best or max(batch_sizes), static=static)
    check_builder(config)
    info = build_engine_file(file, Path(path), ranges, config, timing_cache(config.builder))
    return EngineFile(Path(path), info)


def profile(
    what: Network | nn.Module | Files,
    inputs: Mapping[str, Tensor] | None = None,
    *,
    runtime: str = "ort-cpu",
    batch_size: int = 1,
    threads: int | None = None,
    seconds: float = 10.0,
    quiet: bool = True,
) -> NetworkProfile:
    """Measure the latency of one network on this machine, and which parts of it take the time.

    Args:
        what: a network, a module with prunable parts, or an ONNX file, whose time is broken down by operator type.
        inputs: a sample batch by name, for a module or a file.
        runtime: one of `profilers.RUNTIMES`; for files, one of ONNX Runtime.
        batch_size: samples in one run.
        threads: CPU threads; all physical cores when None.
        seconds: time limit of the measurement; the breakdown takes at most as long again.
        quiet: show no progress.

    Raises:
        UserError: an argument is wrong.
        ProfilingError: the runtime failed.

    Example:
        >>> import timm, torch, optin_deploy
        >>> module = timm.create_model("test_vit", img_size=32, num_classes=10, depth=1)
        >>> network = optin_deploy.custom_network(module, {"x": torch.randn(2, 3, 32, 32)}, logits="output")
        >>> optin_deploy.profile(network, seconds=0.2, threads=1)
        <NetworkProfile ONNX Runtime, batch 1, 1 thread: p50 ... ms, p90 ... ms, p99 ... ms; most of it ...>
    """
    source = _path_of(what) if isinstance(what, Files) else _as_network(what, inputs)
    options = {"runtime": runtime, "batch_size": batch_size, "threads": threads, "profile_seconds": seconds}
    recipe = _make_recipe(source, **options)
    check_runtimes(recipe)
    check_measurable(runtime)
    with Stages(Console(stderr=True), quiet=quiet) as stages, stages.stage("measure"):
        if isinstance(source, Network):
            return profile_network(source, target_of(recipe), seconds)
        if inputs is None or RUNTIMES[runtime] != "onnx":
            raise UserError(f"{source}: a file is profiled with inputs=, a sample batch, and a runtime of ONNX Runtime")
        return profile_onnx(source, _first_sample(inputs), target_of(recipe), seconds)


def compare(
    dense: Network | Files,
    pruned: Network | Files,
    inputs: Mapping[str, Tensor] | None = None,
    *,
    runtimes: Sequence[str] = ("ort-cpu",),
    batch_sizes: Sequence[int] = (1, 8),
    threads: int | None = None,
    seconds: float = 10.0,
    seed: int = 0,
    quiet: bool = True,
) -> Compared:
    """Measure two networks against each other: dense, dense again and pruned take turns in one process.

    The speed-up has a 95 % interval. Dense against dense is the noise floor, and a speed-up within it is not
    significant. Networks are exported in float32 first; ONNX files are measured as they are.

    Args:
        inputs: a sample batch by name, if neither of the two is a `Network`.
        runtimes: names from `profilers.RUNTIMES`; for files, those of ONNX Runtime.
        batch_sizes: samples in one run.
        threads: CPU threads; all physical cores when None.
        seconds: time limit for each runtime and batch size.
        seed: of the order of turns and of the bootstrap.
        quiet: show no progress.

    Raises:
        UserError: an argument is wrong.
        ExportError, ProfilingError: an export or a runtime failed.

    Example:
        >>> import timm, torch, optin_deploy
        >>> module = timm.create_model("test_vit", img_size=32, num_classes=10, depth=1)
        >>> network = optin_deploy.custom_network(module, {"x": torch.randn(2, 3, 32, 32)}, logits="output")
        >>> pruned = optin_deploy.prune(network, [network.inputs], flops=0.5)
        >>> optin_deploy.compare(network, pruned.network, batch_sizes=(1,), seconds=0.2, threads=1)
        ONNX Runtime, batch 1: ...× [...–...]..., p50 ... -> ... ms, A/A noise ±... %, realised ...
    """
    sources = {"dense": _validated(dense), "pruned": _validated(pruned)}
    networks = [source for source in sources.values() if isinstance(source, Network)]
    sample = inputs if inputs is not None or not networks else networks[0].inputs
    if sample is None:
        raise UserError("files are compared with inputs=, a sample batch by name")
    options = {"runtimes": tuple(runtimes), "batch_sizes": tuple(batch_sizes), "threads": threads, "seed": seed}
    recipe = _make_recipe(dense, **options, profile_seconds=seconds)
    check_runtimes(recipe)
    for runtime in recipe.measured_runtimes:
        check_measurable(runtime)
    if len(networks) < len(sources) and any(RUNTIMES[runtime] != "onnx" for runtime in recipe.measured_runtimes):
        raise UserError(f"runtimes={options['runtimes']}: files are compared with runtimes of ONNX Runtime")
    config = ProfileConfig(
        runtimes=recipe.measured_runtimes,
        batch_sizes=recipe.measured_batch_sizes,
        threads=recipe.threads,
        seconds=seconds,
        seed=seed,
    )
    with Stages(Console(stderr=True), quiet=quiet) as stages, TemporaryDirectory(prefix="optin-compare-") as folder:
        files = _export_all(sources, recipe, Path(folder), stages)
        with stages.stage("measure"):
            comparison = compare_files(
                files["dense"], files["pruned"], _first_sample(sample), config, lambda done, _: report_progress(done)
            )
    flops = [count_flops(network.module, network.inputs) for network in networks]
    return Compared(comparison, flops[0] / flops[1] if len(flops) == 2 and flops[1] < flops[0] else None)


def _export_all(
    sources: Mapping[str, Network | Files], recipe: Recipe, folder: Path, stages: Stages
) -> dict[str, Variant]:
    """Return the files to measure; networks are exported to ``folder``."""
    variants: dict[str, Variant] = {}
    networks = {name: source for name, source in sources.items() if isinstance(source, Network)}
    with stages.stage("export"):
        for name, source in track(sources.items()):
            if isinstance(source, Network):
                variants[name] = Variant(folder / f"{name}.onnx", folder / f"{name}.pt2")
                export_files(source, folder / f"{name}.onnx", folder / f"{name}.pt2", recipe, (dict(source.inputs),))
            else:
                variants[name] = Variant(_path_of(source))
    if requested_engines(recipe):
        with stages.stage("build engines"):
            engines = build_engines(recipe, networks, folder)
        variants = {name: replace(variant, engines=engines[name]) for name, variant in variants.items()}
    return variants


def _path_of(file: Files) -> Path:
    return file.path if isinstance(file, OnnxFile) else Path(file)


def _validated(source: Network | Files) -> Network | Files:
    return validate(source) if isinstance(source, Network) else source


def _first_sample(inputs: Mapping[str, Tensor]) -> dict[str, NDArray[Any]]:
    return {name: tensor[:1].numpy() for name, tensor in inputs.items()}


def _as_network(source: Network | nn.Module, inputs: Mapping[str, Tensor] | None) -> Network:
    """Return a network as it is, or a module with its sample inputs as a network."""
    if isinstance(source, Network):
        if inputs is not None:
            raise UserError("inputs= is for a module: a network has its own")
        return validate(source)
    if inputs is None:
        kind = type(source).__name__
        raise UserError(f"a {kind} is not a network of optin_deploy: give inputs=, a sample batch by name")
    return custom_network(source, inputs)


def _make_recipe(source: Network | Files, **options: object) -> Recipe:
    """Make a recipe of the options of one step, which checks them like those of a run."""
    name = source.source.name if isinstance(source, Network) else str(_path_of(source))
    return make_recipe({"model": name, **{key: value for key, value in options.items() if value is not None}})


def _read_input_shapes(file: Path) -> dict[str, tuple[int | str, ...]]:
    """Read the input shapes of an ONNX file, with the names of dynamic axes."""
    import onnx

    if not file.is_file():
        raise UserError(f"{file} does not exist: export_onnx writes one")
    try:
        graph = onnx.load(str(file), load_external_data=False).graph
    except Exception as error:  # protobuf's own types
        raise UserError(f"{file} is not an ONNX file") from error
    weights = {tensor.name for tensor in graph.initializer}
    return {
        value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in graph.input
        if value.name not in weights
    }
