"""What is known about each model library: how to build a network, its inputs and its preprocessing."""

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import nn

from optin_deploy.errors import UserError
from optin_deploy.models import timm_models, transformers_models
from optin_deploy.network import Network, Source

# What libraries raise for a configuration, weights or inputs that do not fit.
UNFIT = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    IndexError,
    KeyError,
    MemoryError,
    RuntimeError,
    SafetensorError,
    StrictDataclassError,
    TypeError,
    ValueError,
)


def reason(error: Exception) -> str:
    """A library's message as a part of one line."""
    return " ".join(str(error).split())[:200] or type(error).__name__


def build(source: Source) -> nn.Module:
    """The dense module of ``source`` with initial weights, ready to be pruned; UserError when it cannot be built."""
    return ready(source, initialised(source))


def ready(source: Source, module: nn.Module) -> nn.Module:
    """``module``, which the library of ``source`` has made, as it is pruned and exported."""
    return transformers_models.ready(module) if source.library == "transformers" else module


def initialised(source: Source) -> nn.Module:
    """The module as the library itself makes it, whose weights files fit; UserError when it cannot be built."""
    if source.library == "timm":
        return timm_models.build(source)
    if source.library == "transformers":
        return transformers_models.initialised(source)
    raise UserError(
        f"{source.name} is a module of your own: give the dense module, as in load(path, module=MyModule())"
    )


def task(network: Network) -> str | None:
    """What the network is for, in the words of the Hugging Face hub; None where that is not known."""
    if network.source.library == "timm":
        return "image-classification" if network.logits else "image-feature-extraction"
    return (
        transformers_models.task(network.source.name, network.inputs)
        if network.source.library == "transformers"
        else None
    )
