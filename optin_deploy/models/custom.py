"""A `Network` around a module of the user's own."""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.models.validation.adopt import adopt_module
from optin_deploy.network import Network, Preprocessing, Source
from optin_deploy.nn.task_head import HeadKind, head_of


def custom_network(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    logits: str | None = None,
    head: HeadKind | None = None,
    preprocessing: Preprocessing | None = None,
) -> Network:
    """Return a `Network` around the user's own module.

    The module is put in eval mode; all other adaptations are made in a copy. Outputs are named as by `named_outputs`.
    Values that cannot be outputs are left out, as ``notes`` and the log state.

    Args:
        inputs: a sample batch by forward's argument names; the first axis is the batch.
        logits: name of the output with the task head's logits, if there is one; "output" if the module returns one
            tensor.
        head: what the logits mean: "classes" (one of several), "binary" (a yes or no for every number: one logit, or
            several labels) or "regression" (plain numbers). None means "binary" for a single class, else "classes".
        preprocessing: an ``ImagePreprocessing`` or ``TextPreprocessing``, to calibrate and evaluate on files.

    Raises:
        UserError: the module cannot be pruned or exported as it is, or there is no such output.

    Example:
        >>> network = custom_network(MyViT(), {"pixels": torch.randn(2, 3, 224, 224)}, logits="output")
    """
    adopted = adopt_module(module, inputs)
    names = {key: name for name, key in adopted.outputs.items()}
    if logits is not None and logits not in (*adopted.outputs, *names):
        raise UserError(f"there is no output {logits!r}; the network gives {', '.join(adopted.outputs)}")
    if logits is None and head is not None:
        raise UserError(f"head={head!r} describes logits: name that output with logits=")
    network = Network(
        adopted.module,
        adopted.inputs,
        adopted.outputs,
        Source("custom", f"{type(adopted.module).__module__}.{type(adopted.module).__qualname__}"),
        "user",
        logits=names.get(logits, logits) if logits is not None else None,
        preprocessing=preprocessing,
        notes=adopted.notes,
    )
    if network.logits is None:
        return network
    with torch.no_grad():
        values = network.forward(network.inputs)[network.logits]
    return replace(network, head=head_of(values, head))
