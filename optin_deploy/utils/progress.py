"""The progress of a run: on a terminal a bar with the time left for each stage, elsewhere a line for each.

Algorithms report progress by `track`. It needs no parameter, because a context variable holds the stage's bar.

    with Stages(console) as stages, stages.stage("score"):
        with progress_until(0.9):
            for batch in track(batches):
                ...
        for group in track(groups):
            ...
"""

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from importlib.util import find_spec
from time import perf_counter
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

T = TypeVar("T")
logger = logging.getLogger(__name__)


class _Bar:
    """The bar of one stage; ``done`` is the fraction shown and never falls."""

    def __init__(self, show: Callable[[float], None]) -> None:
        self._show = show
        self.done = 0.0

    def move_to(self, fraction: float) -> None:
        if fraction > self.done:
            self.done = fraction
            self._show(fraction)


@dataclass(frozen=True)
class _Section:
    """The range of a bar that the current work fills."""

    bar: _Bar
    start: float
    stop: float

    def at(self, fraction: float) -> float:
        return self.start + (self.stop - self.start) * fraction


_section: ContextVar[_Section | None] = ContextVar("section", default=None)


@contextmanager
def show_progress(show: Callable[[float], None]) -> Iterator[None]:
    """Call ``show`` with the finished fraction of the work inside whenever it rises, and with 1 at the end."""
    with _filling(_Section(_Bar(show), 0.0, 1.0)):
        yield


def report_progress(fraction: float) -> None:
    """Show that ``fraction`` of the current work is done, 0 to 1."""
    if (section := _section.get()) is not None:
        section.bar.move_to(section.at(fraction))


@contextmanager
def progress_until(until: float) -> Iterator[None]:
    """Let the work inside fill the bar up to the fraction ``until`` of the current work."""
    section = _section.get()
    if section is None:
        yield
        return
    with _filling(_Section(section.bar, section.bar.done, max(section.bar.done, section.at(until)))):
        yield


def track(items: Collection[T], weights: Sequence[float] | None = None) -> Iterator[T]:
    """Yield ``items`` and show how many are done, until the current work is complete.

    The work on one item may `track` its own steps.

    Args:
        weights: the time each item takes relative to the others; all the same when None.
    """
    outer = _section.get()
    if outer is None:
        yield from items
        return
    weights = [1.0] * len(items) if weights is None else weights
    total = sum(weights) or 1.0
    whole, done = _Section(outer.bar, outer.bar.done, outer.stop), 0.0
    for item, weight in zip(items, weights, strict=True):
        with _filling(_Section(outer.bar, whole.at(done / total), whole.at((done + weight) / total))):
            yield item
        done += weight


@contextmanager
def _filling(section: _Section) -> Iterator[None]:
    """Make ``section`` the current work, and fill it at the end unless an error occurs."""
    before = _section.get()
    _section.set(section)
    try:
        yield
        section.bar.move_to(section.stop)
    finally:
        # A loop that an error stopped is closed late, perhaps in another stage.
        if _section.get() is section:
            _section.set(before)


class Stages:
    """The stages of a run, shown and timed. A context manager around the whole run.

    Attributes:
        seconds: time of each finished stage, by name.
        current: name of the last stage that started.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self.current = ""
        # Without ipywidgets a notebook shows no bars, and rich warns for each one.
        bars = console.is_terminal or (console.is_jupyter and find_spec("ipywidgets") is not None)
        self._lines = None if quiet or bars else console
        columns = (SpinnerColumn(), TextColumn("{task.description:<32}"), BarColumn(), TaskProgressColumn())
        self._progress = Progress(*columns, TimeRemainingColumn(), console=console, disable=quiet or not bars)

    def __enter__(self) -> "Stages":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    @contextmanager
    def checks(self) -> Iterator[None]:
        """Show the stage that checks the input. It prints no line, so that an error is the only output."""
        with self._bar("load and check"):
            yield

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Show and time a stage; the work inside may `track` its steps."""
        before = self.seconds.get(name, 0.0)
        with self._bar(name):
            yield
        if self._lines is not None:
            spent = self.seconds[name] - before
            self._lines.print(f"{name}: {spent:.1f} s", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _bar(self, name: str) -> Iterator[None]:
        task = self._progress.add_task(name, total=1.0)
        logger.info("%s: started", name)
        self.current, start = name, perf_counter()
        with show_progress(lambda fraction: self._progress.update(task, completed=fraction)):
            yield
        spent = perf_counter() - start
        logger.info("%s: done in %.1f s", name, spent)
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
