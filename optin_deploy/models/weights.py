"""Load a file of weights into a module, whatever wrappers a training script has saved it in.

No weight is made up, and none is dropped without a message.
"""

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.models.weight_files import INDEX_SUFFIX, SHARD, WeightsFile, read_tensors
from optin_deploy.models.weight_names import (
    Part,
    choose_part,
    find_parts,
    first_and_count,
    is_training_name,
    unwrap_names,
)
from optin_deploy.nn.batches import dtype_name

logger = logging.getLogger(__name__)
_REFIT = "give the --model it was saved from"
# Pattern of a name -> what the file holds instead of plain weights, and what to do.
_FOREIGN = (
    (
        re.compile(
            r"(^|\.)(qweight|qzeros|SCB|weight_packed|weight_scale(_inv)?|absmax|_packed_params)(\.|$)|quant_state"
        ),
        "quantized weights: give those from before quantization",
    ),
    (
        re.compile(r"(^|\.)lora_\w+(\.|$)"),
        "adapters: merge them into the network (merge_and_unload), and save the result",
    ),
    (
        re.compile(r"(^|\.)parametrizations\.|(^|\.)\w+_(orig|mask|g|v)$"),
        "parametrized weights (a parametrization, weight_norm, or torch.nn.utils.prune): remove it from the network "
        "(remove_parametrizations, remove_weight_norm, prune.remove), and save the result",
    ),
    (
        re.compile(r"(^|\.)shadow_params\.\d+$"),
        "a moving average without names: copy it into the network (ema.copy_to(model.parameters())), and save that",
    ),
)
# Buffers that the module computes from its configuration, and counters of profilers and norms.
_COMPUTED = re.compile(
    r"(^|\.)(position_ids|relative_position_index|relative_coords_table|attn_mask|masked_bias|inv_freq|"
    r"num_batches_tracked|total_ops|total_params|n_averaged)$"
)
_CLOSE = 1e-2
# Weights and biases of a head and of a distillation head.
_HEAD_TENSORS = 4


@dataclass(frozen=True)
class _Match:
    """How the names of a file match those of a module.

    Attributes:
        part: the part of the file to load.
        naming: name in that part -> the module's name.
        copies: the file's names in other parts, which hold the network again.
    """

    part: Part
    naming: Mapping[str, str]
    copies: frozenset[str] = frozenset()


def load_weights(
    module: nn.Module, file: WeightsFile, namings: Iterable[Mapping[str, str]] = (), unused: Collection[str] = ()
) -> None:
    """Load a file of weights into ``module``.

    Args:
        namings: alternative names for the module's tensors: name in the file -> the module's.
        unused: patterns of names that files of this module may hold and its forward pass does not need.

    Raises:
        UserError: the file cannot be read, does not fit, or holds the network several times.
    """
    stored = read_tensors(file.path)
    originals = unwrap_names(stored)
    tensors = {name: stored[original] for name, original in originals.items()}
    own = module.state_dict()
    match = _match_names(tensors, [{name: name for name in own}, *namings], file)
    part, naming = match.part, match.naming
    weights = {naming[name]: tensors[stored_name] for name, stored_name in part.names.items()}
    others = [name for name in tensors if name not in {*part.names.values(), *match.copies}]
    inside = [name for name in others if _is_inside(name, match, is_named=file.part is not None)]
    unknown = _unknown_names(module, part.prefix, {name: tensors[name] for name in inside}, unused, file)
    _check_types(own, weights, file)
    state = _completed_state(module, weights)
    if misfit := _find_misfit(module, state, unknown):
        reason = _shard_hint(file) or _foreign_hint(tensors.keys() - own.keys()) or misfit
        raise UserError(f"weights file {file} does not fit the model: {reason}")
    _check_outside(part, [name for name in others if name not in inside], file)
    prefixes = sorted({originals[there].removesuffix(name) for name, there in part.names.items()} - {""})
    if prefixes:
        logger.info("%s: the network's names follow the prefix %s", file, first_and_count(prefixes))
    if lacking := sorted({to.removesuffix(name) for name, to in naming.items() if to.endswith(name)} - {""}):
        logger.info("%s: the names lack the network's %s", file, first_and_count(lacking))
    if match.copies:
        logger.info("%s: %d tensors of other copies of the network are not used", file, len(match.copies))
    module.load_state_dict(state)


def _match_names(tensors: Mapping[str, Tensor], namings: Iterable[Mapping[str, str]], file: WeightsFile) -> _Match:
    """Choose the part of the file to load, and the naming that matches most of its names."""
    matches = [(find_parts(tensors, naming), naming) for naming in namings]
    parts, naming = max(matches, key=lambda match: len(match[0][0].names) if match[0] else 0)
    if not parts:
        if file.part is not None:
            raise UserError(f"--weights {file}: no part of the file fits the model; {_REFIT}")
        return _Match(Part("", {name: name for name in tensors if name in naming}), naming)
    is_any = file.part is None and _are_equal(parts, tensors)
    part = parts[0] if is_any else choose_part(parts, file.part, file.path)
    return _Match(part, naming, frozenset(name for p in parts if p is not part for name in p.names.values()))


def _are_equal(parts: Sequence[Part], tensors: Mapping[str, Tensor]) -> bool:
    """Whether all parts hold the same tensors: a training module may have the network under two names."""
    first, *others = parts
    return all(
        part.names.keys() == first.names.keys()
        and all(torch.equal(tensors[there], tensors[first.names[name]]) for name, there in part.names.items())
        for part in others
    )


def _is_inside(name: str, match: _Match, *, is_named: bool) -> bool:
    """Whether ``name`` belongs to the network's part of the file."""
    if match.part.prefix:
        return name.startswith(match.part.prefix)
    # Without a prefix, other top-level names are ignored if the user named this part, or if they are of training.
    top = name.partition(".")[0]
    tops = {n.partition(".")[0] for pair in match.naming.items() for n in pair}
    return top in tops or not (is_named or is_training_name(name))


def _unknown_names(
    module: nn.Module, prefix: str, inside: Mapping[str, Tensor], unused: Collection[str], file: WeightsFile
) -> list[str]:
    """Return the names inside the network's part that are neither in ``module`` nor known to be unused.

    Raises:
        UserError: a buffer that the module computes from its configuration has other values in the file.
    """
    buffers, unknown, skipped = dict(module.named_buffers()), [], []
    patterns: tuple[str, ...] = (_COMPUTED.pattern, *unused)
    for name, tensor in inside.items():
        own = buffers.get(name.removeprefix(prefix))
        if own is not None and own.shape == tensor.shape and not _is_close(own, tensor):
            raise UserError(
                f"weights file {file} does not fit the model: {name} has other values than the model computes from its "
                f"configuration; {_REFIT}"
            )
        is_counter = tensor.dim() == 0 and not tensor.is_floating_point()
        if own is None and not is_counter and not any(re.search(pattern, name) for pattern in patterns):
            unknown.append(name)
        else:
            skipped.append(name)
    if skipped and not unknown:
        logger.info("%s: not needed: %s", file, first_and_count(skipped))
    return unknown


def _is_close(own: Tensor, stored: Tensor) -> bool:
    return torch.allclose(own.double(), stored.double(), rtol=_CLOSE, atol=_CLOSE * float(own.abs().max() or 0))


def _check_types(own: Mapping[str, Tensor], weights: Mapping[str, Tensor], file: WeightsFile) -> None:
    """Raise UserError if the file holds integers or 8-bit floats where the module has floats, or the reverse."""
    for name, tensor in weights.items():
        wanted, is_integer = own[name].dtype, not tensor.is_floating_point()
        message = f"{file.path}: {name} holds {dtype_name(tensor.dtype)}, the network takes {dtype_name(wanted)}"
        if wanted.is_floating_point and (is_integer or tensor.dtype.itemsize == 1):
            raise UserError(f"{message}: give weights that are not quantized")
        if not wanted.is_floating_point and not is_integer and tensor.dim():
            raise UserError(message)


def _completed_state(module: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``weights`` with tensors that files need not hold.

    These are tied weights, which transformers writes under one name only, and buffers that the module computes from its
    configuration.
    """
    own = module.state_dict()
    stored = {own[name].data_ptr(): tensor for name, tensor in weights.items()}
    tied = {
        name: stored[t.data_ptr()]
        for name, t in own.items()
        if name not in weights and t.data_ptr() in stored and t.numel()
    }
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    computed = {
        name: tensor
        for name, tensor in own.items()
        if name not in weights and name not in parameters and (not tensor.is_floating_point() or _COMPUTED.search(name))
    }
    return {**computed, **weights, **tied}


def _find_misfit(module: nn.Module, state: Mapping[str, Tensor], unknown: Sequence[str]) -> str | None:
    """Return the first shape or name of ``state`` that does not fit ``module``, and what to do; None if all fit."""
    own = module.state_dict()
    misshaped = [name for name, tensor in own.items() if name in state and state[name].shape != tensor.shape]
    if misshaped:
        stored, wanted = tuple(state[misshaped[0]].shape), tuple(own[misshaped[0]].shape)
        hint = _shape_hint(module, misshaped, stored, wanted)
        return f"{misshaped[0]} has shape {stored}, the model takes {wanted}; {hint}"
    pairs = ("it has no", [name for name in own if name not in state]), ("the model has no", unknown)
    differences = [f"{verb} {first_and_count(names)}" for verb, names in pairs if names]
    return f"{', '.join(differences)}; {_REFIT}" if differences else None


def _shape_hint(module: nn.Module, misshaped: Sequence[str], stored: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    classes = getattr(module, "num_classes", None) or getattr(getattr(module, "config", None), "num_labels", None)
    if misshaped[0].endswith("pos_embed"):
        return "give the --image-size it was trained at"
    if wanted[:1] == (classes,) and stored[1:] == wanted[1:] and len(misshaped) <= _HEAD_TENSORS:
        return (
            f"the file is of {stored[0]} classes: set num_classes (transformers: num_labels) to that in config.json, "
            f"or {_REFIT}"
        )
    if len(wanted) == 4 == len(stored) and stored[2:] == wanted[2:] and stored[1] != wanted[1] and len(misshaped) == 1:
        return f"the file is of images of {stored[1]} channels: set in_chans (transformers: num_channels) to that"
    return _REFIT


def _shard_hint(file: WeightsFile) -> str | None:
    match = SHARD.search(file.path.name)
    if match is None:
        return None
    index = file.path.with_name(f"{file.path.name[: match.start()]}.safetensors{INDEX_SUFFIX}")
    return f"it is one of several files: give {index}"


def _foreign_hint(names: Iterable[str]) -> str | None:
    """Return what a file holds instead of plain weights, by the first of ``names`` that shows it."""
    for name in sorted(names):
        for pattern, content in _FOREIGN:
            if pattern.search(name):
                return f"it holds {name}, of {content}"
    return None


def _check_outside(part: Part, outside: Sequence[str], file: WeightsFile) -> None:
    """Raise UserError if the file holds more than the network and training state, and the user named no part."""
    more = [name for name in outside if not is_training_name(name)]
    if len(outside) > len(more):
        training = [name for name in outside if name not in more]
        logger.info("%s: values of training are not used: %s", file, first_and_count(training))
    if not more:
        return
    if file.part is None:
        raise UserError(
            f"weights file {file} holds {first_and_count(more)} next to the network's {part.prefix}: give "
            f"--weights {file.path}#{part.label} to leave that out"
        )
    logger.warning("%s: not used: %s", file, first_and_count(more))
