"""A stack of blocks between which tokens can merge."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

import torch
from torch import Tensor

from optin_deploy.errors import UserError
from optin_deploy.structure.groups import OutputSlice
from optin_deploy.tokens.matching import most_mergeable


@dataclass(frozen=True)
class KeySource:
    """The modules that compute the keys of a block's attention.

    Attributes:
        norm: the norm before the keys, by its name inside the block.
        rows: the output rows of a linear layer that are the keys; the layer's name is that inside the block.
        group: name of the group of heads.
    """

    norm: str
    rows: OutputSlice
    group: str


@dataclass(frozen=True)
class TokenStack:
    """Blocks that run one after the other on ``(batch, tokens, width)``.

    Attributes:
        name: the list that holds exactly these blocks.
        mask: the argument of every block that is added to the attention's logits.
        prefix: number of protected tokens at the beginning: class, distillation and register tokens.
        tokens, width: of the sample input.
        keys: one per block; None if its keys are unknown.
        places: arguments of the blocks with a row per patch position, like rotary embeddings, and their features.
        text: whether the tokens are text tokens. Then inputs have any length, numbers of tokens are relative to the
            length of the sample input, and the mask marks padding.
        biased: name inside every block of the attention that adds position biases to its logits; "" if none does.
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

    def fewest_after(self, tokens: int) -> int:
        """Return the fewest tokens that can remain after a merge of ``tokens``."""
        return tokens - most_mergeable(tokens, self.prefix)

    def leaving(self, before: int, tokens: int, now: int) -> int:
        """Return how many of ``now`` text tokens merge if ``before`` become ``tokens`` in the sample input.

        ``now`` may be symbolic. The result is rounded down, so it is at most half of the tokens after the prefix.
        """
        common = gcd(before, before - tokens)
        return now * ((before - tokens) // common) // (before // common)

    def possible(self, schedule: Sequence[int]) -> bool:
        """Return whether these numbers of tokens can enter the blocks."""
        return all(self.fewest_after(a) <= b <= a for a, b in pairwise((self.tokens, *schedule)))

    def check(self, schedule: Sequence[int]) -> None:
        """Raise UserError unless ``schedule`` has a reachable number of tokens for each block."""
        listed = ",".join(map(str, schedule))
        if len(schedule) != len(self.blocks):
            raise UserError(f"--tokens {listed}: give a number for each of the {len(self.blocks)} blocks")
        before = self.tokens
        for tokens in schedule:
            if not self.fewest_after(before) <= tokens <= before:
                raise UserError(
                    f"--tokens {listed}: after {before} tokens there can be {self.fewest_after(before)} to {before}, "
                    f"not {tokens}"
                )
            before = tokens


def real_tokens(mask: Tensor) -> Tensor:
    """Return bool ``(batch or 1, tokens)``, False at padding: where the mask is False or far below 0.

    Args:
        mask: ``(batch, 1, queries or 1, tokens)``, the same for all queries.
    """
    row = mask[:, 0, 0, :]
    return row if row.dtype == torch.bool else row > torch.finfo(row.dtype).min / 2
