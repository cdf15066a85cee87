"""What every runtime offers to the measuring loop."""

from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
from numpy.typing import NDArray

from profilers.errors import ProfilingError

Feeds = dict[str, NDArray[Any]]
"""Input or output name to array, batch first."""

Run = Callable[[], float | None]
"""Makes one complete run; the milliseconds it took on the device, between events around it, where the runtime tells."""


class Runner(Protocol):
    """One model loaded by one runtime; a context manager that frees it.

    Attributes:
        cuda_graph: whether what was prepared last replays a CUDA graph; None where the runtime is not asked for one.
    """

    cuda_graph: bool | None

    def __enter__(self) -> Self: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None: ...

    def infer(self, feeds: Feeds) -> Feeds:
        """Runs the model once, transfers included; ProfilingError when the input names are not the model's."""
        ...

    def prepare(self, feeds: Feeds) -> Run:
        """Places the inputs on the device and returns a callable that makes one complete run on them.

        What the callable takes is the latency: neither the transfer of inputs to the device nor that of outputs
        back to the host is in it. It returns when the outputs are computed. ProfilingError when the input names are
        not the model's, or a CUDA graph was asked for and the model cannot be captured in one.
        """
        ...


def check_inputs(expected: Iterable[str], feeds: Feeds) -> None:
    """ProfilingError unless the feeds carry exactly the expected names."""
    names = set(expected)
    if names != set(feeds):
        raise ProfilingError(f"the model's inputs are {sorted(names)}, but the sample holds {sorted(feeds)}")


def first_line(error: BaseException) -> str:
    """An error's message cut to its first line that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


def numpy_feeds(names: Iterable[str], values: Iterable[Any]) -> Feeds:
    """Names and array-likes zipped into feeds."""
    return {name: np.asarray(value) for name, value in zip(names, values, strict=True)}
