"""Settings of a pruning run."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from torch import Tensor

from optin_deploy.criteria.scoring import Scoring
from optin_deploy.errors import UserError

Ridge = float | Literal["auto"] | None
"""Strength of the ridge: chosen on held-out batches, fixed, or None for no compensation."""

Tokens = Literal["auto", "off"] | Sequence[int]
"""Tokens that enter each block: searched, all of them, or these numbers."""


@dataclass(frozen=True)
class PruneSettings:
    """Settings of pruning to a FLOP budget.

    Attributes:
        flops: fraction of the network's FLOPs to keep, above 0 and below 1.
        scoring: the criterion and its settings; the default criterion if None.
        labels: class numbers for each batch, for the criterion "fisher".
        align: neurons are kept in multiples of this number (see `search.knapsack.search`).
        ridge: strength of the ridge, "auto" to choose it on held-out batches. None turns compensation off; batch norms
            get new statistics instead.
        rounds: number of steps to the budget. Each scores the network that the last one left.
        narrow: whether heads may also get narrower; None leaves it to the criterion.
        tokens: how many tokens enter each block; "auto" searches it together with the units.
        tokens_share: fraction of the removed FLOPs that merging tokens removes; "auto" searches it if None.
        step_sizes: candidate numbers of units, by group (see `search.knapsack.search_all`).
    """

    flops: float
    scoring: Scoring | None = None
    labels: Sequence[Tensor] | None = None
    align: int = 64
    ridge: Ridge = "auto"
    rounds: int = 1
    narrow: bool | None = None
    tokens: Tokens = "off"
    tokens_share: float | None = None
    step_sizes: Mapping[str, Sequence[int]] | None = None

    def check(self) -> None:
        """Raise UserError for values out of their range."""
        check_share(self.flops)
        if self.rounds < 1:
            raise UserError(f"rounds={self.rounds}: at least 1 is needed")
        if self.rounds > 1 and self.tokens != "off":
            raise UserError(f"rounds={self.rounds}: tokens merge in one round")


class PruneOptions(TypedDict, total=False):
    """Options of `prune` for scoring and search.

    Attributes:
        scoring: the criterion and its settings; `Scoring()` by default.
        labels: class numbers ``(samples,)`` for each batch, for the criterion "fisher".
        align: neurons are kept in multiples of this number, finer in narrow layers; 64 by default.
        rounds: number of steps to the budget, each scored again; 1 by default.
        narrow: whether heads may also get narrower; by default the criterion decides.
        tokens: how many tokens enter each block, "auto" to search for it together with the units, "off" by default.
        tokens_share: share of the removed FLOPs that merging tokens removes; searched by default.
    """

    scoring: Scoring | None
    labels: Sequence[Tensor] | None
    align: int
    rounds: int
    narrow: bool | None
    tokens: Tokens
    tokens_share: float | None


def check_share(flops: float) -> None:
    """Raise UserError unless ``flops`` is above 0 and below 1."""
    if not 0 < flops < 1:
        raise UserError(f"flops={flops:g}: give the fraction of the FLOPs to keep, above 0 and below 1, like 0.5")
