"""What is known of blocks between which tokens can merge."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

import torch
from torch import Tensor

from optin_deploy.errors import UserError
from optin_deploy.structure.groups import Rows
from optin_deploy.tokens.matching import most_mergeable


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


def real_tokens(mask: Tensor) -> Tensor:
    """Bool ``(batch or 1, tokens)``, False where a mask ``(batch, 1, queries or 1, tokens)``, alike for all queries, is
    False or far below 0."""
    row = mask[:, 0, 0, :]
    return row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
