"""Check that engines compute what torch does, on inputs of the shapes that they take. This needs a GPU."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from exporters import check_engine, compare_outputs
from exporters.shapes import Range, Shape
from optin_deploy.config.recipe import Recipe
from optin_deploy.export.engines import EngineRequest, requested_engines
from optin_deploy.export.onnx_file import Parity, parity_batches, parity_tolerance
from optin_deploy.export.requirements import is_measurable
from optin_deploy.network import Network
from optin_deploy.nn.batches import Batches
from optin_deploy.tokens.near_ties import alternatives
from profilers import infer_file, lacking_device


def checkable_engines(recipe: Recipe) -> list[EngineRequest]:
    """Return the engines of each network that can be run here."""
    return [request for request in requested_engines(recipe) if is_checkable(recipe, request.runtime)]


def is_checkable(recipe: Recipe, runtime: str) -> bool:
    """Return whether engines of ``runtime`` can be run here: there is a device, and they have their weights."""
    return is_measurable(runtime) and not recipe.weight_stripped


def why_unchecked(recipe: Recipe) -> str | None:
    """Return a sentence that says why engines were not checked here; None where all were."""
    unchecked = [request.runtime for request in requested_engines(recipe) if not is_checkable(recipe, request.runtime)]
    if not unchecked:
        return None
    without_weights = "they are saved without weights (--weight-stripped)"
    reason = without_weights if recipe.weight_stripped else lacking_device(unchecked[0])
    return f"Engines were not checked against PyTorch: {reason}."


def check_engine_parity(network: Network, runtime: str, engine: Path, recipe: Recipe, held_out: Batches) -> Parity:
    """Compare an engine with the network in float32, on inputs that the network was not calibrated on.

    Raises:
        ExportError: the engine was not built for this machine; ProfilingError: it does not run.
    """
    batches = fit_batches(parity_batches(network, held_out, recipe.precision), check_engine(engine).inputs)
    feeds = [{name: tensor.numpy() for name, tensor in batch.items()} for batch in batches]
    outputs = infer_file(runtime, engine, feeds, recipe.threads)
    module, names = network.tensor_outputs(), tuple(network.outputs)
    return compare_outputs(module, outputs, batches, names, parity_tolerance(recipe), alternatives(network))


def fit_batches(batches: Batches, inputs: Mapping[str, Range]) -> list[dict[str, Tensor]]:
    """Cut each dimension to the nearest size that an engine takes, or repeat it from its beginning.

    Of batches that get the same shape, only the first one is returned.
    """
    fitted: dict[tuple[Shape, ...], dict[str, Tensor]] = {}
    for batch in batches:
        tensors = {name: _fit(tensor, inputs[name]) for name, tensor in batch.items()}
        fitted.setdefault(tuple(tuple(tensor.shape) for tensor in tensors.values()), tensors)
    return list(fitted.values())


def _fit(tensor: Tensor, sizes: Range) -> Tensor:
    for axis, (least, most) in enumerate(zip(sizes.least, sizes.most, strict=True)):
        size = min(max(tensor.shape[axis], least), most)
        tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
    return tensor
