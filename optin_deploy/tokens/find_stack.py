"""Find the blocks between which tokens can merge, from a forward pass."""

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

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

# Names of block arguments that are added to the attention's logits: a mask, or biases between positions.
_BIASES = "shared_rel_pos_bias"
_MASKS = ("attn_mask", "attention_mask", _BIASES)


def token_stack(
    module: nn.Module, inputs: Mapping[str, Tensor], structure: Structure, token_mask: str | None = None
) -> TokenStack:
    """Return the blocks of ``module`` between which tokens can merge.

    Args:
        token_mask: the input of a text network that is 0 at padding tokens.

    Raises:
        UserError: there are none; the message has the reason.
    """
    lists = Counter(block.rpartition(".")[0] for block in structure.blocks)
    name = max(lists, key=lambda parent: lists[parent])
    holder = module.get_submodule(name)
    if isinstance(holder, MergingBlocks):
        raise _refusal("its tokens merge already")
    if not isinstance(holder, nn.ModuleList | nn.Sequential):
        raise _refusal("its blocks are not those of a list")
    blocks = tuple(f"{name}.{child}" for child, _ in holder.named_children())
    calls = {call.name: call for call in trace_calls(module, inputs)}
    if any(block not in calls for block in blocks):
        raise _refusal("not every block of its list runs")
    shape = _common_shape([calls[block] for block in blocks])
    text = token_mask is not None
    # The first token of a text represents the whole text.
    prefix, mask = 1 if text else _prefix(calls, shape[1]), _mask_of(module, blocks)
    if not most_mergeable(shape[1], prefix):
        raise _refusal("it has no two patches")
    arguments = _arguments(module, _mask_second_half(inputs, token_mask) if token_mask else inputs, blocks)
    masks = arguments.pop(mask, None)
    if text:
        _check_padding(masks, shape)
    biased = _biased_attention(holder, mask) if mask == _BIASES else ""
    if masks and not text and not biased:
        raise _refusal(f"its blocks take {mask}, which cannot follow the tokens")
    keys = tuple(_key_source(structure, calls, block) for block in blocks)
    places = _places(arguments, shape[1] - prefix)
    if text and places:
        raise _refusal(f"its blocks also take {places[0][0]}, which cannot follow text tokens")
    return TokenStack(name, mask, prefix, shape[1], shape[2], blocks, keys, places, text, biased)


def _mask_second_half(inputs: Mapping[str, Tensor], token_mask: str) -> dict[str, Tensor]:
    """Return the inputs with the second half of every text masked."""
    mask = inputs[token_mask].clone()
    mask[:, mask.shape[1] // 2 :] = 0
    return {**inputs, token_mask: mask}


def _check_padding(masks: Sequence[Tensor] | None, shape: torch.Size) -> None:
    """Raise UserError for masks that hold more than padding, like causal masks or distances between tokens."""
    if not masks:
        raise _refusal("its blocks take no mask of the padding")
    first = masks[0]
    real = torch.arange(shape[1]) < shape[1] // 2
    if first.dim() != 4 or first.shape[1] != 1 or not bool((real_tokens(first).cpu() == real).all()):
        raise _refusal("the mask of its blocks is not a padding mask")
    alike = (first == first[:, :, :1]).all()
    plain = first.dtype == torch.bool or bool((first[..., : shape[1] // 2] == 0).all())
    if not alike or not plain:
        raise _refusal("the mask of its blocks holds more than padding, like a causal mask")


def _refusal(reason: str) -> UserError:
    return UserError(f"tokens cannot merge in this network: {reason}; use --tokens off")


def _common_shape(blocks: Sequence[Call]) -> torch.Size:
    """Return the shape of the inputs of all blocks; UserError unless each takes the output of the one before."""
    shapes = {call.input.shape if call.input is not None else None for call in blocks}
    shape = next(iter(shapes))
    if shape is None or len(shapes) != 1 or len(shape) != 3:
        raise _refusal("its blocks do not take (batch, tokens, width), all of one shape")
    for before, after in pairwise(blocks):
        if before.output is not after.input:
            raise _refusal(f"{after.name} does not take the output of {before.name} unchanged")
    return shape


def _arguments(module: nn.Module, inputs: Mapping[str, Tensor], blocks: Sequence[str]) -> dict[str, list[Tensor]]:
    """Return the other tensor arguments of the blocks: name -> one tensor for each block that takes it."""
    seen: dict[str, list[Tensor]] = {}

    def hook(_: str, block: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        arguments = inspect.signature(block.forward).bind(*args, **kwargs).arguments
        flat = {**arguments, **arguments.get("kwargs", {})}
        if flat.get("past_key_values") is None:
            flat.pop("cache_position", None)  # positions in a cache; transformers 5.0 passes them to encoders too
        for name, value in list(flat.items())[1:]:
            if isinstance(value, Tensor):
                seen.setdefault(name, []).append(value)
            elif isinstance(value, tuple | list) and any(isinstance(item, Tensor) for item in value):
                raise _refusal(f"its blocks also take {name}, which cannot follow the tokens")

    with forward_hooks(module, blocks, before=hook), torch.no_grad():
        module(**inputs)
    return seen


def _places(arguments: Mapping[str, list[Tensor]], patches: int) -> tuple[tuple[str, int], ...]:
    """Return the arguments ``(patches, features)`` that all blocks share, and their features; UserError for others."""
    for name, tensors in arguments.items():
        first = tensors[0]
        if first.dim() != 2 or first.shape[0] != patches or any(tensor is not first for tensor in tensors):
            raise _refusal(f"its blocks also take {name}, which cannot follow the tokens")
    return tuple((name, tensors[0].shape[1]) for name, tensors in arguments.items())


def _mask_of(module: nn.Module, blocks: Sequence[str]) -> str:
    parameters = [set(inspect.signature(module.get_submodule(block).forward).parameters) for block in blocks]
    mask = next((name for name in _MASKS if all(name in block for block in parameters)), None)
    if mask is None:
        raise _refusal("its blocks take no attention mask, which weights merged tokens by their size")
    return mask


def _biased_attention(blocks: nn.Module, mask: str) -> str:
    """Return the name inside every block of the attention that takes the biases."""
    candidates = {tuple(n for n, m in block.named_modules() if type(m) in PLACED) for block in blocks.children()}
    names = candidates.pop()
    if candidates or len(names) != 1 or "." in names[0]:
        raise _refusal(f"its blocks take {mask} for an unknown attention")
    return names[0]


def _prefix(calls: Mapping[str, Call], tokens: int) -> int:
    """Return the number of tokens before the patches; the last feature map before the blocks has a pixel per patch."""
    maps = [call.output for call in calls.values() if call.output is not None and call.output.dim() == 4]
    pixels = [m.shape[2:].numel() for m in maps if m.shape[2:].numel() <= tokens]
    if not pixels:
        raise _refusal("it has no feature map of patches")
    return tokens - max(pixels)


def _key_source(structure: Structure, calls: Mapping[str, Call], block: str) -> KeySource | None:
    """Return the source of the keys of the block's attention; None unless a norm of the block is their only input."""
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
