"""Whether gradients pass through a network, tried on one sample before they are needed on all."""

import torch
from torch import nn

from optin_deploy.criteria.loss import differentiable
from optin_deploy.errors import UserError
from optin_deploy.intake.modules import called, copyable, line
from optin_deploy.masking import masked
from optin_deploy.network import Network
from optin_deploy.scoring import Scoring
from optin_deploy.structure.groups import Structure

_WITHOUT = "take a criterion that needs no gradients (magnitude, or trajectory with the scorer forward)"


def needs_gradients(scoring: Scoring) -> bool:
    """Whether scores are found by backward passes."""
    if scoring.criterion == "trajectory":
        return scoring.scorer != "forward"
    return scoring.criterion in ("trajectory-obs", "fisher")


def check_gradients(network: Network, structure: Structure) -> None:
    """Raise UserError where a backward pass fails, or leaves something on the module that cannot be copied."""
    module = network.module
    sample = {name: tensor[:1] for name, tensor in network.inputs.items()}
    device = next(module.parameters()).device
    masks = {g.name: torch.ones(1, g.units, device=device, requires_grad=True) for g in structure.groups}
    try:
        with torch.random.fork_rng(devices=[]), differentiable(network), masked(module, structure, masks):
            sums = [y.double().sum() for y in network.forward(sample).values() if y.is_floating_point()]
            total = torch.stack(sums).sum() if sums else torch.zeros(())
            if total.requires_grad:
                torch.autograd.grad(total, list(masks.values()), allow_unused=True)
    except Exception as error:  # whatever a user's module raises
        raise UserError(f"no gradient passes {called(module)} ({_told(module, error)}): {_WITHOUT}") from error
    copyable(module)


def _told(module: nn.Module, error: Exception) -> str:
    if "Inference tensors" in str(error):
        return "it keeps tensors from a run under torch.inference_mode outside of the module; run it under no_grad"
    return line(error)
