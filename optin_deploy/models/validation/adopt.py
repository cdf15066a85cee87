"""Adopt a user's module: check that it can be pruned, and adapt it, before any long work.

Adapted in a copy: adapters and torch's attention (see ``structure.canonicalize``), wrappers of parallel training,
parameters in half or double precision, gradient checkpointing, tensors of inference mode. The copy shares the
parameters unless their type changes. Everything else that would fail or give wrong results later is refused.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.models.validation.forwards import exportable_outputs, run_samples
from optin_deploy.models.validation.inputs import plain_inputs
from optin_deploy.models.validation.parameters import CAST, check_parameters, unwrap_module
from optin_deploy.network import Network
from optin_deploy.nn.batches import dtype_name
from optin_deploy.nn.copies import check_copyable, class_name_of, copy_module, kept_tensors, shared_tensors
from optin_deploy.nn.outputs import unfit_reason, unused_name
from optin_deploy.nn.sentence_embeddings import FEATURES
from optin_deploy.structure.canonicalize import canonicalize

logger = logging.getLogger(__name__)

# Attributes of timm, transformers and other networks that turn gradient checkpointing on.
_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing", "use_checkpoint", "with_cp")


@dataclass(frozen=True)
class AdoptedModule:
    """A module as it is pruned and exported, with its inputs and outputs.

    Attributes:
        outputs: name of each output -> its key in `named_outputs`.
        notes: what was changed or left out, one sentence each.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: dict[str, str]
    notes: tuple[str, ...]


def adopt_module(candidate: object, inputs: object) -> AdoptedModule:
    """Put a user's module in eval mode, adapt it and run it on its sample ``inputs``.

    Raises:
        UserError: it cannot be pruned or exported as it is.
    """
    with torch.inference_mode(False):
        check_environment()
        notes: list[str] = []
        module = unwrap_module(candidate, notes)
        module.eval()
        check_parameters(module)
        module = canonicalize(check_copyable(module))
        sample = plain_inputs(module, inputs)
        module, sample = _cast_to_float32(module, sample, notes)
        module = make_differentiable(module, notes)
        run = run_samples(module, sample)
        keys, left_out = exportable_outputs(run)
        reasons = ", ".join(f"{name} {reason}" for name, reason in left_out.items())
        if left_out:
            notes.append(f"Left out of the outputs: {reasons}.")
        if not keys:
            raise UserError(
                f"{class_name_of(module)} gives no output that can be exported: {reasons[:400] or 'it gives nothing'}"
            )
        notes += run.notes
        outputs = _name_outputs(keys, sample, notes)
    for note in notes:
        logger.warning("%s: %s", class_name_of(module), note)
    return AdoptedModule(module, sample, outputs, tuple(notes))


def validate(network: Network) -> Network:
    """Return the network with its module adapted as by `check_module`; UserError if it cannot be pruned."""
    # Sentence embeddings are pooled from token features, after the module.
    outputs = {FEATURES: FEATURES} if network.pools else network.outputs
    module = check_module(network.module, network.inputs, outputs, network.notes)
    return network if module is network.module else network.with_module(module)


def check_module(
    module: nn.Module, inputs: Mapping[str, Tensor], outputs: Mapping[str, str], known: Collection[str] = ()
) -> nn.Module:
    """Return the module of an existing network, adapted by `make_differentiable`.

    Args:
        outputs: as in `AdoptedModule`.
        known: notes that are not logged again.

    Raises:
        UserError: the module cannot be pruned or exported as it is, or an output does not qualify.
    """
    with torch.inference_mode(False):
        check_environment()
        notes: list[str] = []
        module = unwrap_module(module, notes)
        check_parameters(module)
        low = next((n for n, p in module.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
        if low is not None:
            raise UserError(f"{class_name_of(module)} is in half precision ({low}): use custom_network, which casts it")
        if any(part.training for part in module.modules()):
            module.eval()
        module = make_differentiable(check_copyable(module), notes)
        run = run_samples(module, plain_inputs(module, inputs))
        for note in (*notes, *run.notes):
            if note not in known:
                logger.warning("%s: %s", class_name_of(module), note)
        for name, key in outputs.items():
            if name in inputs:
                raise UserError(f"output {name} has the name of an input: give it another in the network's outputs")
            if key not in run.batch:
                raise UserError(f"there is no output {key!r}; the network gives {', '.join(run.batch)}")
            reason = unfit_reason(run.batch[key], run.single.get(key), run.size)
            if reason is not None:
                raise UserError(f"output {name} {reason}: leave it out of the network's outputs")
    return module


def check_environment() -> None:
    """Raise UserError if autocast is on: everything would be computed in its precision."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise UserError("torch.autocast is on: networks are pruned in float32, so call this outside of it")


def _cast_to_float32(
    module: nn.Module, inputs: dict[str, Tensor], notes: list[str]
) -> tuple[nn.Module, dict[str, Tensor]]:
    """Return module and inputs in float32; a copy of the module if a parameter has another precision."""
    others = sorted({dtype_name(p.dtype) for p in module.parameters() if p.dtype in CAST})
    if not others:
        return module, inputs
    notes.append(f"Cast from {', '.join(others)} to float32, in which networks are pruned; batches are to be float32.")
    return copy_module(module).float(), {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}


def make_differentiable(module: nn.Module, notes: list[str]) -> nn.Module:
    """Return ``module``, or a copy without gradient checkpointing and without tensors of inference mode."""
    if any(t.is_inference() for t in module.parameters()):
        module = copy_module(module)
    elif any(t.is_inference() for _, t in kept_tensors(module)):
        module = copy_module(module, {id(p): p for p in module.parameters()})
    checkpointing = {
        (name, key) for name, part in module.named_modules() for key in _CHECKPOINTING if vars(part).get(key) is True
    }
    if checkpointing:
        module = copy_module(module, shared_tensors(module))
        for name, key in checkpointing:
            setattr(module.get_submodule(name), key, False)
        notes.append("Gradient checkpointing is turned off.")
    return module


def _name_outputs(keys: list[str], inputs: Mapping[str, Tensor], notes: list[str]) -> dict[str, str]:
    """Return name of each output -> its key; keys that are empty, unprintable or an input's name are renamed."""
    names: dict[str, str] = {}
    for key in keys:
        plain = "".join(c if c.isprintable() else "_" for c in key) or "output"
        wanted = f"{plain}_output" if plain in inputs else plain
        name = unused_name(wanted, {*names, *inputs, *(other for other in keys if other != key)})
        names[name] = key
        if name != key:
            notes.append(f"The output {key!r} is called {name}: an input has that name, or no file could have it.")
    return names
