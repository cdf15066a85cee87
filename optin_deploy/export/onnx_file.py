"""Write the ONNX file of a network in the precision of a recipe, and check that it computes what torch does."""

from pathlib import Path

import torch

from exporters import (
    PARITY_TOLERANCES,
    OnnxSpec,
    OutputParity,
    Precision,
    compare_outputs,
    in_precision,
    is_quantized,
    onnx_in_precision,
    run_onnx,
    runnable_on_cpu,
    save_program,
    trace,
)
from optin_deploy.config.recipe import Recipe
from optin_deploy.data.calibration import Calibration
from optin_deploy.errors import GateError
from optin_deploy.network import Network
from optin_deploy.nn.batches import Batches
from optin_deploy.tokens.decisions import WithDecisions, decision_names, follow_decisions
from optin_deploy.tokens.near_ties import alternatives
from optin_deploy.utils.atomic_files import log_written
from optin_deploy.utils.progress import Stages

Parity = tuple[OutputParity, ...]


def export_files(network: Network, onnx: Path, program: Path, recipe: Recipe, batches: Batches) -> None:
    """Write the program and, where it is missing, the ONNX file, in the recipe's precision, calibrated on batches."""
    traced = _trace(network, network.tensor_outputs(), recipe)
    save_program(traced, program)
    if onnx.is_file():
        return
    if decision_names(network, recipe.precision):
        traced = _trace(network, WithDecisions(network), recipe)
    _write_unchecked(network, traced, onnx, recipe, batches)
    log_written(onnx)


def write_onnx(network: Network, path: Path, recipe: Recipe, samples: Calibration, stages: Stages) -> Parity:
    """Write the ONNX file and check it; GateError where it does not compute what torch does."""
    with stages.stage("export ONNX"):
        decisions = decision_names(network, recipe.precision)
        module = WithDecisions(network) if decisions else network.tensor_outputs()
        _write_unchecked(network, _trace(network, module, recipe), path, recipe, samples.batches)
    with stages.stage("check parity"):
        return require_parity(check_onnx(network, path, samples.held_out, recipe))


def _trace(network: Network, module: torch.nn.Module, recipe: Recipe) -> torch.export.ExportedProgram:
    return in_precision(trace(module, network.inputs, network.dynamic_axes), recipe.precision, recipe.opset)


def _write_unchecked(
    network: Network, program: torch.export.ExportedProgram, onnx: Path, recipe: Recipe, batches: Batches
) -> None:
    """Write the ONNX file; ``program`` returns the decisions by which parity is checked after the outputs."""
    decisions = decision_names(network, recipe.precision)
    spec = OnnxSpec(tuple(network.outputs), network.dynamic_axes, recipe.opset, decisions)
    onnx_in_precision(program, onnx, spec, recipe.precision, batches)


def check_onnx(network: Network, onnx: Path, held_out: Batches, recipe: Recipe) -> Parity:
    """Compare the ONNX file with the network in float32, by the tolerance of the recipe's precision."""
    # GPUs may compute a float32 file in TF32, but a CPU computes it exactly.
    tolerance = parity_tolerance(recipe) if recipe.precision != "tf32" else PARITY_TOLERANCES["fp32"]
    decisions, names = decision_names(network, recipe.precision), tuple(network.outputs)
    others = follow_decisions(network, tolerance) if decisions else alternatives(network)
    batches = parity_batches(network, held_out, recipe.precision)
    with runnable_on_cpu(onnx, recipe.precision) as file:
        outputs = run_onnx(file, batches, names, decisions, recipe.threads)
    return compare_outputs(network.tensor_outputs(), outputs, batches, names, tolerance, others)


def parity_tolerance(recipe: Recipe) -> float:
    """Return the largest error allowed, relative to the largest output: the recipe's, or else the precision's."""
    return recipe.parity_tolerance or PARITY_TOLERANCES[recipe.precision]


def parity_batches(network: Network, held_out: Batches, precision: Precision = "fp32") -> list[dict[str, torch.Tensor]]:
    """Return inputs of several batch sizes, and lengths for text, that the network was not calibrated on.

    For 8 bits, texts are cut so that none is padded: outputs at padding are far from all others and unused, and they
    would be the largest error.
    """
    batches = []
    for count in (1, 3, 8):
        batch = {name: t[:count] for name, t in held_out[0].items()}
        valid = network.valid_tokens(batch)
        lengths = valid.sum(1) if valid is not None else torch.zeros(1)
        length = int(lengths.min() if is_quantized(precision) else lengths.max())
        batches.append(
            {name: t[:, :length] if name in network.sequence_inputs and length else t for name, t in batch.items()}
        )
    return batches


def require_parity(parity: Parity, product: str = "") -> Parity:
    """Return ``parity``; GateError unless all outputs pass. ``product`` is what computed them, for the message."""
    suffix = f" with {product}" if product else ""
    failed = [f"{p.output} is off by {p.max_abs_error:.1e}{suffix}" for p in parity if not p.passed]
    if failed:
        raise GateError(f"parity: {'; '.join(failed)}; nothing is written (--parity-tolerance {parity[0].tolerance:g})")
    return parity
