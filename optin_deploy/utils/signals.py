"""How a command ends before it is done: by Ctrl-C or by a signal, everything temporary removed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from typer.core import TyperGroup

# By a terminal that is closed, a batch system, a container that is stopped. Windows has no SIGHUP.
_SIGNALS = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))
_KEPT = "finished stages are kept in "


class Ended(BaseException):
    """A signal has ended the command. Nothing takes it for an error that can be worked around."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number

    @property
    def code(self) -> int:
        """The exit code that shells give a process that the signal killed."""
        return 128 + self.number


class Interruptible(TyperGroup):
    """Commands that let Ctrl-C through as `Ended`; the parser would make an exit code of it, and all else is lost."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            ended = Ended(signal.SIGINT)
            for note in getattr(error, "__notes__", ()):
                ended.add_note(note)
            raise ended from error


@contextmanager
def signals_raised() -> Iterator[None]:
    """Raise `Ended` in the main thread where a signal would else end the process; one that is ignored stays so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def end(number: int, _: object) -> None:
        # What cleans up is not to be cut short.
        for each in taken:
            signal.signal(each, signal.SIG_IGN)
        raise Ended(number)

    taken = [number for number in _SIGNALS if signal.getsignal(number) == signal.SIG_DFL]
    try:
        for number in taken:
            signal.signal(number, end)
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def kept_in(directory: object) -> Iterator[None]:
    """Note on an interrupt that the stages which were finished are kept in ``directory``."""
    try:
        yield
    except (KeyboardInterrupt, Ended) as error:
        error.add_note(f"{_KEPT}{directory}")
        raise


def told(ended: Ended, command: str) -> str:
    """One line for the user: what is kept, and how to go on."""
    what = "interrupted" if ended.number == signal.SIGINT else str(ended)
    # The outermost one comes last: a sweep's directory, that runs are in.
    notes = [note for note in getattr(ended, "__notes__", ()) if note.startswith(_KEPT)]
    return f"{what}; {notes[-1]}, go on with: {command}" if notes else f"{what}; nothing is kept, again: {command}"
