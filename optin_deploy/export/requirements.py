"""Check that this machine has what a recipe exports to and measures with."""

import importlib.metadata
import importlib.util

import torch

from exporters import ExportError, check_builder, check_opset
from optin_deploy.config.recipe import Recipe
from optin_deploy.errors import UserError
from optin_deploy.export.engines import engine_config, requested_engines
from optin_deploy.network import Network
from optin_deploy.nn.sentence_embeddings import tell_default
from profilers import (
    GPU_RUNTIMES,
    ORT_PROVIDERS,
    RUNTIMES,
    ProfilingError,
    check_provider,
    lacking_device,
    lacking_precision,
    usable_cores,
)


def check_pooling(network: Network) -> None:
    """Raise UserError where the network cannot pool sentence embeddings; log where it pools by default."""
    network.with_pooling()
    if network.sentences is None:
        tell_default(network.source.name)


def check_runtimes(recipe: Recipe) -> None:
    """Raise UserError unless this machine has the runtimes of ``recipe``, their devices, and cores for its threads."""
    _check_threads(recipe.threads)
    if importlib.util.find_spec("onnxruntime") is None:
        raise UserError("onnxruntime is not installed: pip install 'optin-deploy[cpu]' (or [gpu] for a CUDA machine)")
    runtimes = recipe.measured_runtimes
    # Some engines can be built without a GPU.
    on_gpu = [runtime for runtime in runtimes if runtime in GPU_RUNTIMES and RUNTIMES[runtime] != "engine"]
    if on_gpu and not torch.cuda.is_available():
        raise UserError(f"--runtimes {','.join(runtimes)}: no CUDA device is present")
    for runtime in runtimes:
        if lacking := lacking_precision(runtime, recipe.precision):
            raise UserError(f"--precision {recipe.precision}: {lacking}; take fp16 or fp32")
    for request in requested_engines(recipe):
        try:
            check_builder(engine_config(recipe, request.runtime))
            check_opset(request.runtime, recipe.opset)
        except ExportError as error:
            raise UserError(f"--runtimes {','.join(runtimes)}: {error}") from error
    if recipe.needs_table:
        check_measurable(recipe.target_runtime)
    for runtime in runtimes:
        if provider := ORT_PROVIDERS.get(runtime):
            try:
                check_provider(provider)
            except ProfilingError as error:
                raise UserError(f"{runtime}: {error}") from error


def _check_threads(threads: int | None) -> None:
    """Raise UserError for more threads than cores: threads then take turns, and latencies become bimodal."""
    cores = usable_cores().logical
    if threads is not None and threads > cores:
        raise UserError(
            f"--threads {threads}: this process may use only {cores} of the cores (affinity or container limit); more "
            f"threads distort every latency, so give {cores} or less"
        )


def check_measurable(runtime: str) -> None:
    """Raise UserError where no device can run ``runtime``, even if engines can be built for it."""
    if not is_measurable(runtime):
        raise UserError(f"--runtime {runtime}: {lacking_device(runtime)}; it cannot be measured here")


def is_measurable(runtime: str) -> bool:
    """Return whether there is a device for ``runtime``."""
    return not lacking_device(runtime)
