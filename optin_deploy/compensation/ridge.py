"""Ridge regression from second moments, with the strength chosen on held-out rows."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from optin_deploy.distributed.ranks import Ranks

# Relative to the mean squared feature.
STRENGTHS = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
# One batch of this many is held out to choose the strength.
_HOLD_OUT = 4
# Rows of a Gram matrix that are added at a time.
_STRIP = 128


def is_held_out(index: int, batches: int) -> bool:
    """Return whether a batch is held out to choose the strength; a single batch is not."""
    # Counted from the end, so that one of a few batches is held out too.
    return batches > 1 and (batches - 1 - index) % _HOLD_OUT == 0


@dataclass
class Moments:
    """Sums over rows, in float64: ``gram`` of [x, 1][x, 1]ᵀ, ``cross`` of [x, 1] yᵀ, ``targets`` of |y|²."""

    gram: Tensor
    cross: Tensor
    targets: float

    @classmethod
    def of(cls, x: Tensor, y: Tensor, weights: Tensor | None = None) -> "Moments":
        """Return moments of ``x`` ``(rows, features)`` and ``y`` ``(rows, outputs)``, with weights ``(rows,)``."""
        features = x.shape[1] + 1
        gram = torch.zeros(features, features, dtype=torch.float64, device=x.device)
        return cls(gram, gram.new_zeros(features, y.shape[1]), 0.0).add(x, y, weights)

    def add(self, x: Tensor, y: Tensor, weights: Tensor | None = None) -> "Moments":
        """Add more rows, in place."""
        x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
        weighted = x if weights is None else x * weights[:, None]
        for total, rows in ((self.gram, weighted.T @ x), (self.cross, weighted.T @ y)):
            # Strip by strip, since adding float32 to float64 creates a float64 copy.
            for part, more in zip(total.split(_STRIP), rows.split(_STRIP), strict=True):
                part += more
        squares = y.square().sum(1).double()
        self.targets += float(squares.sum() if weights is None else (squares * weights).sum())
        return self

    def __add__(self, other: "Moments") -> "Moments":
        return Moments(self.gram + other.gram, self.cross + other.cross, self.targets + other.targets)

    def all_reduce(self, ranks: Ranks) -> "Moments":
        """Return the sums over all processes."""
        found = ranks.all_reduce(
            {"gram": self.gram, "cross": self.cross, "targets": torch.tensor(self.targets).double()}
        )
        return Moments(found["gram"], found["cross"], float(found["targets"]))

    def of_nothing(self) -> "Moments":
        """Return moments of no rows, with the same features and outputs."""
        return Moments(torch.zeros_like(self.gram), torch.zeros_like(self.cross), 0.0)

    def error(self, solution: Tensor) -> float:
        """Return the sum of squared residuals of ``[x, 1] @ solution``."""
        explained = 2 * float((solution * self.cross).sum()) - float((solution * (self.gram @ solution)).sum())
        return self.targets - explained


def add_ridge(moments: Moments, strength: float) -> Tensor:
    """Return ``gram`` plus the ridge: ``strength`` times the mean squared feature, but 0 for the bias."""
    features = len(moments.gram) - 1
    found = moments.gram.clone()
    if features:
        # The floor keeps the system solvable if features are zero or repeat each other.
        found.diagonal()[:features] += (strength * moments.gram.diagonal()[:features].mean()).clamp_min(1e-12)
    return found


def solve(moments: Moments, old: Tensor, strength: float, *, bias: bool = True) -> Tensor:
    """Return weights ``(features + 1, outputs)`` whose *change* from ``old`` is penalised; the last row is the bias.

    Args:
        strength: of the penalty, relative to the mean squared feature. The bias is not penalised.
        bias: False keeps the last row as it is.
    """
    features = len(moments.gram) - 1
    free = slice(None) if bias else slice(features)
    change = torch.zeros_like(old)
    missing = (moments.cross - moments.gram @ old)[free]
    change[free] = torch.linalg.solve(add_ridge(moments, strength)[free, free], missing)
    return old + change


def fit(training: Moments, held_out: Moments | None, old: Tensor, strengths: Sequence[float], *, bias: bool) -> Tensor:
    """Return the ridge solution on all rows, with the strength that fits best on held-out rows.

    The choice is made by fits without these rows. If every strength fits worse there than ``old``, ``old`` is returned.

    Args:
        held_out: None if all rows are in ``training``; then the middle strength is taken.
    """
    if held_out is None:
        return solve(training, old, strengths[len(strengths) // 2], bias=bias)
    errors = [held_out.error(solve(training, old, strength, bias=bias)) for strength in strengths]
    best = min(range(len(errors)), key=errors.__getitem__)
    if errors[best] >= held_out.error(old):
        return old
    return solve(training + held_out, old, strengths[best], bias=bias)
