"""Blocks between which tokens can merge, found by what happens in a forward pass, and the list that merges them."""

import inspect
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.plans import Plan
from optin_deploy.structure.groups import Rows, Structure
from optin_deploy.structure.residual import Call, trial_forward
from optin_deploy.tokens import matching, merged, most_mergeable, placed, unmerged

# What blocks call a mask that is added to the attention's logits.
_MASKS = ("attn_mask", "attention_mask")


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
    """

    name: str
    mask: str
    prefix: int
    tokens: int
    width: int
    blocks: tuple[str, ...]
    keys: tuple[KeySource | None, ...]
    places: tuple[tuple[str, int], ...] = ()

    def least_behind(self, tokens: int) -> int:
        """The fewest tokens that a block can get when so many come to it."""
        return tokens - most_mergeable(tokens, self.prefix)

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
        if x.shape[1] != self.stack.tokens:
            raise UserError(f"tokens merge among {self.stack.tokens}, and here are {x.shape[1]}: keep the input's size")
        sizes: Tensor | None = None
        where: Tensor | None = None
        places: dict[str, Tensor] = {}
        for index, block in enumerate(self._modules.values()):
            assert block is not None
            count = x.shape[1] - self.schedule[index]
            if count:
                match = matching(self._metric(index, block, x), self.stack.prefix, count)
                x, sizes = merged(x, x.new_ones((*x.shape[:2], 1)) if sizes is None else sizes, match)
                where = match.moved if where is None else match.moved.gather(1, where)
                for name, _ in self.stack.places:
                    place = places[name] if name in places else kwargs[name].expand(x.shape[0], -1, -1)
                    places[name] = placed(place, match)
            called = inspect.signature(block.forward).bind(x, *args, **{**kwargs, **places})
            if sizes is not None:
                given = called.arguments.get(self.stack.mask)
                called.arguments[self.stack.mask] = _added(given, sizes.log()[:, None, None, :, 0])
            x = block(*called.args, **called.kwargs)
        return x if where is None else unmerged(x, where)

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


def _added(given: Tensor | None, bias: Tensor) -> Tensor:
    return bias if given is None else given + bias


def with_merging(module: nn.Module, structure: Structure, stack: TokenStack, plan: Plan) -> None:
    """Let tokens of ``module``, which ``plan`` has left of the dense network, merge by its schedule, in place."""
    stack.check(plan.tokens)
    units = {group.name: group.units for group in structure.groups}
    heads = [len(plan.kept.get(k.group, range(units[k.group]))) if k else 0 for k in stack.keys]
    parent, _, name = stack.name.rpartition(".")
    blocks = dict(module.get_submodule(stack.name).named_children())
    setattr(module.get_submodule(parent), name, MergingBlocks(blocks, stack, plan.tokens, heads).train(module.training))


def token_stack(module: nn.Module, inputs: Mapping[str, Tensor], structure: Structure) -> TokenStack:
    """The blocks of ``module`` between which tokens can merge.

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
    prefix, mask = _prefix(calls, shape[1]), _mask_of(module, blocks)
    if not most_mergeable(shape[1], prefix):
        raise _refused("it has no two patches")
    arguments = _arguments(module, inputs, blocks)
    arguments.pop(mask, None)
    keys = tuple(_key_source(structure, calls, block) for block in blocks)
    return TokenStack(name, mask, prefix, shape[1], shape[2], blocks, keys, _places(arguments, shape[1] - prefix))


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
