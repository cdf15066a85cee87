"""Commands that Ctrl-C or a signal terminates: temporary files are removed, and a line says how to continue."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typer.core import TyperGroup

# Sent by a closed terminal, a batch system or a stopped container. Windows has no SIGHUP.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_KEPT = "finished stages are kept in "


class Terminated(BaseException):
    """A signal has terminated the command. No handler of errors catches it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number

    @property
    def code(self) -> int:
        """The exit code that shells report for a process killed by the signal."""
        return 128 + self.number


class Interruptible(TyperGroup):
    """Commands that raise `Terminated` on Ctrl-C. The parser would only return an exit code."""

    # `typer.Context` is a subclass of what the parser passes; the base class has no public name.
    def invoke(self, ctx: Any) -> object:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            terminated = Terminated(signal.SIGINT)
            for note in getattr(error, "__notes__", ()):
                terminated.add_note(note)
            raise terminated from error


@contextmanager
def raise_on_signals() -> Iterator[None]:
    """Raise `Terminated` in the main thread where a signal would end the process. Ignored signals stay ignored."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handled = [number for number in _SIGNALS if signal.getsignal(number) == signal.SIG_DFL]

    def terminate(number: int, _: object) -> None:
        # A second signal must not interrupt the cleanup.
        for other in handled:
            signal.signal(other, signal.SIG_IGN)
        raise Terminated(number)

    try:
        for number in handled:
            signal.signal(number, terminate)
        yield
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def note_kept(directory: object) -> Iterator[None]:
    """Add a note to an interrupt that finished stages are kept in ``directory``."""
    try:
        yield
    except (KeyboardInterrupt, Terminated) as error:
        error.add_note(f"{_KEPT}{directory}")
        raise


def describe_end(terminated: Terminated, command: str) -> str:
    """Return one line that says what is kept and how to continue."""
    what = "interrupted" if terminated.number == signal.SIGINT else str(terminated)
    # The last note is the outermost directory: that of a sweep, which contains its runs.
    notes = [note for note in getattr(terminated, "__notes__", ()) if note.startswith(_KEPT)]
    return f"{what}; {notes[-1]}, go on with: {command}" if notes else f"{what}; nothing is kept, again: {command}"
