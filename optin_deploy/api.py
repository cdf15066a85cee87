"""The functions to use from Python. Each is a step, takes plain values and gives one that shows itself.

score → plan → prune → save, load → export_onnx → build_engine → profile, compare. A whole run, with its report, budgets
in milliseconds and precision, is `optin_deploy.prune_export`.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, overload

import torch
from rich.console import Console
from torch import Tensor, nn

from exporters import EngineConfig, Precision, input_ranges, is_quantized
from exporters import build_engine as build_engine_file
from exporters.files import staged
from optin_deploy.api_results import Compared, EngineFile, OnnxFile, Scores
from optin_deploy.config.recipe import Recipe, make_recipe
from optin_deploy.criteria import scoring as scorers
from optin_deploy.criteria.scoring import Scoring
from optin_deploy.data.calibration import Calibration
from optin_deploy.errors import UserError
from optin_deploy.export.engines import build_engines, timing_cache, wanted_engines
from optin_deploy.export.onnx_file import export_files, write_onnx
from optin_deploy.export.requirements import check_measurable, check_runtimes
from optin_deploy.latency.tables import target_of
from optin_deploy.models.custom import custom_network
from optin_deploy.models.intake import validate
from optin_deploy.network import Network
from optin_deploy.nn.flops import count_flops
from optin_deploy.pruning import pruner
from optin_deploy.pruning.head_rotation import in_principal_bases
from optin_deploy.pruning.pruner import Batches, Pruned, Ridge, Tokens, examine, examine_as
from optin_deploy.report.profile_view import NetworkProfile
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
    "Scores",
    "build_engine",
    "compare",
    "export_onnx",
    "plan",
    "profile",
    "prune",
    "score",
]


@torch.inference_mode(False)
def score(
    network: Network,
    batches: Batches,
    scoring: Scoring | None = None,
    *,
    labels: Sequence[Tensor] | None = None,
    narrow: bool | None = None,
) -> Scores:
    """What every head, dimension of heads, neuron and channel is worth.

    Args:
        batches: calibration inputs, by the names that forward has for them, on the network's device.
        scoring: the criterion and its settings; `Scoring()` when None.
        labels: class numbers ``(samples,)`` for each batch, for the criterion "fisher".
        narrow: whether heads may also get narrower; None leaves it to the criterion.

    Raises:
        UserError: nothing is prunable, or the network gives NaN or infinity on the calibration data.

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
    network = pruner.validate_on(network, batches)
    anatomy = examine(network, narrow=scoring.narrows_heads if narrow is None else narrow)
    dense = in_principal_bases(network, anatomy.structure, batches)
    found = scorers.score(dense, anatomy.structure, anatomy.costs, batches, scoring, labels=labels)
    return Scores(found, scoring, sum(len(next(iter(batch.values()))) for batch in batches))


def plan(network: Network, scores: Mapping[str, Tensor], flops: float, *, align: int = 64) -> Plan:
    """The units to keep: those that are worth most together under a budget of FLOPs, by exact search.

    Budgets in milliseconds need latency tables and networks that are built and measured on the way:
    `optin_deploy.prune_export` has them, and merging of tokens.

    Args:
        scores: of `score`, or those that a run has left in scores.safetensors.
        flops: part of the network's FLOPs to keep, above 0 and below 1.
        align: neurons are kept in multiples of this number, finer where layers are narrow.

    Raises:
        UserError: the budget is out of range or below the floor, or the scores are of another network.

    Example:
        >>> import optin_deploy
        >>> network = optin_deploy.load_network("test_vit", weights="random", image_size=32)
        >>> scores = optin_deploy.score(network, [network.inputs], optin_deploy.Scoring("magnitude"))
        >>> optin_deploy.plan(network, scores, flops=0.5)
        Plan(blocks.0.attn: ..., blocks.0.mlp: ..., ...)
    """
    pruner.check_share(flops)
    anatomy = examine_as(validate(network), scores)
    for group in anatomy.structure.groups:
        if group.name not in scores or len(scores[group.name]) != group.units:
            raise UserError(f"the scores are of another network: they have none for the {group.units} of {group.name}")
    return search(anatomy.structure, scores, anatomy.costs, flops, align)


@overload
def prune(
    network: Network,
    batches: Batches,
    flops: float,
    *,
    scoring: Scoring | None = None,
    labels: Sequence[Tensor] | None = None,
    align: int = 64,
    ridge: Ridge = "auto",
    rounds: int = 1,
    narrow: bool | None = None,
    tokens: Tokens = "off",
    tokens_share: float | None = None,
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
    **options: Any,
) -> Pruned:
    """A smaller network: score, search, slice and repair in one call, or slice and repair by a plan.

    ``network`` is not changed.

    Args:
        batches: calibration inputs, by the names that forward has for them, on the network's device.
        flops: part of the network's FLOPs to keep, above 0 and below 1.
        plan: what to keep, of `plan`, in place of a budget; what is said of scores and search has then no place.
        ridge: strength of the repair's ridge, "auto" to choose it on held-out batches, None for no repair.
        **options: ``scoring`` and ``labels`` as for `score`, ``align`` as for `plan`; ``narrow``: whether heads may
            get narrower; ``rounds``: in how many steps the budget is approached, each scored anew; ``tokens``: how many
            tokens enter each block, "auto" to find it with the units; ``tokens_share``: the part of the FLOPs removed
            that merging tokens is to remove.

    Raises:
        UserError: nothing is prunable, tokens cannot merge, the budget is out of range or below the floor, the plan
            does not fit, or both or neither of the two are given.

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
    if (flops is None) == (plan is None):
        raise UserError("prune takes flops=0.5, say, or plan=a plan: give one of the two")
    if plan is None:
        assert flops is not None
        return pruner.prune(network, batches, flops, ridge=ridge, **options)
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
    """Write one ONNX file, checked against torch; whole or not at all, over one that was there.

    Args:
        network: with dynamic batch and, for texts, sequence; of a module the batch is dynamic.
        path: ends in ``.onnx``.
        inputs: for a module: a sample batch by forward's argument names, first axis the batch.
        calibration: int8 and fp8 are calibrated on its batches, and the file is checked on what it holds out; on the
            sample inputs when None.
        precision: written into the file.
        tolerance: largest error allowed, relative to the largest output; that of the precision when None.
        quiet: no progress is shown.

    Raises:
        UserError: an argument is wrong; GateError: the file does not compute what torch does; ExportError: the network
            cannot be exported. Nothing is written by any of them.

    Example:
        >>> import timm, torch, optin_deploy
        >>> module = timm.create_model("test_vit", img_size=32, num_classes=10, depth=1)
        >>> network = optin_deploy.custom_network(module, {"x": torch.randn(2, 3, 32, 32)}, logits="output")
        >>> optin_deploy.export_onnx(network, "dense.onnx")
        <OnnxFile dense.onnx (... MiB, fp32): x [batch, 3, 32, 32] -> output; largest error against torch ...>
    """
    path, given = Path(path), _network(network, inputs)
    if path.suffix != ".onnx":
        raise UserError(f"{path}: the name of an ONNX file ends in .onnx")
    if calibration is None and is_quantized(precision):
        raise UserError(
            f"precision={precision!r} is calibrated: give calibration=, of load_calibration or from_batches"
        )
    sample = dict(given.inputs)
    samples = calibration or Calibration(
        (sample,), (sample,), "sample inputs", False, len(next(iter(sample.values()))), ""
    )
    recipe = _recipe(given, precision=precision, opset=opset, parity_tolerance=tolerance)
    check_runtimes(recipe)
    with Stages(Console(stderr=True), quiet=quiet) as stages, staged(path) as temporary:
        parity = write_onnx(given, temporary, recipe, samples, stages)
    axes = given.dynamic_axes
    sizes = {label: sample[name].shape[axis] for name, of in axes.items() for axis, label in of.items()}
    shapes = {name: tuple(axes[name].get(i, n) for i, n in enumerate(t.shape)) for name, t in sample.items()}
    return OnnxFile(path, precision, shapes, tuple(given.outputs), sizes, parity)


def build_engine(
    onnx: OnnxFile | str | Path,
    path: str | Path,
    config: EngineConfig | None = None,
    *,
    batch_sizes: Sequence[int] = (1, 8),
    best: int | None = None,
    static: bool = False,
    sizes: Mapping[str, int] | None = None,
) -> EngineFile:
    """Build an engine from an ONNX file; it appears whole or not at all, with what it needs in `ENGINE.json`.

    Args:
        path: of the engine.
        config: which product builds it (TensorRT for RTX when None, which takes no GPU to build) and how.
        batch_sizes: it takes every size from the least to the most of them.
        best: the batch size that it is fastest at; the largest when None.
        static: it takes ``best`` only, and of other dynamic axes only their largest size.
        sizes: name of a dynamic axis but the batch -> its largest size; an `OnnxFile` knows those of its sample.

    Raises:
        UserError: an axis has no size; ExportError: the builder is not there or cannot build it.

    Example:
        >>> import timm, torch, optin_deploy
        >>> module = timm.create_model("test_vit", img_size=32, num_classes=10, depth=1)
        >>> network = optin_deploy.custom_network(module, {"x": torch.randn(2, 3, 32, 32)}, logits="output")
        >>> onnx = optin_deploy.export_onnx(network, "dense.onnx")
        >>> optin_deploy.build_engine(onnx, "dense.rtx.engine", optin_deploy.EngineConfig("rtx"), batch_sizes=(1, 4))
        <EngineFile dense.rtx.engine (rtx ...): x [1, 3, 32, 32] to [4, 3, 32, 32]>
    """
    config = config or EngineConfig("rtx")
    file = onnx.path if isinstance(onnx, OnnxFile) else Path(onnx)
    known = {**(onnx.sizes if isinstance(onnx, OnnxFile) else {}), **(sizes or {}), "batch": max(batch_sizes)}
    named = _onnx_shapes(file)
    unknown = sorted({d for shape in named.values() for d in shape if isinstance(d, str) and d not in known})
    if unknown:
        raise UserError(f"{file}: how large may {', '.join(unknown)} be? Give sizes={{{unknown[0]!r}: 128}}, say")
    axes = {n: {i: d for i, d in enumerate(shape) if isinstance(d, str)} for n, shape in named.items()}
    shapes = {n: tuple(known[d] if isinstance(d, str) else d for d in shape) for n, shape in named.items()}
    ranges = input_ranges(shapes, axes, batch_sizes, best or max(batch_sizes), static=static)
    info = build_engine_file(file, Path(path), ranges, config, _timing_cache(config))
    return EngineFile(Path(path), info)


def profile(
    what: Network | nn.Module | OnnxFile | str | Path,
    inputs: Mapping[str, Tensor] | None = None,
    *,
    runtime: str = "ort-cpu",
    batch_size: int = 1,
    threads: int | None = None,
    seconds: float = 10.0,
    quiet: bool = True,
) -> NetworkProfile:
    """Measure one network here, in a process of its own: p50, p90 and p99 of its latency, and where the time goes.

    Args:
        what: a network, a module with something prunable in it, or an ONNX file, of which time is told by operator.
        inputs: a sample batch by name, for a module or a file.
        runtime: what runs it, one of `profilers.RUNTIMES`; of files, those of ONNX Runtime.
        batch_size: samples in one run.
        threads: CPU threads; all physical cores when None.
        seconds: time limit of the measurement; the profile by part takes at most as long again.
        quiet: no progress is shown.

    Raises:
        UserError: an argument is wrong; ProfilingError: the runtime failed.

    Example:
        >>> import timm, torch, optin_deploy
        >>> module = timm.create_model("test_vit", img_size=32, num_classes=10, depth=1)
        >>> network = optin_deploy.custom_network(module, {"x": torch.randn(2, 3, 32, 32)}, logits="output")
        >>> optin_deploy.profile(network, seconds=0.2, threads=1)
        <NetworkProfile ONNX Runtime, batch 1, 1 thread: p50 ... ms, p90 ... ms, p99 ... ms; most of it ...>
    """
    network = None if isinstance(what, OnnxFile | str | Path) else _network(what, inputs)
    file = what.path if isinstance(what, OnnxFile) else Path(what) if isinstance(what, str | Path) else None
    options = {"runtime": runtime, "batch_size": batch_size, "threads": threads, "profile_seconds": seconds}
    recipe = _recipe(network or file, **options)
    check_runtimes(recipe)
    check_measurable(runtime)
    with Stages(Console(stderr=True), quiet=quiet) as stages, stages.stage("measure"):
        if network is not None:
            return profile_network(network, target_of(recipe), seconds)
        assert file is not None
        if inputs is None or RUNTIMES[runtime] != "onnx":
            raise UserError(f"{file}: a file is profiled with inputs=, a sample batch, and a runtime of ONNX Runtime")
        sample = {name: tensor[:1].numpy() for name, tensor in inputs.items()}
        return profile_onnx(file, sample, target_of(recipe), seconds)


def compare(
    dense: Network | OnnxFile | str | Path,
    pruned: Network | OnnxFile | str | Path,
    inputs: Mapping[str, Tensor] | None = None,
    *,
    runtimes: Sequence[str] = ("ort-cpu",),
    batch_sizes: Sequence[int] = (1, 8),
    threads: int | None = None,
    seconds: float = 10.0,
    seed: int = 0,
    quiet: bool = True,
) -> Compared:
    """Measure two networks against each other here: dense, dense again and pruned take turns in one process.

    The speed-up has a 95 % interval; dense against dense is the noise floor, and no speed-up inside it is significant.
    Networks are exported in float32 first, ONNX files are measured as they are.

    Args:
        inputs: a sample batch by name, where neither of the two is a `Network`.
        runtimes: what runs them, of `profilers.RUNTIMES`; of files, those of ONNX Runtime.
        batch_sizes: samples in one run.
        threads: CPU threads; all physical cores when None.
        seconds: time limit for each runtime and batch size.
        seed: of the order of turns and of the bootstrap.
        quiet: no progress is shown.

    Raises:
        UserError: an argument is wrong; ExportError, ProfilingError: an export or a runtime failed.

    Example:
        >>> import timm, torch, optin_deploy
        >>> module = timm.create_model("test_vit", img_size=32, num_classes=10, depth=1)
        >>> network = optin_deploy.custom_network(module, {"x": torch.randn(2, 3, 32, 32)}, logits="output")
        >>> pruned = optin_deploy.prune(network, [network.inputs], flops=0.5)
        >>> optin_deploy.compare(network, pruned.network, batch_sizes=(1,), seconds=0.2, threads=1)
        ONNX Runtime, batch 1: ...× [...–...]..., p50 ... -> ... ms, A/A noise ±... %, realised ...
    """
    variants = {
        name: validate(each) if isinstance(each, Network) else each
        for name, each in {"dense": dense, "pruned": pruned}.items()
    }
    networks = {name: each for name, each in variants.items() if isinstance(each, Network)}
    known = inputs or next((network.inputs for network in networks.values()), None)
    if known is None:
        raise UserError("files are compared with inputs=, a sample batch by name")
    options = {"runtimes": tuple(runtimes), "batch_sizes": tuple(batch_sizes), "threads": threads, "seed": seed}
    recipe = _recipe(dense, **options, profile_seconds=seconds)
    check_runtimes(recipe)
    for runtime in recipe.measured_runtimes:
        check_measurable(runtime)
    if len(networks) < len(variants) and any(RUNTIMES[runtime] != "onnx" for runtime in recipe.measured_runtimes):
        raise UserError(f"runtimes={options['runtimes']}: files are compared with runtimes of ONNX Runtime")
    config = ProfileConfig(
        runtimes=recipe.measured_runtimes,
        batch_sizes=recipe.measured_batch_sizes,
        threads=recipe.threads,
        seconds=seconds,
        seed=seed,
    )
    sample = {name: tensor[:1].numpy() for name, tensor in known.items()}
    with Stages(Console(stderr=True), quiet=quiet) as stages, TemporaryDirectory(prefix="optin-compare-") as folder:
        files = _variants(variants, recipe, Path(folder), stages)
        with stages.stage("measure"):
            measured = compare_files(
                files["dense"], files["pruned"], sample, config, lambda done, _: report_progress(done)
            )
    flops = [count_flops(network.module, network.inputs) for network in networks.values()]
    return Compared(measured, flops[0] / flops[1] if len(flops) == 2 and flops[1] < flops[0] else None)


def _variants(
    given: Mapping[str, Network | OnnxFile | str | Path], recipe: Recipe, folder: Path, stages: Stages
) -> dict[str, Variant]:
    """The files to be measured: those given, and what is exported of networks."""
    found: dict[str, Variant] = {}
    networks = {name: each for name, each in given.items() if isinstance(each, Network)}
    with stages.stage("export"):
        for name, each in track(given.items()):
            if isinstance(each, Network):
                found[name] = Variant(folder / f"{name}.onnx", folder / f"{name}.pt2")
                export_files(each, folder / f"{name}.onnx", folder / f"{name}.pt2", recipe, (dict(each.inputs),))
            else:
                found[name] = Variant(each.path if isinstance(each, OnnxFile) else Path(each))
    if wanted_engines(recipe):
        with stages.stage("build engines"):
            engines = build_engines(recipe, networks, folder)
        found = {n: Variant(v.onnx, v.program, engines[n]) for n, v in found.items()}
    return found


def _network(given: Network | nn.Module, inputs: Mapping[str, Tensor] | None) -> Network:
    """A network around a module with its sample inputs; a network has its own."""
    if isinstance(given, Network):
        if inputs is not None:
            raise UserError("inputs= is for a module: a network has its own")
        return validate(given)
    if inputs is None:
        raise UserError(f"a {type(given).__name__} is no network of optin_deploy: give inputs=, a sample batch by name")
    return custom_network(given, inputs)


def _recipe(what: object, **options: Any) -> Recipe:
    """The options of one step, checked as those of a run are."""
    name = what.source.name if isinstance(what, Network) else str(getattr(what, "path", what))
    return make_recipe({"model": name, **{key: value for key, value in options.items() if value is not None}})


def _timing_cache(config: EngineConfig) -> Path | None:
    from exporters import check_builder

    check_builder(config)
    return timing_cache(config.builder)


def _onnx_shapes(file: Path) -> dict[str, tuple[int | str, ...]]:
    """Shapes of the inputs of an ONNX file, with the names of dynamic axes."""
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
