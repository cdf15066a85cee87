"""Runs that tell what each operator took, by runtime."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from profilers.runners.base import Run


@dataclass(frozen=True)
class Operator:
    """One operator of a graph: its type, and the dotted path of the module it was traced in ("" where unknown)."""

    type: str
    path: str


@dataclass(frozen=True)
class Record:
    """What was profiled, in milliseconds: ``times_ms`` runs × operators, ``whole_ms`` each run with what profiling
    itself takes. The operators stand in the order they run."""

    operators: Sequence[Operator]
    times_ms: Sequence[Sequence[float]]
    whole_ms: Sequence[float]


class ProfiledRuns(Protocol):
    """A file loaded so that each of its runs is profiled."""

    @property
    def run(self) -> Run:
        """Makes one complete run."""
        ...

    def finish(self) -> Record:
        """What all runs so far took."""
        ...
