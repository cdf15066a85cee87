"""The model libraries: build a module from its source, prepare it for pruning, and name its task."""

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from optin_deploy.errors import UserError
from optin_deploy.models import timm_models, transformers_models
from optin_deploy.network import Network, Source

# Errors that libraries raise for a configuration, weights or inputs that do not fit.
LIBRARY_ERRORS = (
    *(ArithmeticError, AssertionError, AttributeError, ImportError, IndexError, KeyError, MemoryError, RuntimeError),
    *(SafetensorError, StrictDataclassError, TypeError, ValueError),
)


def build(source: Source) -> nn.Module:
    """Return the dense module of ``source`` with initial weights, prepared for pruning.

    Raises:
        UserError: the module cannot be built.
    """
    return prepare_module(source, create_module(source))


def prepare_module(source: Source, module: nn.Module) -> nn.Module:
    """Return a module that the library of ``source`` has made in the form that is pruned and exported."""
    return transformers_models.prepare_module(module) if source.library == "transformers" else module


def create_module(source: Source) -> nn.Module:
    """Return the module as the library makes it, which files of weights fit; UserError if it cannot be built."""
    if source.library == "timm":
        return timm_models.build(source)
    if source.library == "transformers":
        return transformers_models.create_module(source)
    raise UserError(
        f"{source.name} is a module of your own: give the dense module, as in load(path, module=MyModule())"
    )


def task(network: Network) -> str | None:
    """Return the hub's name for the network's task; None if it is unknown."""
    if network.source.library == "timm":
        return "image-classification" if network.logits else "image-feature-extraction"
    if network.source.library == "transformers":
        return transformers_models.task(network.source.name, network.inputs)
    return None
