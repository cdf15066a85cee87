"""What a command ends with: an exit code, and one line for what is not a bug.

0 done, 2 something to fix, 3 a gate failed, 130 interrupted (128 and its number for another signal), 1 a bug.
"""

import errno
import sys
import tempfile
from collections.abc import Callable
from typing import Any, cast

import typer
from rich.console import Console
from rich.text import Text

from optin_deploy.distributed.torchrun import launched_ranks
from optin_deploy.errors import GateError, UserError
from optin_deploy.utils.signals import Ended, signals_raised, told

# What no name of a file needs to come with: a full or failing disk, and the limits of this process.
_OF_FILES = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.EFBIG, errno.EMFILE)
_MOST_TOLD = 500
# What the parser raises for a wrong option or argument; its module is another in each version.
_USAGE_ERROR: type[Exception] = cast(Any, typer.BadParameter.__mro__[1])


def exit_code(run: Callable[[], int], command: str) -> int:
    """The exit code of ``run``, or that of an error that is not a bug, which is told in one line.

    Args:
        command: as it was given, to be given again.
    """
    errors = Console(stderr=True, soft_wrap=True)
    try:
        with signals_raised():
            return run()
    except GateError as error:
        _tell(errors, "gate failed:", error)
        return 3
    except _user_errors() as error:
        _tell(errors, "error:", error)
        return 2
    except _USAGE_ERROR as error:
        _tell_usage(errors, error)
        return 2
    except OSError as error:
        if error.errno is None or (error.filename is None and error.errno not in _OF_FILES):
            raise
        # Of a file that is renamed, the second is its place.
        where = error.filename2 or error.filename or f"a file, of the output or in {tempfile.gettempdir()},"
        what = f"{where} cannot be read or written: {error.strerror}; mend that and give the command again"
        _tell(errors, "error:", what)
        return 2
    except Ended as ended:
        if launched_ranks()[0] == 0:
            errors.print(told(ended, command), highlight=False, markup=False)
        return ended.code


def _tell(console: Console, what: str, error: Exception | str) -> None:
    """One line. The message is no markup: `[cpu]` names an extra and not a style. What of a file's name is not UTF-8
    is told by escapes."""
    message = " ".join(str(error).split()).encode("utf-8", "backslashreplace").decode("utf-8")
    console.print(Text.assemble((what, "red"), " ", message))


def _tell_usage(console: Console, error: Any) -> None:
    """One line of what the parser says; a command line without any command gets the help, which has been told."""
    message = error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        return
    help_command = f"{error.ctx.command_path} --help" if error.ctx else "optin-deploy --help"
    _tell(console, "error:", f"{message.strip()[:_MOST_TOLD].rstrip('.')}; see {help_command}")


def _user_errors() -> tuple[type[Exception], ...]:
    """Exporters and profilers have errors of their own, which they can raise only once they are imported."""
    homes = (("exporters.errors", "ExportError"), ("profilers.errors", "ProfilingError"))
    return (UserError, *(getattr(sys.modules[home], name) for home, name in homes if home in sys.modules))
