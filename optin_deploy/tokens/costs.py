"""FLOPs of a network whose tokens merge, by the number of tokens in each block."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor, nn

from optin_deploy.nn.flops import FlopCounts
from optin_deploy.search.costs import Costs, kept_size
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.tokens.matching import matching_flops, merging_flops
from optin_deploy.tokens.stack import TokenStack
from optin_deploy.tokens.text_matching import text_matching_flops, text_merging_flops

# Products of two activations. In an attention their cost grows with the square of the tokens; all other costs grow
# with the tokens.
_PRODUCTS = ("bmm", "baddbmm")


@dataclass(frozen=True)
class TokenCosts:
    """The FLOPs for one sample, by the number of tokens that enter each block: a `CostModel` at one ``schedule``.

    Attributes:
        base: the costs with all tokens.
        squared: group name -> the fraction of its FLOPs that grows with the square of the tokens.
        block_of: group name -> index of its block in the stack; groups outside the stack are missing.
        rest: for each block, the FLOPs outside all groups, and the fraction of them that grows with the square.
        widths: group name -> features of a head.
        schedule: tokens that enter each block.
    """

    base: Costs
    stack: TokenStack
    squared: Mapping[str, float]
    block_of: Mapping[str, int]
    rest: tuple[tuple[float, float], ...]
    widths: Mapping[str, int]
    schedule: tuple[int, ...]

    def at(self, schedule: tuple[int, ...]) -> "TokenCosts":
        """Return the costs at another schedule."""
        return replace(self, schedule=schedule)

    @property
    def total(self) -> float:
        """The dense network's FLOPs, with all tokens."""
        return self.base.total

    @cached_property
    def floor(self) -> float:
        """The FLOPs with every unit removed, without the FLOPs of comparing tokens by keys."""
        saved = sum(self.rest_at(i, self.stack.tokens) - self.rest_at(i, n) for i, n in enumerate(self.schedule))
        merging = sum(self.merging(i, *self._step(i)) for i in range(len(self.schedule)))
        return self.base.floor - saved + merging

    def option(self, group: str, units: int, width: int | None) -> float:
        """See `CostModel`; the heads of a block include the FLOPs of comparing tokens by their keys."""
        flops = self.base.option(group, units, width) * self.factor(group)
        block = self.block_of.get(group)
        key = None if block is None else self.stack.keys[block]
        if block is None or key is None or key.group != group:
            return flops
        features = 0 if not units else self.widths[group] if width is None else width
        return flops + self.comparing(block, *self._step(block), features)

    def factor(self, group: str) -> float:
        """Return the cost of a group at the schedule, as a fraction of that with all tokens."""
        block = self.block_of.get(group)
        return 1.0 if block is None else self._fraction(self.schedule[block], self.squared[group])

    def of(self, plan: Plan) -> float:
        """Return the FLOPs of the network that ``plan`` leaves, with its tokens merging by the schedule."""
        inner = set(self.base.widths.values())
        names = [name for name in self.base.units if name not in inner]
        return self.floor + sum(self.option(name, *kept_size(self.base, plan, name)) for name in names)

    def rest_at(self, block: int, tokens: int) -> float:
        """Return the FLOPs of a block outside all groups."""
        flops, squared = self.rest[block]
        return flops * self._fraction(tokens, squared)

    def merging(self, block: int, before: int, tokens: int) -> float:
        """Return the FLOPs of merging before a block, without those of comparing tokens by keys."""
        key, width = self.stack.keys[block], self.stack.width
        if self.stack.text:
            flops = text_merging_flops(before, before - tokens, width)
        else:
            flops = merging_flops(before, self.stack.prefix, before - tokens, width)
        return flops + (self.comparing(block, before, tokens, 0) if key is None else 0.0)

    def comparing(self, block: int, before: int, tokens: int, features: int) -> float:
        """Return the FLOPs of comparing tokens by ``features`` features of their keys (0: tokens themselves)."""
        if before == tokens:
            return 0.0
        keys = 2.0 * before * self.stack.width * features
        compared = text_matching_flops if self.stack.text else matching_flops
        return keys + compared(before, self.stack.prefix, features or self.stack.width)

    def _step(self, block: int) -> tuple[int, int]:
        """Return the number of tokens before and after the merge at a block."""
        return (self.stack.tokens, *self.schedule)[block], self.schedule[block]

    def _fraction(self, tokens: int, squared: float) -> float:
        """Return the cost with ``tokens`` tokens, as a fraction of that with all tokens."""
        share = tokens / self.stack.tokens
        return (1 - squared) * share + squared * share * share


def token_costs(
    module: nn.Module, structure: Structure, costs: Costs, stack: TokenStack, inputs: Mapping[str, Tensor]
) -> TokenCosts:
    """Return the costs of ``module`` at all tokens, from one counted forward pass.

    Args:
        costs: of ``module`` with all tokens.
    """
    counts = FlopCounts(module, inputs)

    def flops_of(name: str) -> tuple[float, float]:
        """Return all FLOPs of a module, and those of products of activations."""
        by_operator = counts.by_operator(name)
        products = sum(
            n for kind, n in by_operator.items() if str(kind).partition(".")[2].partition(".")[0] in _PRODUCTS
        )
        return float(sum(by_operator.values())), float(products)

    def flops_of_all(names: tuple[str, ...]) -> tuple[float, float]:
        pairs = [flops_of(name) for name in names]
        return sum(p[0] for p in pairs), sum(p[1] for p in pairs)

    squared, block_of = {}, {}
    rest = [list(flops_of(block)) for block in stack.blocks]
    for group in structure.groups:
        block = structure.blocks[group.layer]
        if block not in stack.blocks:
            continue
        whole, products = flops_of_all(group.cost.modules)
        squared[group.name] = products / whole if whole else 0.0
        block_of[group.name] = stack.blocks.index(block)
        if group.parent is None:
            rest[block_of[group.name]][0] -= whole
            rest[block_of[group.name]][1] -= products
    widths = {group.name: group.width for group in structure.groups}
    parts = tuple((flops, products / flops if flops else 0.0) for flops, products in rest)
    return TokenCosts(costs, stack, squared, block_of, parts, widths, (stack.tokens,) * len(stack.blocks))
