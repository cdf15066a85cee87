"""One progress display for a run: a bar per stage with time left, on a terminal and in a notebook; elsewhere a line per
stage that is done."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from time import perf_counter

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn

Advance = Callable[[float], None]
logger = logging.getLogger(__name__)


class Stages:
    """Stages of a run, timed. Used as a context manager around the whole run."""

    def __init__(self, console: Console, *, quiet: bool = False) -> None:
        self.seconds: dict[str, float] = {}
        self.current = ""
        # Without ipywidgets a notebook shows no bars, and rich says so each time that it would draw one.
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
        """The stage in which bad input is found: no line tells of it, so that an error stands alone."""
        with self._bar("load and check", 1):
            yield

    @contextmanager
    def stage(self, name: str, total: float = 1) -> Iterator[Advance]:
        """Show and time a stage of ``total`` steps; the value is called with the number of steps just done."""
        before = self.seconds.get(name, 0.0)
        with self._bar(name, total) as advance:
            yield advance
        if self._lines is not None:
            spent = self.seconds[name] - before
            self._lines.print(f"{name}: {spent:.1f} s", markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def _bar(self, name: str, total: float) -> Iterator[Advance]:
        task = self._progress.add_task(name, total=total)
        logger.info("%s: started", name)
        self.current, start = name, perf_counter()
        yield lambda steps: self._progress.advance(task, steps)
        self._progress.update(task, completed=total)
        spent = perf_counter() - start
        logger.info("%s: done in %.1f s", name, spent)
        self.seconds[name] = self.seconds.get(name, 0.0) + spent


def as_steps(advance: Advance) -> Advance:
    """Progress told as the fraction done, for a display that wants the steps since."""
    done = 0.0

    def tell(fraction: float) -> None:
        nonlocal done
        advance(fraction - done)
        done = fraction

    return tell
