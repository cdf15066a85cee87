"""Blocks that merge tokens as they run, in the place of the list that held them."""

import copy
import inspect
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.nn.copies import copy_module, shared_tensors
from optin_deploy.structure.adapters.resizable_attention import PLACED, PlacedBeitAttention
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import change_class
from optin_deploy.tokens.choices import Choice, choose
from optin_deploy.tokens.matching import (
    Matching,
    biases_between,
    match_choice,
    merge_original_positions,
    merge_positions,
    merge_tokens,
    similarities,
    unmerge_tokens,
)
from optin_deploy.tokens.stack import TokenStack, real_tokens
from optin_deploy.tokens.text_matching import match_text_choice, merge_text_tokens, real_text_tokens, text_similarities


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

    @property
    def merging_indices(self) -> tuple[int, ...]:
        """Of the blocks before which tokens merge."""
        steps = pairwise((self.stack.tokens, *self.schedule))
        return tuple(index for index, (before, after) in enumerate(steps) if after < before)

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
                    real = real_text_tokens(sizes, stack.prefix)
                    choice = self.choose(index, text_similarities(metric, real, stack.prefix), x.shape[1] - left, real)
                    moved = match_text_choice(choice, real, stack.prefix)
                    x, sizes = merge_text_tokens(x, sizes, moved, left)
                else:
                    choice = self.choose(index, similarities(metric, stack.prefix), before - after)
                    match = match_choice(choice, before, stack.prefix, before - after, metric.dtype)
                    moved = match.moved
                    x, sizes = self.join(x, sizes, match)
                    for name, _ in stack.places:
                        place = places[name] if name in places else kwargs[name].expand(x.shape[0], -1, -1)
                        places[name] = merge_positions(place, match)
                    at = None if at is None else merge_original_positions(at, match)
                where = moved if where is None else moved.gather(1, where)
            called = inspect.signature(block.forward).bind(x, *args, **{**kwargs, **places})
            if sizes is not None:
                # The mask of a text says no more than the sizes: padding has none.
                given = None if stack.text else called.arguments.get(stack.mask)
                given = given if at is None else self._between(block, given, at)
                called.arguments[stack.mask] = _added(given, _counting(sizes))
            x = block(*called.args, **called.kwargs)
        return x if where is None else unmerge_tokens(x, where)

    def choose(self, index: int, similarity: Tensor, count: int, real: Tensor | None = None) -> Choice:
        """Which tokens merge before a block, see `chosen`."""
        return choose(similarity, count, real)

    def join(self, x: Tensor, sizes: Tensor, match: Matching) -> tuple[Tensor, Tensor]:
        """Patches and their sizes after merging."""
        return merge_tokens(x, sizes, match)

    def _between(self, block: nn.Module, shared: Tensor | None, at: Tensor) -> Tensor | None:
        """The biases that the block's attention adds between the tokens left."""
        attention = block.get_submodule(self.stack.biased)
        # Where all heads are gone there is none.
        biases = attention.biases(shared) if isinstance(attention, PlacedBeitAttention) else None
        return None if biases is None else biases_between(biases, at)

    def _sizes(self, block: nn.Module, x: Tensor, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Tensor:
        """Of tokens that have not merged yet: 1, and 0 for padding."""
        called = inspect.signature(block.forward).bind(x, *args, **kwargs)
        mask = called.arguments.get(self.stack.mask) if self.stack.text else None
        if mask is None:
            return x.new_ones((*x.shape[:2], 1))
        return real_tokens(mask).expand(x.shape[0], -1)[:, :, None].to(x.dtype)

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


def merging_names(module: nn.Module) -> list[str]:
    """Of the `MergingBlocks` in a module."""
    return [name for name, part in module.named_modules() if isinstance(part, MergingBlocks)]


def with_blocks_of(module: nn.Module, cls: type[MergingBlocks]) -> nn.Module:
    """A copy of a module, which shares its weights, with `MergingBlocks` of another class."""
    made = copy_module(module, shared_tensors(module))
    for name in merging_names(made):
        blocks = made.get_submodule(name)
        assert isinstance(blocks, MergingBlocks)
        inner = dict(blocks.named_children())
        made.set_submodule(name, cls(inner, blocks.stack, blocks.schedule, blocks.heads).eval())
    return made


def _counting(sizes: Tensor) -> Tensor:
    """What is added to logits for tokens to count as often as their sizes say."""
    return sizes.log().clamp_min(torch.finfo(sizes.dtype).min)[:, None, None, :, 0]


def _added(given: Tensor | None, bias: Tensor) -> Tensor:
    return bias if given is None else given + bias


def with_merging(module: nn.Module, structure: Structure, stack: TokenStack, plan: Plan) -> None:
    """Let tokens of ``module``, which ``plan`` has left of the dense network, merge by its schedule, in place."""
    stack.check(plan.tokens)
    heads = [len(plan.units(structure.group(k.group))) if k else 0 for k in stack.keys]
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
    made.set_submodule(attention, change_class(block.get_submodule(attention), cls))
    return made
