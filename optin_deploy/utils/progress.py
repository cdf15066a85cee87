"""The progress display of a run: a bar for each stage with the time left on a terminal, else a line for each stage.

Algorithms show their progress by `track`, which needs no parameter: the display of the stage is a context variable.

    with Stages(console) as stages, stages.stage("score"):
        with part(0.9):
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
    """The bar of one stage; ``done`` is the fraction shown, which never falls."""

    def __init__(self, show: Callable[[float], None]) -> None:
        self._show = show
        self.done = 0.0

    def move_to(self, fraction: float) -> None:
        if fraction > self.done:
            self.done = fraction
            self._show(fraction)


@dataclass(frozen=True)
class _Section:
    """The part of a bar that the work at hand fills."""

    bar: _Bar
    start: float
    stop: float

    def at(self, fraction: float) -> float:
        return self.start + (self.stop - self.start) * fraction


_section: ContextVar[_Section | None] = ContextVar("section", default=None)


@contextmanager
def shown_by(show: Callable[[float], None]) -> Iterator[None]:
    """Call ``show`` with the fraction of the work inside that is done, whenever it rises; with 1 at the end."""
    with _filling(_Section(_Bar(show), 0.0, 1.0)):
        yield


def report_progress(fraction: float) -> None:
    """Show that ``fraction`` of the work at hand is done, 0 to 1."""
    if (section := _section.get()) is not None:
        section.bar.move_to(section.at(fraction))


@contextmanager
def part(until: float) -> Iterator[None]:
    """Let the work inside fill the bar from where it is to the fraction ``until`` of the work at hand."""
    section = _section.get()
    if section is None:
        yield
        return
    with _filling(_Section(section.bar, section.bar.done, max(section.bar.done, section.at(until)))):
        yield


def track(items: Collection[T], weights: Sequence[float] | None = None) -> Iterator[T]:
    """Yield ``items`` and show how many are done; what is done with one item may track its own steps.

    The items fill the work at hand from where its bar is.

    Args:
        weights: how long each item takes compared with the others; all the same when None.
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
    """Make ``section`` the work at hand; at the end it is full, unless an error ended it."""
    before = _section.get()
    _section.set(section)
    try:
        yield
        section.bar.move_to(section.stop)
    finally:
        # A loop that an error has ended is closed late, perhaps in another stage.
        if _section.get() is section:
            _section.set(before)


class Stages:
    """The stages of a run, shown and timed. A context manager around the whole run.

    Attributes:
        seconds: time of each stage that is done, by name.
        current: the name of the last stage begun.
    """

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self.current = ""
        # Without ipywidgets a notebook shows no bars, and rich warns each time that it would draw one.
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
        """Show the stage that checks the input. It prints no line, so that an error stands alone."""
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
        with shown_by(lambda fraction: self._progress.update(task, completed=fraction)):
            yield
        spent = perf_counter() - start
        logger.info("%s: done in %.1f s", name, spent)
        self.seconds[name] = self.seconds.get(name, 0.0) + spent
