"""FLOPs of a network whose tokens merge: every block costs what so many tokens cost it."""

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

# Products of two activations: in an attention their cost grows with the square of the tokens, that of all else with
# the tokens.
_PRODUCTS = ("bmm", "baddbmm")


@dataclass(frozen=True)
class TokenCosts:
    """The FLOPs for one sample, by the number of tokens that enter each block: a `CostModel` at one ``schedule``.

    Attributes:
        base: the costs with all tokens.
        squared: group name -> the part of its FLOPs that grows with the square of the tokens.
        block_of: group name -> number of its block in the stack; groups that stand elsewhere are not named.
        rest: FLOPs of every block that belong to no group, and the part of those that grows with the square.
        widths: features of a head, by the name of the group.
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
        """The same for another schedule."""
        return replace(self, schedule=schedule)

    @property
    def total(self) -> float:
        """The dense network's FLOPs, with all tokens."""
        return self.base.total

    @cached_property
    def floor(self) -> float:
        """The FLOPs with every unit removed, those of comparing tokens by keys left out."""
        saved = sum(self.rest_at(i, self.stack.tokens) - self.rest_at(i, n) for i, n in enumerate(self.schedule))
        merging = sum(self.merging(i, *self._step(i)) for i in range(len(self.schedule)))
        return self.base.floor - saved + merging

    def option(self, group: str, units: int, width: int | None) -> float:
        """See `CostModel`; with a block's heads goes what comparing tokens by their keys costs."""
        flops = self.base.option(group, units, width) * self.factor(group)
        block = self.block_of.get(group)
        key = None if block is None else self.stack.keys[block]
        if block is None or key is None or key.group != group:
            return flops
        features = 0 if not units else self.widths[group] if width is None else width
        return flops + self.comparing(block, *self._step(block), features)

    def factor(self, group: str) -> float:
        """What a group costs at the schedule, against all tokens."""
        block = self.block_of.get(group)
        return 1.0 if block is None else self._part(self.schedule[block], self.squared[group])

    def of(self, plan: Plan) -> float:
        """The FLOPs of the network that ``plan`` leaves, its tokens merging by the schedule."""
        inner = set(self.base.widths.values())
        names = [name for name in self.base.units if name not in inner]
        return self.floor + sum(self.option(name, *kept_size(self.base, plan, name)) for name in names)

    def rest_at(self, block: int, tokens: int) -> float:
        """What of a block belongs to no group."""
        flops, squared = self.rest[block]
        return flops * self._part(tokens, squared)

    def merging(self, block: int, before: int, tokens: int) -> float:
        """What merging before a block costs, comparing by keys left out."""
        key, width = self.stack.keys[block], self.stack.width
        if self.stack.text:
            found = text_merging_flops(before, before - tokens, width)
        else:
            found = merging_flops(before, self.stack.prefix, before - tokens, width)
        return found + (self.comparing(block, before, tokens, 0) if key is None else 0.0)

    def comparing(self, block: int, before: int, tokens: int, features: int) -> float:
        """What comparing tokens by so many features of their keys costs; by 0, as they come."""
        if before == tokens:
            return 0.0
        keys = 2.0 * before * self.stack.width * features
        compared = text_matching_flops if self.stack.text else matching_flops
        return keys + compared(before, self.stack.prefix, features or self.stack.width)

    def _step(self, block: int) -> tuple[int, int]:
        """Tokens before and behind the merging before a block."""
        return (self.stack.tokens, *self.schedule)[block], self.schedule[block]

    def _part(self, tokens: int, squared: float) -> float:
        part = tokens / self.stack.tokens
        return (1 - squared) * part + squared * part * part


def token_costs(
    module: nn.Module, structure: Structure, costs: Costs, stack: TokenStack, inputs: Mapping[str, Tensor]
) -> TokenCosts:
    """The costs of ``module``, whose ``costs`` with all tokens are known, from one counted forward pass."""
    counts = FlopCounts(module, inputs)

    def counted(name: str) -> tuple[float, float]:
        """All FLOPs of a module, and those of products of activations."""
        own = counts.by_operator(name)
        products = sum(n for kind, n in own.items() if str(kind).partition(".")[2].partition(".")[0] in _PRODUCTS)
        return float(sum(own.values())), float(products)

    def together(names: tuple[str, ...]) -> tuple[float, float]:
        pairs = [counted(name) for name in names]
        return sum(p[0] for p in pairs), sum(p[1] for p in pairs)

    squared, block_of = {}, {}
    rest = [list(counted(block)) for block in stack.blocks]
    for group in structure.groups:
        block = structure.blocks[group.layer]
        if block not in stack.blocks:
            continue
        whole, products = together(group.cost.modules)
        squared[group.name] = products / whole if whole else 0.0
        block_of[group.name] = stack.blocks.index(block)
        if group.parent is None:
            rest[block_of[group.name]][0] -= whole
            rest[block_of[group.name]][1] -= products
    widths = {group.name: group.width for group in structure.groups}
    parts = tuple((flops, products / flops if flops else 0.0) for flops, products in rest)
    return TokenCosts(costs, stack, squared, block_of, parts, widths, (stack.tokens,) * len(stack.blocks))
