"""A labelled data set and the metric that is measured on it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optin_deploy.network import Network
from optin_deploy.nn.batches import Batch


@dataclass(frozen=True)
class Dataset:
    """A labelled data set.

    Attributes:
        metric: its name, for reports.
        name: path of the data.
        samples: number of samples.
        measure: returns the metric, in per cent, of a module in the network's place.
        pairs: whether two texts are one input.
    """

    metric: str
    name: str
    samples: int
    measure: Callable[[nn.Module], float]
    pairs: bool = False


def to_device_of(module: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Return ``batch`` on the device of ``module``."""
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    return {name: tensor.to(device) for name, tensor in batch.items()}


@torch.no_grad()
def compute_logits(network: Network, module: nn.Module, batch: Batch) -> Tensor:
    """Return the logits of ``module``, in the place of the network's, for ``batch``; on the CPU."""
    return network.forward(to_device_of(module, batch), module)[network.logits or ""].cpu()
