"""Shapes of the inputs that an engine takes; importing them needs no torch."""

from dataclasses import dataclass

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Range:
    """Shapes of one input that an engine takes, and the one that it is made fastest for."""

    least: Shape
    best: Shape
    most: Shape
