"""A `Network` around a module of the user's own."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.models.intake import take_in
from optin_deploy.network import Network, Source
from optin_deploy.nn.outputs import named_outputs as named_outputs
from optin_deploy.nn.task_head import HeadKind, head_of


def custom_network(
    module: nn.Module,
    inputs: Mapping[str, Tensor],
    *,
    logits: str | None = None,
    head: HeadKind | None = None,
    preprocessing: Any = None,
) -> Network:
    """A `Network` around the user's own module, which is put in eval mode; all else is put right in a copy.

    Outputs are named as in `outputs.named_outputs`. What cannot be one is left out, and told in ``notes`` and the log.

    Args:
        inputs: a sample batch by forward's argument names, first axis the batch.
        logits: name of the output with the task head's logits ("output" when the module gives one tensor), if there
            is one.
        head: what these mean: "classes" (one of several), "binary" (a yes or no for every number: one logit, or
            several labels) or "regression" (plain numbers). None takes "binary" for a single class, else "classes".
        preprocessing: an ``ImagePreprocessing`` or ``TextPreprocessing`` to calibrate and evaluate on files.

    Raises:
        UserError: the module cannot be pruned or exported as it is, see ``intake``; or there is no such output.
    """
    taken = take_in(module, inputs)
    names = {key: name for name, key in taken.outputs.items()}
    if logits is not None and logits not in (*taken.outputs, *names):
        raise UserError(f"there is no output {logits!r}; the network gives {', '.join(taken.outputs)}")
    if logits is None and head is not None:
        raise UserError(f"head={head!r} says what logits mean: name that output with logits=")
    source = Source("custom", f"{type(taken.module).__module__}.{type(taken.module).__qualname__}")
    network = Network(
        taken.module,
        taken.inputs,
        taken.outputs,
        source,
        "user",
        logits=names.get(logits, logits) if logits is not None else None,
        preprocessing=preprocessing,
        notes=taken.notes,
    )
    if network.logits is None:
        return network
    with torch.no_grad():
        given = network.forward(network.inputs)[network.logits]
    return replace(network, head=head_of(given, head))
