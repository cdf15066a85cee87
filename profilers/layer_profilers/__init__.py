"""Runs that time each operator, by runtime."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from profilers.runners.base import Feeds


@dataclass(frozen=True)
class Operator:
    """One operator of a graph: its type, and the dotted path of the module it was traced in ("" if unknown)."""

    type: str
    path: str


@dataclass(frozen=True)
class Record:
    """Operators in the order in which they run, and their times in milliseconds (runs × operators).

    The times of whole runs include the overhead of profiling.
    """

    operators: Sequence[Operator]
    times_ms: Sequence[Sequence[float]]
    whole_ms: Sequence[float]


@dataclass(frozen=True)
class ProfileInputs:
    """What a layer profiler needs besides its runtime.

    It has the inputs of all runs, a folder for temporary files, the ONNX file that an engine was built from (without
    it, layers have no module), and a function that returns the module to which the time of a module's path is counted.
    """

    feeds: Feeds
    folder: Path
    onnx: Path | None
    owner: Callable[[str], str]


class ProfiledRuns(ABC):
    """A file loaded so that each run is profiled. Created as ``ProfiledRuns(path, spec, settings, inputs)``."""

    @abstractmethod
    def run(self) -> float | None:
        """Make one complete run."""

    @abstractmethod
    def finish(self) -> Record:
        """Return the times of all runs so far."""
