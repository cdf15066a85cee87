"""Exit codes of the command line, and one line for every error that is not a bug.

0 done, 2 something to fix, 3 a gate failed, 130 interrupted (128 + number for another signal), 1 a bug.
"""

import errno
import sys
import tempfile
from collections.abc import Callable
from typing import TYPE_CHECKING, cast

import typer
from rich.console import Console
from rich.text import Text

from optin_deploy.distributed.torchrun import launched_ranks
from optin_deploy.errors import GateError, UserError
from optin_deploy.utils.signals import Terminated, describe_end, raise_on_signals

if TYPE_CHECKING:
    from click import UsageError

# OS errors reported as user errors even without a file name: a full or failing disk, and limits of this process.
_OF_FILES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.EMFILE)
_MOST_CHARACTERS = 500
# The parser's error for a wrong option or argument. typer exports only this subclass, and moves the base class about.
_USAGE_ERROR = cast("type[UsageError]", typer.BadParameter.__base__)


def exit_code(run: Callable[[], int], command: str) -> int:
    """Return the exit code of ``run``, or that of an error that is not a bug, after printing one line about it.

    Args:
        run: does the command's work.
        command: the command line, shown to be repeated after an interruption.
    """
    errors = Console(stderr=True, soft_wrap=True)
    try:
        with raise_on_signals():
            return run()
    except GateError as error:
        _print_line(errors, "gate failed:", error)
        return 3
    except _user_errors() as error:
        _print_line(errors, "error:", error)
        return 2
    except _USAGE_ERROR as error:
        _print_usage(errors, error)
        return 2
    except OSError as error:
        if error.errno is None or (error.filename is None and error.errno not in _OF_FILES):
            raise
        # The second name of a file that is renamed is its new one.
        file = error.filename2 or error.filename or f"a file, of the output or in {tempfile.gettempdir()},"
        _print_line(errors, "error:", f"{file} cannot be read or written: {error.strerror}; fix it and run again")
        return 2
    except Terminated as terminated:
        if launched_ranks()[0] == 0:
            errors.print(describe_end(terminated, command), highlight=False, markup=False)
        return terminated.code


def _print_line(console: Console, kind: str, error: Exception | str) -> None:
    """Print an error in one line, without markup (``[cpu]`` is an extra, not a style), with escapes for bad UTF-8."""
    message = " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode("utf-8")
    console.print(Text.assemble((kind, "red"), " ", message))


def _print_usage(console: Console, error: "UsageError") -> None:
    """Print the parser's error in one line; nothing for a command line without a command, which has shown the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        return
    help_command = f"{error.ctx.command_path} --help" if error.ctx else "optin-deploy --help"
    message = error.format_message().strip()[:_MOST_CHARACTERS].rstrip(".")
    _print_line(console, "error:", f"{message}; see {help_command}")


def _user_errors() -> tuple[type[Exception], ...]:
    """Return the classes of user errors. Those of exporters and profilers exist only once they are imported."""
    classes = (("exporters.errors", "ExportError"), ("profilers.errors", "ProfilingError"))
    return (UserError, *(getattr(sys.modules[module], name) for module, name in classes if module in sys.modules))
