"""What is checked, and put right, when a module is taken in: it works, or one line says why not, before any long work.

Put right, on a copy: adapters and torch's attention (see ``structure.intake``), wrappers of parallel training,
parameters in half or double precision, gradient checkpointing, tensors of inference mode. The copy shares the
parameters, but where these change their type. All else is refused that would fail, or give wrong figures, later.
"""

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.models.intake.forwards import counted_outputs, run_samples
from optin_deploy.models.intake.inputs import plain_inputs
from optin_deploy.models.intake.modules import CAST, check_parameters, own_module
from optin_deploy.network import Network
from optin_deploy.nn.copies import called, copied, copyable, kept_tensors, sharing
from optin_deploy.nn.outputs import unfit, unused
from optin_deploy.nn.sentence_embeddings import FEATURES
from optin_deploy.structure.canonicalize import prunable_form

logger = logging.getLogger(__name__)

# Attributes that say that activations are computed again in the backward pass: timm's, transformers' and those that
# other networks have in common.
_CHECKPOINTING = ("grad_checkpointing", "gradient_checkpointing", "use_checkpoint", "with_cp")


@dataclass(frozen=True)
class Taken:
    """A module as it is pruned and exported, with what was found in its forward passes.

    Attributes:
        outputs: name of each output -> what `named_outputs` calls it.
        notes: what was put right or left out, a sentence each.
    """

    module: nn.Module
    inputs: dict[str, Tensor]
    outputs: dict[str, str]
    notes: tuple[str, ...]


def take_in(given: object, inputs: object) -> Taken:
    """A module of the user's own, put in eval mode, with its sample ``inputs``.

    Raises:
        UserError: it cannot be pruned or exported as it is.
    """
    with torch.inference_mode(False):
        check_surroundings()
        notes: list[str] = []
        module = own_module(given, notes)
        module.eval()
        check_parameters(module)
        module = prunable_form(copyable(module))
        sample = plain_inputs(module, inputs)
        module, sample = _in_float32(module, sample, notes)
        module = put_right(module, notes)
        found = run_samples(module, sample)
        counted, left_out = counted_outputs(found)
        if left_out:
            notes.append(f"Left out of the outputs: {', '.join(f'{name} {why}' for name, why in left_out.items())}.")
        if not counted:
            raise UserError(f"{called(module)} gives no output that can be exported: {_all_told(left_out)}")
        notes += found.notes
        outputs = _output_names(counted, sample, notes)
    for note in notes:
        logger.warning("%s: %s", called(module), note)
    return Taken(module, sample, outputs, tuple(notes))


def validate(network: Network) -> Network:
    """Return the network with what `check_module` puts right; UserError where it cannot be pruned."""
    # Sentence embeddings are made of token features, after the module.
    outputs = {FEATURES: FEATURES} if network.pools else network.outputs
    module = check_module(network.module, network.inputs, outputs, network.notes)
    return network if module is network.module else network.with_module(module)


def check_module(
    module: nn.Module, inputs: Mapping[str, Tensor], outputs: Mapping[str, str], known: Collection[str] = ()
) -> nn.Module:
    """The module of a network that exists, with what `put_right` mends; see `Taken` for ``outputs``.

    Args:
        known: notes that are not told again.

    Raises:
        UserError: it cannot be pruned or exported as it is, or an output cannot be one.
    """
    with torch.inference_mode(False):
        check_surroundings()
        notes: list[str] = []
        module = own_module(module, notes)
        check_parameters(module)
        low = next((n for n, p in module.named_parameters() if p.dtype in (torch.float16, torch.bfloat16)), None)
        if low is not None:
            raise UserError(f"{called(module)} is in half precision ({low}): make it by custom_network, which casts it")
        if any(part.training for part in module.modules()):
            module.eval()
        module = put_right(copyable(module), notes)
        found = run_samples(module, plain_inputs(module, inputs))
        for note in (*notes, *found.notes):
            if note not in known:
                logger.warning("%s: %s", called(module), note)
        for name, key in outputs.items():
            if name in inputs:
                raise UserError(f"output {name} has the name of an input: give it another in the network's outputs")
            if key not in found.whole:
                raise UserError(f"there is no output {key!r}; the network gives {', '.join(found.whole)}")
            reason = unfit(found.whole[key], found.single.get(key), found.size)
            if reason is not None:
                raise UserError(f"output {name} {reason}: leave it out of the network's outputs")
    return module


def check_surroundings() -> None:
    """Raise UserError where the caller has autocast on: everything would be computed in its precision."""
    for device in ("cpu", "cuda"):
        if torch.is_autocast_enabled(device):
            raise UserError("torch.autocast is on: networks are pruned in float32, so call this outside of it")


def _in_float32(module: nn.Module, inputs: dict[str, Tensor], notes: list[str]) -> tuple[nn.Module, dict[str, Tensor]]:
    """Module and inputs in float32 where a parameter is in another precision; the module is then a copy."""
    others = sorted({str(p.dtype).removeprefix("torch.") for p in module.parameters() if p.dtype in CAST})
    if not others:
        return module, inputs
    notes.append(f"Cast from {', '.join(others)} to float32, in which networks are pruned; batches are to be float32.")
    return copied(module).float(), {n: t.float() if t.is_floating_point() else t for n, t in inputs.items()}


def put_right(module: nn.Module, notes: list[str]) -> nn.Module:
    """``module`` without gradient checkpointing and without tensors of inference mode, which no gradient passes; itself
    where it has neither, else a copy."""
    if any(t.is_inference() for t in module.parameters()):
        module = copied(module)
    elif any(t.is_inference() for _, t in kept_tensors(module)):
        module = copied(module, {id(p): p for p in module.parameters()})
    checkpointing = {
        (name, key) for name, part in module.named_modules() for key in _CHECKPOINTING if _is_on(part, key)
    }
    if checkpointing:
        module = copied(module, sharing(module))
        for name, key in checkpointing:
            setattr(module.get_submodule(name), key, False)
        notes.append("Gradient checkpointing is turned off.")
    return module


def _is_on(part: nn.Module, key: str) -> bool:
    return vars(part).get(key) is True


def _all_told(left_out: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {why}" for name, why in left_out.items())[:400] or "it gives nothing"


def _output_names(keys: list[str], inputs: Mapping[str, Tensor], notes: list[str]) -> dict[str, str]:
    """Name of each output -> its key: as it is but where a file could not have it, empty, unprintable or an input's."""
    names: dict[str, str] = {}
    for key in keys:
        plain = "".join(c if c.isprintable() else "_" for c in key) or "output"
        wanted = f"{plain}_output" if plain in inputs else plain
        name = unused(wanted, {*names, *inputs, *(each for each in keys if each != key)})
        names[name] = key
        if name != key:
            notes.append(f"The output {key!r} is called {name}: an input has that name, or no file could have it.")
    return names
