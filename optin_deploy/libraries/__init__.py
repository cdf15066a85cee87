"""What is known about each model library: how to build a network, its inputs and its preprocessing."""

from torch import nn

from optin_deploy.errors import UserError
from optin_deploy.libraries import timm, transformers
from optin_deploy.network import Source


def build(source: Source) -> nn.Module:
    """The dense module of ``source`` with initial weights; UserError when it cannot be built."""
    if source.library == "timm":
        return timm.build(source)
    if source.library == "transformers":
        return transformers.build(source)
    raise UserError(
        f"{source.name} is a module of your own: give the dense module, as in load(path, module=MyModule())"
    )
