"""The interface of a runtime to the measuring loop."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from profilers.errors import ProfilingError

Feeds = dict[str, NDArray[Any]]
"""Arrays by the name of the input or output, batch first."""

Run = Callable[[], float | None]
"""Makes one complete run. Returns its milliseconds on the device, between two events, or None if they are unknown."""


@dataclass(frozen=True)
class RunSettings:
    """How a runner runs its file, see `profilers.open_runner`."""

    threads: int
    tf32: bool = False
    cuda_graphs: bool = True


class Runner(ABC):
    """One file loaded by one runtime, as ``Runner(path, spec, settings)``; a context manager that frees it."""

    cuda_graph: bool | None = None
    """Whether the runs prepared last replay a CUDA graph; None if the runtime was not asked for one."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @abstractmethod
    def infer(self, feeds: Feeds) -> Feeds:
        """Run once, transfers included; ProfilingError if the input names are not the model's."""

    @abstractmethod
    def prepare(self, feeds: Feeds) -> Run:
        """Place the inputs on the device and return a callable that makes one complete run on them.

        The callable returns when the outputs are computed. Its duration is the latency, without the transfer of inputs
        to the device and of outputs back to the host.

        Raises:
            ProfilingError: the input names are not the model's, or a CUDA graph was asked for and the model cannot be
                captured in one.
        """

    @abstractmethod
    def close(self) -> None:
        """Free the file."""


def check_inputs(expected: Iterable[str], feeds: Feeds) -> None:
    """Raise ProfilingError unless ``feeds`` has exactly the expected names."""
    names = set(expected)
    if names != set(feeds):
        raise ProfilingError(f"the model's inputs are {sorted(names)}, but the sample holds {sorted(feeds)}")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that is not empty, or else its type."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def numpy_feeds(names: Iterable[str], values: Iterable[ArrayLike]) -> Feeds:
    """Zip names and array-likes into feeds."""
    return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}
