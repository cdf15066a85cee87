"""Symmetric matrices stored as little more than their upper half.

The store is one vector of strips of rows, each from the diagonal on.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

# Rows of a strip: more rows save less memory, fewer rows make thin products.
_ROWS = 128


def unpack(strips: Tensor, size: int) -> Tensor:
    """Return the ``(size, size)`` matrix."""
    matrix = strips.new_empty(size, size)
    for start, strip in _each(strips, size):
        matrix[start : start + len(strip), start:] = strip
        matrix[start:, start : start + len(strip)] = strip.T
    return matrix


def zeros(size: int, device: torch.device) -> Tensor:
    """Return the strips of a float64 matrix of zeros."""
    numbers = sum(min(_ROWS, size - start) * (size - start) for start in range(0, size, _ROWS))
    return torch.zeros(numbers, dtype=torch.float64, device=device)


def add_gram(strips: Tensor, x: Tensor, weights: Tensor) -> None:
    """Add xᵀ diag(weights) x in place, for rows ``x`` ``(rows, size)`` and ``weights`` ``(rows,)``."""
    weighted = x * weights[:, None]
    for start, strip in _each(strips, x.shape[1]):
        strip += weighted[:, start : start + len(strip)].T @ x[:, start:]


def _each(strips: Tensor, size: int) -> Iterator[tuple[int, Tensor]]:
    """Yield the first row of each strip, and the strip, ``(rows, size - first row)``."""
    place = 0
    for start in range(0, size, _ROWS):
        rows = min(_ROWS, size - start)
        numbers = rows * (size - start)
        yield start, strips[place : place + numbers].view(rows, size - start)
        place += numbers
