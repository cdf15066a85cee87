"""One row of the coverage table, through the package's own interface: prune, slice, save, load, export, measure."""

import copy
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch_pruned
from coverage_cases import Architecture
from torch import Tensor, nn

import optin_deploy
from exporters import check_parity, onnx_from_program, trace
from optin_deploy import Network, UserError, custom_network
from optin_deploy.export.onnx_file import parity_batches
from optin_deploy.network import TensorOutputs
from optin_deploy.nn.flops import count_flops
from optin_deploy.nn.outputs import named_outputs
from optin_deploy.pruning.pruner import Pruned
from optin_deploy.pruning.space import PruningSpace, analyze
from optin_deploy.search.knapsack import BUDGET_WINDOW, lowest
from optin_deploy.structure.masking import mask_units
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network
from optin_deploy.structure.unpruned import find_unpruned
from profilers.measure import Case, measure_files
from profilers.stats import ratio_interval

COLUMNS = ("score", "slice", "budget", "reload", "onnx", "speed")
PEER_COLUMNS = ("runs", "budget", "onnx")
FLOPS = 0.5
_BATCH, _BATCHES = 4, 2
_SLICED_TOLERANCE, _RELOADED_TOLERANCE = 1e-5, 1e-6
# Of the lowest reachable share, where that is above `FLOPS`: rounded up to such steps, with some room.
_STEP, _ROOM = 0.05, 0.02
_REASON_CHARACTERS = 160

Outcome = str | None
"""What a column says: None where it passed, or why it failed."""


@dataclass
class Row:
    """What was found out of one architecture.

    Attributes:
        columns: of `COLUMNS` those that were tried.
        prunable: the part of the FLOPs in prunable groups.
        asked, reached: parts of the FLOPs.
        left_dense: what stays dense, see `optin_deploy.structure.unpruned`.
        speedup, noise: dense ÷ pruned and dense ÷ dense again, with 95 % intervals.
        peer: the same of torch-pruning, of `PEER_COLUMNS`; ``peer_reached`` is its part of the FLOPs.
        seconds: of the processor that each step took, without what measures.
    """

    columns: dict[str, Outcome] = field(default_factory=dict)
    dense_flops: int = 0
    prunable: float = 0.0
    asked: float | None = None
    reached: float | None = None
    left_dense: list[dict[str, Any]] = field(default_factory=list)
    speedup: dict[str, float] | None = None
    noise: dict[str, float] | None = None
    peer: dict[str, Outcome] = field(default_factory=dict)
    peer_reached: float | None = None
    seconds: dict[str, float] = field(default_factory=dict)


def network_of(architecture: Architecture) -> Network:
    """The dense network with its sample inputs."""
    inputs = architecture.inputs(2, 0)
    network = custom_network(architecture.module(), inputs, logits=architecture.logits)
    names = architecture.outputs or tuple(network.outputs)
    return replace(
        network,
        outputs={name: name for name in names},
        source=architecture.source or network.source,
        weights="random",
        sequence_inputs=tuple(inputs) if architecture.text else (),
        token_mask="attention_mask" if architecture.text else None,
    )


def examined(architecture: Architecture, measure_seconds: float) -> Row:
    """All columns of one architecture; ``measure_seconds`` is the time limit of the speed column, 0 for none."""
    row = Row()
    pruned: list[Pruned] = []
    network = network_of(architecture)
    row.dense_flops = count_flops(network.module, network.inputs)
    batches = [architecture.inputs(_BATCH, 1 + i) for i in range(_BATCHES + 1)]
    with _step(row, "score"):
        pruned.append(_pruned(row, network, batches[:-1]))
    if not pruned:
        return row
    plan, small = pruned[0].plan, pruned[0].network
    with _step(row, "slice"):
        _check_sliced(network, pruned[0].space, plan)
    with _step(row, "budget"):
        _check_budget(row, network, small)
    with TemporaryDirectory(prefix="optin-coverage-") as folder:
        with _step(row, "reload"):
            _check_reloaded(architecture, small, plan, Path(folder, "checkpoint"))
        with _step(row, "onnx"):
            _export(small, Path(folder, "pruned.onnx"), batches[-1])
        if measure_seconds and row.columns["onnx"] is None:
            with _step(row, "speed"):
                _check_speed(row, network, Path(folder), batches[-1], measure_seconds)
    return row


def peer(architecture: Architecture, asked: float) -> Row:
    """What torch-pruning makes of it: whether it runs, comes to ``asked`` of the FLOPs, and exports."""
    row, found = Row(), []
    network = network_of(architecture)
    with _step(row, "runs", row.peer):
        found.append(torch_pruned.closest(network, asked))
        _check_outputs(network, found[0][0])
    if not found:
        return row
    module, row.peer_reached = found[0]
    with _step(row, "budget", row.peer):
        _expect(abs(row.peer_reached - asked) <= torch_pruned.WINDOW, f"{row.peer_reached:.3f}, asked for {asked:.2f}")
    if row.peer["runs"] is None:
        with TemporaryDirectory(prefix="optin-coverage-") as folder, _step(row, "onnx", row.peer):
            _export(network.with_module(module), Path(folder, "pruned.onnx"), architecture.inputs(_BATCH, 3))
    return row


@contextmanager
def _step(row: Row, name: str, columns: dict[str, Outcome] | None = None) -> Iterator[None]:
    """One column: it passes unless something is raised, which is written down and goes no further."""
    columns = row.columns if columns is None else columns
    start = time.process_time()
    try:
        yield
        columns[name] = None
    except Exception as error:  # whatever a library raises is what the table has to tell
        columns[name] = in_a_line(error)
    row.seconds[name] = round(time.process_time() - start, 2)


def in_a_line(error: BaseException) -> str:
    """What an exception says, short."""
    text = " ".join(str(error).split()) or type(error).__name__
    kind = "" if isinstance(error, UserError | _FailedError) else f"{type(error).__name__}: "
    return f"{kind}{text}"[:_REASON_CHARACTERS]


class _FailedError(Exception):
    """A column did not pass."""


def _expect(holds: bool, otherwise: str) -> None:
    if not holds:
        raise _FailedError(otherwise)


def _pruned(row: Row, network: Network, batches: list[dict[str, Tensor]]) -> Pruned:
    """Pruned to half of the FLOPs or, where that cannot be, to the least that can, rounded up."""
    row.asked = FLOPS
    try:
        found = optin_deploy.prune(network, batches, FLOPS)
    except UserError:
        space = analyze(network)
        _describe(row, network, space)
        floor = lowest(space.structure, space.costs)
        if floor <= FLOPS:
            raise
        row.asked = math.ceil((floor + _ROOM) / _STEP) * _STEP
        _expect(row.asked < 1, f"only {row.prunable:.1%} of the FLOPs are prunable")
        found = optin_deploy.prune(network, batches, row.asked)
    _describe(row, network, found.space)
    odd = [name for name, s in found.scores.items() if not torch.isfinite(s).all() or bool((s < 0).any())]
    _expect(not odd, f"scores of {', '.join(odd[:2])} are not numbers of at least 0")
    return found


def _describe(row: Row, network: Network, space: PruningSpace) -> None:
    row.prunable = 1 - space.costs.floor / space.costs.total
    row.left_dense = [asdict(each) for each in find_unpruned(network.module, space.structure, network.inputs)]


@torch.no_grad()
def _check_sliced(network: Network, space: PruningSpace, plan: Plan) -> None:
    """Sliced, not compensated, is masked to 1e-5 of the largest value; in float64 where rounding alone is more."""
    structure, errors = space.structure, []
    for dtype in (torch.float32, torch.float64):
        module = network.module if dtype == torch.float32 else copy.deepcopy(network.module).double()
        inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in network.inputs.items()}
        masks = {name: _mask(structure.group(name).units, kept, dtype) for name, kept in plan.kept.items()}
        with mask_units(module, structure, masks):
            expected = named_outputs(module(**inputs))
        errors.append(_error(expected, named_outputs(slice_network(module, structure, plan)(**inputs))))
        if errors[-1] <= _SLICED_TOLERANCE:
            return
    raise _FailedError(f"sliced is {min(errors):.1e} of the largest value off masked")


def _mask(units: int, kept: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    mask = torch.zeros(units, dtype=dtype)
    mask[list(kept)] = 1
    return mask


def _error(expected: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> float:
    """The largest difference, relative to the largest value of its output."""
    _expect(set(expected) == set(given), "other outputs than the dense network's")
    worst = 0.0
    for name, tensor in expected.items():
        _expect(tensor.shape == given[name].shape, f"{name} has another shape")
        if tensor.is_floating_point():
            worst = max(worst, float((tensor - given[name]).abs().max() / tensor.abs().max().clamp_min(1e-12)))
    return worst


def _check_budget(row: Row, network: Network, small: Network) -> None:
    assert row.asked is not None
    row.reached = count_flops(small.module, network.inputs) / row.dense_flops
    met = row.asked - BUDGET_WINDOW <= row.reached <= row.asked
    _expect(met, f"{row.reached:.3f} of the FLOPs, asked for {row.asked:.2f}")
    few = row.asked > FLOPS and row.prunable >= 0.6
    _expect(not few, f"{row.prunable:.0%} of the FLOPs are prunable, but what has to stay is more than {FLOPS:g}")


@torch.no_grad()
def _check_reloaded(architecture: Architecture, small: Network, plan: Plan, path: Path) -> None:
    optin_deploy.save(small, plan, path)
    own = architecture.module() if architecture.source is None else None
    again = optin_deploy.load(path, module=own)
    error = _error(small.forward(small.inputs), small.forward(small.inputs, again))
    _expect(error <= _RELOADED_TOLERANCE, f"off by {error:.1e} of the largest value when it is loaded again")


def _export(network: Network, path: Path, batch: Mapping[str, Tensor]) -> None:
    """Write the ONNX file and compare it with torch at three batch sizes."""
    tensors, names = TensorOutputs(network.module, network.outputs), tuple(network.outputs)
    program = trace(tensors, network.inputs, network.dynamic_axes)
    onnx_from_program(program, path, output_names=names, dynamic_axes=network.dynamic_axes)
    for parity in check_parity(tensors, path, parity_batches(network, (dict(batch),)), names, threads=1):
        _expect(parity.passed, f"{parity.output} is off by {parity.max_abs_error:.1e} under ONNX Runtime")


def _check_speed(row: Row, dense: Network, folder: Path, batch: Mapping[str, Tensor], seconds: float) -> None:
    """Interleaved under ONNX Runtime at batch 1, one thread: not slower than dense beyond its own noise."""
    files = {name: folder / f"{name}.onnx" for name in ("dense", "pruned")}
    try:
        _export(dense, files["dense"], batch)
    except Exception as error:
        raise _FailedError(f"the dense network cannot be exported: {in_a_line(error)}") from error
    sample = dense.sample_arrays()
    three = {"dense": files["dense"], "again": files["dense"], "pruned": files["pruned"]}
    case = Case("ort-cpu", 1, threads=1, seconds=seconds)
    samples = measure_files(three, sample, case, [("dense", "pruned"), ("dense", "again")]).samples_ms
    speedup, noise = (ratio_interval(samples["dense"], samples[name]) for name in ("pruned", "again"))
    row.speedup, row.noise = asdict(speedup), asdict(noise)
    _expect(speedup.high >= min(1.0, noise.low), f"{speedup.value:.2f}×: slower than dense")


@torch.no_grad()
def _check_outputs(network: Network, module: nn.Module) -> None:
    given, dense = network.forward(network.inputs, module), network.forward(network.inputs)
    # What is no logits may get narrower: its users know how wide it is.
    if network.logits is not None:
        shape, wanted = (tuple(outputs[network.logits].shape) for outputs in (given, dense))
        _expect(shape == wanted, f"{network.logits} of shape {shape} in place of {wanted}")
