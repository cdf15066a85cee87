"""The ONNX file of a network in the precision of a recipe, and whether it computes what torch does."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from exporters import (
    PARITY_TOLERANCES,
    OutputParity,
    Precision,
    check_parity,
    in_precision,
    is_quantized,
    onnx_in_precision,
    runnable_on_cpu,
    save_program,
    trace,
)
from optin_deploy.config.recipe import Recipe
from optin_deploy.data.calibration import Calibration
from optin_deploy.errors import GateError
from optin_deploy.network import Network
from optin_deploy.tokens.decisions import WithDecisions, decision_names, follow_decisions
from optin_deploy.tokens.near_ties import alternatives
from optin_deploy.utils.atomic_files import tell_written
from optin_deploy.utils.progress import Stages

Parity = tuple[OutputParity, ...]


Batches = Sequence[dict[str, Tensor]]


def export_files(network: Network, onnx: Path, program: Path, recipe: Recipe, batches: Batches) -> None:
    """Write the program and, where it is not there, the ONNX file, in the recipe's precision, calibrated on batches."""
    module, axes = network.tensor_outputs(), network.dynamic_axes
    traced = in_precision(trace(module, network.inputs, axes), recipe.precision, recipe.opset)
    save_program(traced, program)
    if not onnx.is_file():
        lower(network, onnx, recipe, batches, None if decision_names(network, recipe.precision) else traced)
        tell_written(onnx)


def lower(
    network: Network,
    onnx: Path,
    recipe: Recipe,
    batches: Batches,
    traced: torch.export.ExportedProgram | None = None,
) -> None:
    """Write the ONNX file in the recipe's precision, calibrated on batches; of ``traced``, where that is at hand and
    decides nothing that the file's parity is judged by."""
    decisions, axes = decision_names(network, recipe.precision), network.dynamic_axes
    if traced is None:
        module = WithDecisions(network) if decisions else network.tensor_outputs()
        traced = in_precision(trace(module, network.inputs, axes), recipe.precision, recipe.opset)
    onnx_in_precision(
        traced,
        onnx,
        recipe.precision,
        batches,
        output_names=tuple(network.outputs),
        dynamic_axes=axes,
        opset=recipe.opset,
        inner_names=decisions,
    )


def checked(network: Network, onnx: Path, held_out: Batches, recipe: Recipe) -> Parity:
    """How far the ONNX file is from the network in float32; its precision says how far it may be."""
    # TF32 is a way of GPUs to compute a file in float32: on a CPU the file has to be as exact as that is.
    tolerance = parity_tolerance(recipe) if recipe.precision != "tf32" else PARITY_TOLERANCES["fp32"]
    module, names = network.tensor_outputs(), tuple(network.outputs)
    batches = parity_batches(network, held_out, recipe.precision)
    with runnable_on_cpu(onnx, recipe.precision) as file:
        decisions = decision_names(network, recipe.precision)
        others = follow_decisions(network, tolerance) if decisions else alternatives(network)
        return check_parity(module, file, batches, names, tolerance, recipe.threads, others, decisions)


def parity_tolerance(recipe: Recipe) -> float:
    """What an error may be at most, relative to the largest output: asked for, or else that of the precision."""
    return recipe.parity_tolerance or PARITY_TOLERANCES[recipe.precision]


def parity_batches(network: Network, held_out: Batches, precision: Precision = "fp32") -> list[dict[str, Tensor]]:
    """Inputs of several batch sizes, and lengths for text, out of those that the network was not calibrated on.

    For 8 bits texts are cut until none of them is padded: what stands at padding is far from all else, in nobody's use,
    and would be the largest error.
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


def write_onnx(network: Network, path: Path, recipe: Recipe, samples: Calibration, stages: Stages) -> Parity:
    """Write the ONNX file and check it; GateError where it is not what torch computes."""
    with stages.stage("export ONNX"):
        lower(network, path, recipe, samples.batches)
    with stages.stage("check parity"):
        return _passed(checked(network, path, samples.held_out, recipe))


def _passed(parity: Parity, what: str = "") -> Parity:
    """``parity``; GateError unless all of it is passed."""
    failed = [f"{p.output} is off by {p.max_abs_error:.1e}{what}" for p in parity if not p.passed]
    if failed:
        raise GateError(f"parity: {'; '.join(failed)}; nothing is written (--parity-tolerance {parity[0].tolerance:g})")
    return parity
