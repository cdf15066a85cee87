"""Whether this machine has what a recipe exports to and measures with."""

import importlib.metadata
import importlib.util
from collections.abc import Iterable

import torch

from exporters import ExportError, check_builder, check_opset
from optin_deploy.config.recipe import Recipe
from optin_deploy.errors import UserError
from optin_deploy.export.engines import engine_config, wanted_engines
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
    """Raise UserError where there is nothing to pool to sentence embeddings; log where nothing says how."""
    network.with_pooling()
    if network.sentences is None:
        tell_default(network.source.name)


def check_runtimes(recipe: Recipe) -> None:
    """Raise UserError unless what ``recipe`` measures with is here: runtimes, their devices, cores for its threads."""
    _check_threads(recipe.threads)
    if importlib.util.find_spec("onnxruntime") is None:
        raise UserError("onnxruntime is not installed: pip install 'optin-deploy[cpu]' (or [gpu] for a CUDA machine)")
    runtimes = recipe.measured_runtimes
    # Engines can be built without a GPU, perhaps.
    on_gpu = [runtime for runtime in runtimes if runtime in GPU_RUNTIMES and RUNTIMES[runtime] != "engine"]
    if on_gpu and not torch.cuda.is_available():
        raise UserError(f"--runtimes {','.join(runtimes)}: no CUDA device is present")
    for runtime in runtimes:
        if lacking := lacking_precision(runtime, recipe.precision):
            raise UserError(f"--precision {recipe.precision}: {lacking}; take fp16 or fp32")
    for wanted in wanted_engines(recipe):
        try:
            check_builder(engine_config(recipe, wanted.runtime))
            check_opset(wanted.runtime, recipe.opset)
        except ExportError as error:
            raise UserError(f"--runtimes {','.join(runtimes)}: {error}") from error
    if recipe.needs_table:
        check_measurable(recipe.target_runtime)
    _check_providers(runtimes)


def _check_threads(threads: int | None) -> None:
    """Raise UserError for more threads than this process has cores: they take turns, and runs come out bimodal."""
    cores = usable_cores().logical
    if threads is not None and threads > cores:
        raise UserError(
            f"--threads {threads}: this process may use only {cores} of the cores (affinity or container limit), and "
            f"threads that wait for one spoil every latency; give {cores} or less"
        )


def _check_providers(runtimes: Iterable[str]) -> None:
    """Raise UserError unless onnxruntime can start what ``runtimes`` run on."""
    for runtime in runtimes:
        if provider := ORT_PROVIDERS.get(runtime):
            try:
                check_provider(provider)
            except ProfilingError as error:
                raise UserError(f"{runtime}: {error}") from error


def check_measurable(runtime: str) -> None:
    """Raise UserError where engines can be built for ``runtime`` but nothing can run them."""
    if not is_measurable(runtime):
        raise UserError(f"--runtime {runtime}: {lacking_device(runtime)}; it cannot be measured here")


def is_measurable(runtime: str) -> bool:
    """Whether there is a device for ``runtime``."""
    return not lacking_device(runtime)
