"""Whether derivatives pass through a network, tried on one sample before they are needed on all."""

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from optin_deploy.criteria.loss import differentiable
from optin_deploy.errors import UserError
from optin_deploy.intake.modules import called, copyable, line
from optin_deploy.masking import masked
from optin_deploy.network import Network
from optin_deploy.scoring import Scoring
from optin_deploy.structure.groups import Structure


def check_gradients(network: Network, structure: Structure, scoring: Scoring) -> None:
    """Raise UserError where the derivatives that ``scoring`` takes fail, or leave on the module what cannot be copied.

    Criteria that take none have nothing to fail.
    """
    if scoring.criterion not in ("trajectory-obs", "trajectory", "fisher"):
        return
    module = network.module
    forward = scoring.criterion == "trajectory" and scoring.scorer == "forward"
    try:
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            device = next(module.parameters()).device
            masks = {g.name: torch.ones(1, g.units, device=device) for g in structure.groups}
            (_forward if forward else _backward)(network, structure, masks)
    except Exception as error:  # whatever a user's module raises
        other = "" if forward else ", or trajectory with the scorer forward, which takes them otherwise"
        raise UserError(
            f"no derivative passes {called(module)} ({_told(error)}): take the criterion magnitude, which needs none"
            f"{other}"
        ) from error
    copyable(module)


def _backward(network: Network, structure: Structure, masks: dict[str, Tensor]) -> None:
    wanted = {name: mask.requires_grad_() for name, mask in masks.items()}
    with differentiable(network), masked(network.module, structure, wanted):
        sums = [y.double().sum() for y in network.forward(_sample(network)).values() if y.is_floating_point()]
        total = torch.stack(sums).sum() if sums else torch.zeros(())
        if total.requires_grad:
            torch.autograd.grad(total, list(wanted.values()), allow_unused=True)


@torch.no_grad()
def _forward(network: Network, structure: Structure, masks: dict[str, Tensor]) -> None:
    # The fused kernels of attention have no forward derivatives.
    with forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        duals = {name: forward_ad.make_dual(mask, torch.ones_like(mask)) for name, mask in masks.items()}
        with masked(network.module, structure, duals):
            network.forward(_sample(network))


def _sample(network: Network) -> dict[str, Tensor]:
    return {name: tensor[:1].clone() for name, tensor in network.inputs.items()}


def _told(error: Exception) -> str:
    if "Inference tensors" in str(error):
        return "it keeps tensors from a run under torch.inference_mode outside of the module; run it under no_grad"
    return line(error)
