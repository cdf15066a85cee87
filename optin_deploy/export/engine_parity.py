"""Whether engines compute what torch does, on inputs of the shapes that they take. That takes a GPU to run them."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from exporters import OutputParity, check_engine, compare_outputs
from exporters.trt_engine import Range, Shape
from optin_deploy.config.recipe import Recipe
from optin_deploy.export.engines import Wanted, wanted_engines
from optin_deploy.export.requirements import is_measurable
from optin_deploy.network import Network
from optin_deploy.tokens.near_ties import alternatives
from profilers import infer_file, lacking_device

Batch = dict[str, Tensor]


def checkable_engines(recipe: Recipe) -> list[Wanted]:
    """The engines of each network that can be run here: those with weights, where there is a GPU."""
    return [each for each in wanted_engines(recipe) if is_checkable(recipe, each.runtime)]


def is_checkable(recipe: Recipe, runtime: str) -> bool:
    """Whether engines of ``runtime`` can be run here: there is a device, and they have their weights."""
    return is_measurable(runtime) and not recipe.weight_stripped


def unchecked(recipe: Recipe) -> str | None:
    """Why engines were not checked here, in a sentence; None where all were."""
    left = [each.runtime for each in wanted_engines(recipe) if each not in checkable_engines(recipe)]
    if not left:
        return None
    without_weights = "they are saved without weights (--weight-stripped)"
    reason = without_weights if recipe.weight_stripped else lacking_device(left[0])
    return f"Engines were not checked against PyTorch: {reason}."


def check_engine_parity(
    network: Network, runtime: str, engine: Path, batches: Sequence[Batch], tolerance: float, threads: int | None
) -> tuple[OutputParity, ...]:
    """How far an engine is from the network in float32, see `exporters.check_parity`.

    Args:
        batches: brought to the shapes that the engine takes, see `admitted`.

    Raises:
        ExportError: the engine is not for this place; ProfilingError: it does not run.
    """
    fitting = admitted(batches, check_engine(engine).inputs)
    feeds = [{name: tensor.numpy() for name, tensor in batch.items()} for batch in fitting]
    outputs = infer_file(runtime, engine, feeds, threads)
    module = network.tensor_outputs()
    return compare_outputs(module, outputs, fitting, tuple(network.outputs), tolerance, alternatives(network))


def admitted(batches: Sequence[Batch], inputs: Mapping[str, Range]) -> list[Batch]:
    """The batches, each dimension cut or repeated from its beginning to the nearest size that an engine takes; those
    that come out in one shape are taken once."""
    found: dict[tuple[Shape, ...], Batch] = {}
    for batch in batches:
        fitting = {name: _fitted(tensor, inputs[name]) for name, tensor in batch.items()}
        found.setdefault(tuple(tuple(tensor.shape) for tensor in fitting.values()), fitting)
    return list(found.values())


def _fitted(tensor: Tensor, sizes: Range) -> Tensor:
    for axis, (least, most) in enumerate(zip(sizes.least, sizes.most, strict=True)):
        size = min(max(tensor.shape[axis], least), most)
        tensor = tensor.index_select(axis, torch.arange(size) % tensor.shape[axis])
    return tensor
