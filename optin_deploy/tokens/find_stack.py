"""Finding the blocks between which tokens can merge, by what happens in a forward pass."""

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.nn.calls import Call, trace_calls
from optin_deploy.nn.hooks import forward_hooks
from optin_deploy.nn.names import contains
from optin_deploy.structure.adapters.resizable_attention import PLACED
from optin_deploy.structure.groups import OutputSlice, Structure
from optin_deploy.tokens.matching import most_mergeable
from optin_deploy.tokens.merging import MergingBlocks
from optin_deploy.tokens.stack import KeySource, TokenStack, real_tokens

# What blocks call a mask, or biases between places, that are added to the attention's logits.
_BIASES = "shared_rel_pos_bias"
_MASKS = ("attn_mask", "attention_mask", _BIASES)


def token_stack(
    module: nn.Module, inputs: Mapping[str, Tensor], structure: Structure, token_mask: str | None = None
) -> TokenStack:
    """The blocks of ``module`` between which tokens can merge.

    Args:
        token_mask: the input that is 0 at padding tokens, of a text network.

    Raises:
        UserError: there are none, with the reason.
    """
    lists = Counter(block.rpartition(".")[0] for block in structure.blocks)
    name = max(lists, key=lambda each: lists[each])
    holder = module.get_submodule(name)
    if isinstance(holder, MergingBlocks):
        raise _refused("its tokens merge already")
    if not isinstance(holder, nn.ModuleList | nn.Sequential):
        raise _refused("its blocks are not those of a list")
    blocks = tuple(f"{name}.{child}" for child, _ in holder.named_children())
    calls = {call.name: call for call in trace_calls(module, inputs)}
    if any(block not in calls for block in blocks):
        raise _refused("not every block of its list runs")
    found = [calls[block] for block in blocks]
    shape = _common_shape(found)
    text = token_mask is not None
    # Of a text the first token stands for all of it.
    prefix, mask = 1 if text else _prefix(calls, shape[1]), _mask_of(module, blocks)
    if not most_mergeable(shape[1], prefix):
        raise _refused("it has no two patches")
    arguments = _arguments(module, _padded(inputs, token_mask) if token_mask else inputs, blocks)
    given = arguments.pop(mask, None)
    if text:
        _check_padding(given, shape)
    biased = _biased(holder, mask) if mask == _BIASES else ""
    if given and not text and not biased:
        raise _refused(f"its blocks are given {mask}, which cannot follow the tokens")
    keys = tuple(_key_source(structure, calls, block) for block in blocks)
    places = _places(arguments, shape[1] - prefix)
    if text and places:
        raise _refused(f"its blocks are also given {places[0][0]}, which cannot follow words")
    return TokenStack(name, mask, prefix, shape[1], shape[2], blocks, keys, places, text, biased)


def _padded(inputs: Mapping[str, Tensor], token_mask: str) -> dict[str, Tensor]:
    """The inputs with the second half of every text masked."""
    mask = inputs[token_mask].clone()
    mask[:, mask.shape[1] // 2 :] = 0
    return {**inputs, token_mask: mask}


def _check_padding(given: Sequence[Tensor] | None, shape: torch.Size) -> None:
    """Refuse masks that say more than where padding is: what comes after, how far away a word is."""
    if not given:
        raise _refused("its blocks are not told of padding by their mask")
    first = given[0]
    real = torch.arange(shape[1]) < shape[1] // 2
    if first.dim() != 4 or first.shape[1] != 1 or not bool((real_tokens(first).cpu() == real).all()):
        raise _refused("the mask of its blocks is not one of padding")
    alike = (first == first[:, :, :1]).all()
    plain = first.dtype == torch.bool or bool((first[..., : shape[1] // 2] == 0).all())
    if not alike or not plain:
        raise _refused("the mask of its blocks says more than where padding is, like what comes after a word")


def _refused(reason: str) -> UserError:
    return UserError(f"tokens cannot merge in this network: {reason}; use --tokens off")


def _common_shape(blocks: Sequence[Call]) -> torch.Size:
    """Of what enters the blocks, each of which takes what the one before gives."""
    shapes = {call.input.shape if call.input is not None else None for call in blocks}
    shape = next(iter(shapes))
    if shape is None or len(shapes) != 1 or len(shape) != 3:
        raise _refused("its blocks do not take (batch, tokens, width), all of one shape")
    for before, after in pairwise(blocks):
        if before.output is not after.input:
            raise _refused(f"{after.name} does not take just what {before.name} gives")
    return shape


def _arguments(module: nn.Module, inputs: Mapping[str, Tensor], blocks: Sequence[str]) -> dict[str, list[Tensor]]:
    """The tensors that blocks are given beside the tokens, by name, of every block that is given one."""
    seen: dict[str, list[Tensor]] = {}

    def hook(_: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(block.forward).bind(*args, **kwargs)
        flat = {**given.arguments, **given.arguments.get("kwargs", {})}
        if flat.get("past_key_values") is None:
            flat.pop("cache_position", None)  # where tokens go in a cache: transformers 5.0 tells encoders, too
        for name, value in list(flat.items())[1:]:
            if isinstance(value, Tensor):
                seen.setdefault(name, []).append(value)
            elif isinstance(value, tuple | list) and any(isinstance(each, Tensor) for each in value):
                raise _refused(f"its blocks are also given {name}, which cannot follow the tokens")

    with forward_hooks(module, blocks, before=hook), torch.no_grad():
        module(**inputs)
    return seen


def _places(arguments: Mapping[str, list[Tensor]], patches: int) -> tuple[tuple[str, int], ...]:
    """Arguments ``(patches, features)`` that are the same for all blocks; what is neither cannot follow the tokens."""
    for name, given in arguments.items():
        if given[0].dim() != 2 or given[0].shape[0] != patches or any(each is not given[0] for each in given):
            raise _refused(f"its blocks are also given {name}, which cannot follow the tokens")
    return tuple((name, given[0].shape[1]) for name, given in arguments.items())


def _mask_of(module: nn.Module, blocks: Sequence[str]) -> str:
    taken = [set(inspect.signature(module.get_submodule(block).forward).parameters) for block in blocks]
    mask = next((name for name in _MASKS if all(name in each for each in taken)), None)
    if mask is None:
        raise _refused("its blocks take no attention mask, by which merged tokens would count for several")
    return mask


def _biased(blocks: nn.Module, mask: str) -> str:
    """The attention inside of every block that the biases are given to."""
    found = {tuple(n for n, m in block.named_modules() if type(m) in PLACED) for block in blocks.children()}
    names = found.pop()
    if found or len(names) != 1 or "." in names[0]:
        raise _refused(f"its blocks are given {mask} for no attention that is known")
    return names[0]


def _prefix(calls: Mapping[str, Call], tokens: int) -> int:
    """Tokens before the patches, which the last map before the blocks has as pixels."""
    maps = [call.output for call in calls.values() if call.output is not None and call.output.dim() == 4]
    pixels = [m.shape[2:].numel() for m in maps if m.shape[2:].numel() <= tokens]
    if not pixels:
        raise _refused("it has no map of patches")
    return tokens - max(pixels)


def _key_source(structure: Structure, calls: Mapping[str, Call], block: str) -> KeySource | None:
    """Where the keys of the block's attention come from, if a module of the block gives just what they are made of."""
    heads = [g for g in structure.groups if g.kind == "head" and contains(block, g.output) and g.qkv is not None]
    if len(heads) != 1 or heads[0].qkv is None or heads[0].qkv.keys.module not in calls:
        return None
    rows = heads[0].qkv.keys
    given = calls[rows.module].input
    inside = [call for name, call in calls.items() if contains(block, name)]
    norms = [call.name for call in inside if call.output is given and given is not None]
    if not norms:
        return None
    begin = len(block) + 1
    return KeySource(norms[0][begin:], OutputSlice(rows.module[begin:], rows.part, rows.parts), heads[0].name)
