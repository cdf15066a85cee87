"""Errors that end a run and are not bugs. Each message is one line: what is wrong, and what to do."""


class UserError(Exception):
    """An error that the user can fix. The command line prints the message and exits with 2."""


class GateError(Exception):
    """A result that misses its promise (parity, budget), after the work was done. The command line exits with 3."""


def one_line(error: BaseException, limit: int = 200) -> str:
    """Return the message of ``error`` in one line, cut to ``limit`` characters; the error's type if it is empty."""
    return " ".join(str(error).split())[:limit] or type(error).__name__
