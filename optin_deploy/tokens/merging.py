"""Blocks that merge tokens as they run; they replace the list that held them."""

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
    """The blocks of a `TokenStack`, which merge tokens before some blocks and restore all tokens at the end.

    Iterating over the list yields one callable that runs all blocks, because the token sizes must pass from block to
    block. The attention weights every token by the number of tokens merged into it (proportional attention).

    Args:
        schedule: number of tokens that enter each block.
        heads: number of heads of each block; 0 if its keys are unknown, so that tokens themselves are compared.
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
        """The indices of the blocks before which tokens merge."""
        steps = pairwise((self.stack.tokens, *self.schedule))
        return tuple(index for index, (before, after) in enumerate(steps) if after < before)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter((self,))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # type: ignore[override]
        stack = self.stack
        if not stack.text and x.shape[1] != stack.tokens:
            raise UserError(f"tokens merge among {stack.tokens}, but the input has {x.shape[1]}: keep the input's size")
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
                # The mask of a text is redundant with the sizes: padding has size 0.
                mask = None if stack.text else called.arguments.get(stack.mask)
                mask = mask if at is None else self._between(block, mask, at)
                called.arguments[stack.mask] = _add_bias(mask, _counting(sizes))
            x = block(*called.args, **called.kwargs)
        return x if where is None else unmerge_tokens(x, where)

    def choose(self, index: int, similarity: Tensor, count: int, real: Tensor | None = None) -> Choice:
        """Choose the tokens that merge before a block, see `choices.choose`."""
        return choose(similarity, count, real)

    def join(self, x: Tensor, sizes: Tensor, match: Matching) -> tuple[Tensor, Tensor]:
        """Return patches and their sizes after merging."""
        return merge_tokens(x, sizes, match)

    def _between(self, block: nn.Module, shared: Tensor | None, at: Tensor) -> Tensor | None:
        """Return the position biases of the block's attention between the remaining tokens."""
        attention = block.get_submodule(self.stack.biased)
        # An attention without heads has no biases.
        biases = attention.biases(shared) if isinstance(attention, PlacedBeitAttention) else None
        return None if biases is None else biases_between(biases, at)

    def _sizes(self, block: nn.Module, x: Tensor, args: tuple[object, ...], kwargs: Mapping[str, object]) -> Tensor:
        """Return the sizes of tokens before any merge: 1, and 0 for padding."""
        called = inspect.signature(block.forward).bind(x, *args, **kwargs)
        mask = called.arguments.get(self.stack.mask) if self.stack.text else None
        if mask is None:
            return x.new_ones((*x.shape[:2], 1))
        return real_tokens(mask).expand(x.shape[0], -1)[:, :, None].to(x.dtype)

    def _metric(self, index: int, block: nn.Module, x: Tensor) -> Tensor:
        """Return the features that tokens are compared by: the mean of their keys over heads."""
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
    """Return the names of the `MergingBlocks` in a module."""
    return [name for name, child in module.named_modules() if isinstance(child, MergingBlocks)]


def with_blocks_of(module: nn.Module, cls: type[MergingBlocks]) -> nn.Module:
    """Return a copy of a module, sharing its weights, with `MergingBlocks` of another class."""
    made = copy_module(module, shared_tensors(module))
    for name in merging_names(made):
        blocks = made.get_submodule(name)
        assert isinstance(blocks, MergingBlocks)
        inner = dict(blocks.named_children())
        made.set_submodule(name, cls(inner, blocks.stack, blocks.schedule, blocks.heads).eval())
    return made


def _counting(sizes: Tensor) -> Tensor:
    """Return the bias on the logits that weights tokens by their sizes."""
    return sizes.log().clamp_min(torch.finfo(sizes.dtype).min)[:, None, None, :, 0]


def _add_bias(mask: Tensor | None, bias: Tensor) -> Tensor:
    return bias if mask is None else mask + bias


def with_merging(module: nn.Module, structure: Structure, stack: TokenStack, plan: Plan) -> None:
    """Make ``module``, the dense network sliced by ``plan``, merge tokens by the plan's schedule, in place."""
    stack.check(plan.tokens)
    heads = [len(plan.units(structure.group(k.group))) if k else 0 for k in stack.keys]
    parent, _, name = stack.name.rpartition(".")
    blocks = dict(module.get_submodule(stack.name).named_children())
    if stack.biased:
        for (child, block), tokens in zip(blocks.items(), plan.tokens, strict=True):
            blocks[child] = _use_placed_attention(block, stack.biased) if tokens < stack.tokens else block
    setattr(module.get_submodule(parent), name, MergingBlocks(blocks, stack, plan.tokens, heads).train(module.training))


def _use_placed_attention(block: nn.Module, attention: str) -> nn.Module:
    """Return the block, with shared weights, with an attention that adds the biases it gets as an argument."""
    cls = PLACED.get(type(block.get_submodule(attention)))
    if cls is None:
        return block
    made = copy.copy(block)
    made.__dict__["_modules"] = dict(block._modules)
    made.set_submodule(attention, change_class(block.get_submodule(attention), cls))
    return made
