"""Weights of a file into a module, whatever the training script has put around them; nothing is made up or dropped
without being told."""

import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.models.weight_files import INDEX_SUFFIX, SHARD, WeightsFile, read_tensors
from optin_deploy.models.weight_names import Part, chosen, listed, of_training, parts_of, unwrapped

logger = logging.getLogger(__name__)
_REFIT = "give the --model it was saved from"
# What others leave beside weights, and how a name that is of it tells so; and what to do.
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
        "weights in parts (a parametrization, weight_norm, or torch.nn.utils.prune): remove it from the network "
        "(remove_parametrizations, remove_weight_norm, prune.remove), and save the result",
    ),
    (
        re.compile(r"(^|\.)shadow_params\.\d+$"),
        "a moving average without names: copy it into the network (ema.copy_to(model.parameters())), and save that",
    ),
)
# Buffers that are made anew from the configuration, and counts that profilers and norms leave.
_MADE_ANEW = re.compile(
    r"(^|\.)(position_ids|relative_position_index|relative_coords_table|attn_mask|masked_bias|inv_freq|"
    r"num_batches_tracked|total_ops|total_params|n_averaged)$"
)
_CLOSE = 1e-2
# Weights and biases of a head, and of one that was distilled.
_OF_HEAD = 4


def load_weights(
    module: nn.Module, file: WeightsFile, namings: Iterable[Mapping[str, str]] = (), unused: Collection[str] = ()
) -> None:
    """Load a file of weights into ``module``.

    Args:
        namings: other names by which files may hold the module's tensors: name there -> the module's.
        unused: patterns of names that files of this module may hold and its forward pass does not need.

    Raises:
        UserError: the file cannot be read, does not fit, or holds the network several times.
    """
    given = read_tensors(file.path)
    originals = unwrapped(given)
    tensors = {name: given[there] for name, there in originals.items()}
    own = module.state_dict()
    part, naming, copies = _part(tensors, [{name: name for name in own}, *namings], file)
    found = {naming[name]: tensors[there] for name, there in part.found.items()}
    beside = [name for name in tensors if name not in {*part.found.values(), *copies}]
    within = [name for name in beside if name.startswith(part.prefix)]
    if part.prefix == "":
        # Where the user names this part, what stands beside the network's own modules is left out.
        tops, named = {naming[name].partition(".")[0] for name in naming}, file.part is not None
        tops |= {name.partition(".")[0] for name in naming}
        within = [name for name in within if name.partition(".")[0] in tops or not (named or of_training(name))]
    unknown = _unknown(module, part.prefix, {name: tensors[name] for name in within}, unused, file)
    _check_numbers(own, found, file)
    state = _completed(module, found)
    told = _unfit(module, state, unknown)
    if told:
        told = _one_of_several(file) or _foreign(tensors.keys() - own.keys()) or told
        raise UserError(f"weights file {file} does not fit the model: {told}")
    _check_beside(part, [name for name in beside if name not in within], file)
    before = sorted({originals[there].removesuffix(name) for name, there in part.found.items()} - {""})
    if before:
        logger.info("%s: the network's names stand behind %s", file, listed(before))
    if lacking := sorted({to.removesuffix(name) for name, to in naming.items() if to.endswith(name)} - {""}):
        logger.info("%s: the names lack the network's %s", file, listed(lacking))
    if copies:
        logger.info("%s: %d tensors of other copies of the network are not used", file, len(copies))
    module.load_state_dict(state)


def _part(
    tensors: Mapping[str, Tensor], namings: Iterable[Mapping[str, str]], file: WeightsFile
) -> tuple[Part, Mapping[str, str], set[str]]:
    """The part of the file that is meant, its names -> the module's, and the names that other parts have.

    Of several ways to name a module's tensors, the one that most of them have.
    """
    found = [(parts_of(tensors, each), each) for each in namings]
    parts, naming = max(found, key=lambda each: len(each[0][0].found) if each[0] else 0)
    if not parts:
        known = {name: name for name in tensors if name in naming}
        if file.part is not None:
            raise UserError(f"--weights {file}: no part of the file fits the model; {_REFIT}")
        return Part("", known), naming, set()
    alike = file.part is None and _alike(parts, tensors)
    part = parts[0] if alike else chosen(parts, file.part, file.path)
    return part, naming, {there for each in parts if each is not part for there in each.found.values()}


def _alike(parts: Sequence[Part], tensors: Mapping[str, Tensor]) -> bool:
    """Whether all parts hold the same: a training module may have the network under two names."""
    first, *more = parts
    return all(
        part.found.keys() == first.found.keys()
        and all(torch.equal(tensors[there], tensors[first.found[name]]) for name, there in part.found.items())
        for part in more
    )


def _unknown(
    module: nn.Module, prefix: str, within: Mapping[str, Tensor], unused: Collection[str], file: WeightsFile
) -> list[str]:
    """Those of the names ``within`` the network's part that stand for a part of it that ``module`` does not have.

    Raises:
        UserError: a table that is made anew of the configuration holds other values in the file.
    """
    buffers, unknown, left_out = dict(module.named_buffers()), [], []
    patterns: tuple[str, ...] = (_MADE_ANEW.pattern, *unused)
    for name, tensor in within.items():
        own = buffers.get(name.removeprefix(prefix))
        if own is not None and own.shape == tensor.shape and not _close(own, tensor):
            raise UserError(
                f"weights file {file} does not fit the model: {name} has other values than the model makes of its "
                f"configuration; {_REFIT}"
            )
        counted = tensor.dim() == 0 and not tensor.is_floating_point()
        if own is None and not counted and not any(re.search(each, name) for each in patterns):
            unknown.append(name)
        else:
            left_out.append(name)
    if left_out and not unknown:
        logger.info("%s: not needed: %s", file, listed(left_out))
    return unknown


def _close(own: Tensor, given: Tensor) -> bool:
    return torch.allclose(own.double(), given.double(), rtol=_CLOSE, atol=_CLOSE * float(own.abs().max() or 0))


def _check_numbers(own: Mapping[str, Tensor], found: Mapping[str, Tensor], file: WeightsFile) -> None:
    """Raise UserError where the file holds integers, or numbers of 8 bits, for what the module computes in."""
    for name, given in found.items():
        wanted, whole = own[name].dtype, not given.is_floating_point()
        told = f"{file.path}: {name} holds {_dtype_name(given.dtype)}, the network takes {_dtype_name(wanted)}"
        if wanted.is_floating_point and (whole or given.dtype.itemsize == 1):
            raise UserError(f"{told}: give weights that are not quantized")
        if not wanted.is_floating_point and not whole and given.dim():
            raise UserError(told)


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _completed(module: nn.Module, found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """``found`` with the weights that a file holds under one name only of several, as transformers writes them, and
    with tables of integers, which the module makes of its configuration."""
    own = module.state_dict()
    stored = {own[name].data_ptr(): tensor for name, tensor in found.items()}
    tied = {n: stored[t.data_ptr()] for n, t in own.items() if n not in found and t.data_ptr() in stored and t.numel()}
    parameters = {name for name, _ in module.named_parameters(remove_duplicate=False)}
    made = {
        name: tensor
        for name, tensor in own.items()
        if name not in found and name not in parameters and (not tensor.is_floating_point() or _MADE_ANEW.search(name))
    }
    return {**made, **found, **tied}


def _unfit(module: nn.Module, state: Mapping[str, Tensor], unknown: Sequence[str]) -> str:
    """The first name or shape of ``state`` that is not the module's, and what to do; nothing where all are."""
    own = module.state_dict()
    other = [name for name, tensor in own.items() if name in state and state[name].shape != tensor.shape]
    missing = [name for name in own if name not in state]
    if other:
        given, wanted = tuple(state[other[0]].shape), tuple(own[other[0]].shape)
        hint = _hint(module, other, given, wanted)
        return f"{other[0]} has shape {given}, the model takes {wanted}; {hint}"
    pairs = ("it has no", missing), ("the model has no", unknown)
    told = [f"{verb} {listed(names)}" for verb, names in pairs if names]
    return f"{', '.join(told)}; {_REFIT}" if told else ""


def _hint(module: nn.Module, other: Sequence[str], given: tuple[int, ...], wanted: tuple[int, ...]) -> str:
    classes = getattr(module, "num_classes", None) or getattr(getattr(module, "config", None), "num_labels", None)
    if other[0].endswith("pos_embed"):
        return "give the --image-size it was trained at"
    if wanted[:1] == (classes,) and given[1:] == wanted[1:] and len(other) <= _OF_HEAD:
        return (
            f"the file is of {given[0]} classes: set num_classes (transformers: num_labels) to that in config.json, or "
            f"{_REFIT}"
        )
    if len(wanted) == 4 == len(given) and given[2:] == wanted[2:] and given[1] != wanted[1] and len(other) == 1:
        return f"the file is of pictures of {given[1]} channels: set in_chans (transformers: num_channels) to that"
    return _REFIT


def _one_of_several(file: WeightsFile) -> str | None:
    found = SHARD.search(file.path.name)
    if found is None:
        return None
    index = file.path.with_name(f"{file.path.name[: found.start()]}.safetensors{INDEX_SUFFIX}")
    return f"it is one of several files: give {index}"


def _foreign(names: Iterable[str]) -> str | None:
    """What the first of the names shows that the file was made for, where that is no plain network."""
    for name in sorted(names):
        for pattern, told in _FOREIGN:
            if pattern.search(name):
                return f"it holds {name}, of {told}"
    return None


def _check_beside(part: Part, outside: Sequence[str], file: WeightsFile) -> None:
    """Raise UserError where the file holds more than the network and its training, and the user did not name the part
    that is meant."""
    more = [name for name in outside if not of_training(name)]
    if len(outside) > len(more):
        logger.info("%s: of training, not used: %s", file, listed([n for n in outside if n not in more]))
    if not more:
        return
    if file.part is None:
        raise UserError(
            f"weights file {file} holds {listed(more)} beside the network's {part.prefix}: give "
            f"--weights {file.path}#{part.label} to leave that out"
        )
    logger.warning("%s: not used: %s", file, listed(more))
