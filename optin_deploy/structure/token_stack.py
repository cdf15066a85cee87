"""Blocks between which tokens can merge, found by what happens in a forward pass, and the list that merges them."""

import copy
import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.plans import Plan
from optin_deploy.slicing import slimmed
from optin_deploy.structure.groups import Rows, Structure
from optin_deploy.structure.residual import Call, trial_forward
from optin_deploy.structure.slim import PLACED, PlacedBeitAttention
from optin_deploy.tokens import Matching, between, matching, merged, most_mergeable, placed, places_left, unmerged
from optin_deploy.words import word_matching, words_merged

# What blocks call a mask, or biases between places, that are added to the attention's logits.
_BIASES = "shared_rel_pos_bias"
_MASKS = ("attn_mask", "attention_mask", _BIASES)


@dataclass(frozen=True)
class KeySource:
    """What the keys of a block's attention are made of: the norm before them, and rows of a linear layer; names are
    those inside the block. ``group`` names the heads."""

    norm: str
    rows: Rows
    group: str


@dataclass(frozen=True)
class TokenStack:
    """Blocks that run one behind the other on ``(batch, tokens, width)``.

    Attributes:
        name: of the list that holds them, and nothing else.
        mask: the argument of every block that is added to the attention's logits.
        prefix: tokens at the beginning that are no patches: class, distillation and register tokens.
        keys: of every block; None where its keys are not known.
        places: arguments of the blocks that belong to the places of patches, like rotary positions, and their features.
        text: whether the tokens are words: inputs have any length, numbers of tokens are those of the sample input and
            stand for parts of it, and the mask tells of padding.
        biased: inside of every block, the attention that adds biases between places to its logits; "" where none does.
    """

    name: str
    mask: str
    prefix: int
    tokens: int
    width: int
    blocks: tuple[str, ...]
    keys: tuple[KeySource | None, ...]
    places: tuple[tuple[str, int], ...] = ()
    text: bool = False
    biased: str = ""

    def least_behind(self, tokens: int) -> int:
        """The fewest tokens that a block can get when so many come to it."""
        return tokens - most_mergeable(tokens, self.prefix)

    def leaving(self, before: int, tokens: int, now: int) -> int:
        """How many of ``now`` words (symbolic ones, too) leave where of ``before`` in the sample ``tokens`` are left;
        rounded down, and so at most half of those behind the prefix, as there."""
        common = gcd(before, before - tokens)
        return now * ((before - tokens) // common) // (before // common)

    def possible(self, schedule: Sequence[int]) -> bool:
        """Whether so many tokens can enter each block."""
        return all(self.least_behind(a) <= b <= a for a, b in pairwise((self.tokens, *schedule)))

    def check(self, schedule: Sequence[int]) -> None:
        """Raise UserError unless ``schedule`` says how many tokens enter each block, and can be merged to."""
        listed = ",".join(map(str, schedule))
        if len(schedule) != len(self.blocks):
            raise UserError(f"--tokens {listed}: give a number for each of the {len(self.blocks)} blocks")
        before = self.tokens
        for tokens in schedule:
            if not self.least_behind(before) <= tokens <= before:
                raise UserError(
                    f"--tokens {listed}: behind {before} tokens there can be {self.least_behind(before)} to {before}, "
                    f"not {tokens}"
                )
            before = tokens


class MergingBlocks(nn.Sequential):
    """The blocks of a `TokenStack`, which merge tokens before those that get fewer, and give all tokens back.

    Whoever goes through the list gets one thing to call, which runs all blocks: the sizes of tokens have to get from
    block to block. Every token counts in the attention as often as it stands for one (proportional attention).

    Args:
        schedule: how many tokens enter each block.
        heads: of every block, how many it has; 0 where its keys are not known, and tokens are compared as they come.
    """

    def __init__(
        self, blocks: Mapping[str, nn.Module], stack: TokenStack, schedule: Sequence[int], heads: Sequence[int]
    ) -> None:
        super().__init__()
        for name, block in blocks.items():
            self.add_module(name, block)
        self.stack, self.schedule, self.heads = stack, tuple(schedule), tuple(heads)

    def __iter__(self) -> Iterator[Any]:
        return iter((self,))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        stack = self.stack
        if not stack.text and x.shape[1] != stack.tokens:
            raise UserError(f"tokens merge among {stack.tokens}, and here are {x.shape[1]}: keep the input's size")
        sizes: Tensor | None = None
        where: Tensor | None = None
        places: dict[str, Tensor] = {}
        at = torch.arange(stack.tokens, device=x.device).expand(x.shape[0], -1) if stack.biased else None
        steps = pairwise((stack.tokens, *self.schedule))
        for index, (block, (before, after)) in enumerate(zip(self._modules.values(), steps, strict=True)):
            assert block is not None
            if after < before:
                sizes = self._sizes(block, x, args, kwargs) if sizes is None else sizes
                metric = self._metric(index, block, x)
                if stack.text:
                    left = x.shape[1] - stack.leaving(before, after, x.shape[1])
                    moved = word_matching(metric, sizes, stack.prefix, x.shape[1] - left)
                    x, sizes = words_merged(x, sizes, moved, left)
                else:
                    match = matching(metric, stack.prefix, before - after)
                    moved = match.moved
                    x, sizes = self.join(x, sizes, match)
                    for name, _ in stack.places:
                        place = places[name] if name in places else kwargs[name].expand(x.shape[0], -1, -1)
                        places[name] = placed(place, match)
                    at = None if at is None else places_left(at, match)
                where = moved if where is None else moved.gather(1, where)
            called = inspect.signature(block.forward).bind(x, *args, **{**kwargs, **places})
            if sizes is not None:
                # The mask of a text says no more than the sizes: padding has none.
                given = None if stack.text else called.arguments.get(stack.mask)
                given = given if at is None else self._between(block, given, at)
                called.arguments[stack.mask] = _added(given, _counting(sizes))
            x = block(*called.args, **called.kwargs)
        return x if where is None else unmerged(x, where)

    def join(self, x: Tensor, sizes: Tensor, match: Matching) -> tuple[Tensor, Tensor]:
        """Patches and their sizes after merging."""
        return merged(x, sizes, match)

    def _between(self, block: nn.Module, shared: Tensor | None, at: Tensor) -> Tensor | None:
        """The biases that the block's attention adds between the tokens left."""
        attention = block.get_submodule(self.stack.biased)
        # Where all heads are gone there is none.
        biases = attention.biases(shared) if isinstance(attention, PlacedBeitAttention) else None
        return None if biases is None else between(biases, at)

    def _sizes(self, block: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Of tokens that have not merged yet: 1, and 0 for padding."""
        called = inspect.signature(block.forward).bind(x, *args, **kwargs)
        mask = called.arguments.get(self.stack.mask) if self.stack.text else None
        if mask is None:
            return x.new_ones((*x.shape[:2], 1))
        return _real(mask).expand(x.shape[0], -1)[:, :, None].to(x.dtype)

    def _metric(self, index: int, block: nn.Module, x: Tensor) -> Tensor:
        """What tokens are compared by: the mean over heads of their keys."""
        source, heads = self.stack.keys[index], self.heads[index]
        if source is None or not heads:
            return x
        layer = block.get_submodule(source.rows.module)
        assert isinstance(layer, nn.Linear)
        rows = source.rows.of(layer.out_features)
        weight = layer.weight[rows].unflatten(0, (heads, -1)).mean(0)
        bias = None if layer.bias is None else layer.bias[rows].unflatten(0, (heads, -1)).mean(0)
        return F.linear(block.get_submodule(source.norm)(x), weight, bias)


def _counting(sizes: Tensor) -> Tensor:
    """What is added to logits for tokens to count as often as their sizes say."""
    return sizes.log().clamp_min(torch.finfo(sizes.dtype).min)[:, None, None, :, 0]


def _real(mask: Tensor) -> Tensor:
    """Bool ``(batch or 1, tokens)``, False where a mask ``(batch, 1, queries or 1, tokens)``, alike for all queries, is
    False or far below 0."""
    row = mask[:, 0, 0, :]
    return row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2


def _added(given: Tensor | None, bias: Tensor) -> Tensor:
    return bias if given is None else given + bias


def with_merging(module: nn.Module, structure: Structure, stack: TokenStack, plan: Plan) -> None:
    """Let tokens of ``module``, which ``plan`` has left of the dense network, merge by its schedule, in place."""
    stack.check(plan.tokens)
    units = {group.name: group.units for group in structure.groups}
    heads = [len(plan.kept.get(k.group, range(units[k.group]))) if k else 0 for k in stack.keys]
    parent, _, name = stack.name.rpartition(".")
    blocks = dict(module.get_submodule(stack.name).named_children())
    if stack.biased:
        for (child, block), tokens in zip(blocks.items(), plan.tokens, strict=True):
            blocks[child] = _placed(block, stack.biased) if tokens < stack.tokens else block
    setattr(module.get_submodule(parent), name, MergingBlocks(blocks, stack, plan.tokens, heads).train(module.training))


def _placed(block: nn.Module, attention: str) -> nn.Module:
    """The block with the same weights, its attention adding the biases that it is given."""
    cls = PLACED.get(type(block.get_submodule(attention)))
    if cls is None:
        return block
    made = copy.copy(block)
    made.__dict__["_modules"] = dict(block._modules)
    made.set_submodule(attention, slimmed(block.get_submodule(attention), cls))
    return made


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
    calls = {call.name: call for call in trial_forward(module, inputs)}
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
    if first.dim() != 4 or first.shape[1] != 1 or not bool((_real(first).cpu() == real).all()):
        raise _refused("the mask of its blocks is not one of padding")
    alike = (first == first[:, :, :1]).all()
    plain = first.dtype == torch.bool or bool((first[..., : shape[1] // 2] == 0).all())
    if not alike or not plain:
        raise _refused("the mask of its blocks says more than where padding is, like what comes after a word")


def _refused(reason: str) -> UserError:
    return UserError(f"tokens cannot merge in this network: {reason}; use --tokens off")


def _common_shape(blocks: Sequence[Call]) -> torch.Size:
    """Of what enters the blocks, each of which takes what the one before gives."""
    shapes = {call.given.shape if call.given is not None else None for call in blocks}
    shape = next(iter(shapes))
    if shape is None or len(shapes) != 1 or len(shape) != 3:
        raise _refused("its blocks do not take (batch, tokens, width), all of one shape")
    for before, after in pairwise(blocks):
        if before.returned is not after.given:
            raise _refused(f"{after.name} does not take just what {before.name} gives")
    return shape


def _arguments(module: nn.Module, inputs: Mapping[str, Tensor], blocks: Sequence[str]) -> dict[str, list[Tensor]]:
    """The tensors that blocks are given beside the tokens, by name, of every block that is given one."""
    seen: dict[str, list[Tensor]] = {}

    def hook(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = inspect.signature(block.forward).bind(*args, **kwargs)
        flat = {**given.arguments, **given.arguments.get("kwargs", {})}
        for name, value in list(flat.items())[1:]:
            if isinstance(value, Tensor):
                seen.setdefault(name, []).append(value)
            elif isinstance(value, tuple | list) and any(isinstance(each, Tensor) for each in value):
                raise _refused(f"its blocks are also given {name}, which cannot follow the tokens")

    handles = [module.get_submodule(b).register_forward_pre_hook(hook, with_kwargs=True) for b in blocks]
    try:
        with torch.no_grad():
            module(**inputs)
    finally:
        for handle in handles:
            handle.remove()
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
    maps = [call.returned for call in calls.values() if call.returned is not None and call.returned.dim() == 4]
    pixels = [m.shape[2:].numel() for m in maps if m.shape[2:].numel() <= tokens]
    if not pixels:
        raise _refused("it has no map of patches")
    return tokens - max(pixels)


def _key_source(structure: Structure, calls: Mapping[str, Call], block: str) -> KeySource | None:
    """Where the keys of the block's attention come from, if a module of the block gives just what they are made of."""
    heads = [g for g in structure.groups if g.kind == "head" and g.output.startswith(f"{block}.") and g.qkv is not None]
    if len(heads) != 1 or heads[0].qkv is None or heads[0].qkv.keys.module not in calls:
        return None
    rows = heads[0].qkv.keys
    given = calls[rows.module].given
    inside = [call for name, call in calls.items() if name.startswith(f"{block}.")]
    norms = [call.name for call in inside if call.returned is given and given is not None]
    if not norms:
        return None
    begin = len(block) + 1
    return KeySource(norms[0][begin:], Rows(rows.module[begin:], rows.part, rows.parts), heads[0].name)
