"""What stands at a path, looked at before it is read or written."""

import os
import stat
from pathlib import Path

from optin_deploy.errors import UserError

# What `files` puts around a name while that is being written.
_AROUND = "..12345678.partial"


def check_there(path: Path | None, what: str) -> None:
    """Raise UserError, beginning with ``what``, where nothing is at ``path``, if one is given."""
    if path is not None and not path.exists():
        raise UserError(f"{what} {path} does not exist")


def hidden(name: str) -> bool:
    """Whether a file or folder is one that tools leave beside the user's own."""
    return name.startswith(".") or name == "__MACOSX"


def regular(path: Path) -> Path:
    """``path``; OSError unless it is a file, links followed: a pipe would be waited for, and a device may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no regular file")
    return path


def check_regular_inside(directory: Path) -> None:
    """Raise UserError where a file in ``directory`` is no regular one: libraries open what they find there."""
    for entry in directory.iterdir():
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise UserError(f"{entry} is no regular file: remove it, or put a copy of what it leads to there")


def check_place(path: Path, what: str | None = None) -> None:
    """Raise UserError, beginning with ``what``, where no directory can be made or written at ``path``.

    Told before the work whose results are to go there; nothing is made.
    """
    what = what or str(path)
    try:
        whole = path.absolute()
        there = next(each for each in (whole, *whole.parents) if os.path.lexists(each))
        if not there.exists():
            raise UserError(f"{what} cannot be made: {there} is a link to nothing; choose another path")
        if not there.is_dir():
            told = "is a file: give a directory" if there == whole else f"cannot be made: {there} is a file"
            raise UserError(f"{what} {told}")
        if not os.access(there, os.W_OK | os.X_OK):
            raise UserError(f"{what} cannot be made or written: no permission to write in {there}")
        for name in whole.relative_to(there).parts:
            _check_name(there / f"{name}{_AROUND}")
    except OSError as error:
        raise UserError(f"{what} cannot be made: {error.strerror}; choose another path") from error


def _check_name(path: Path) -> None:
    """OSError where the file system takes no such name; that nothing is there is right."""
    try:
        path.lstat()
    except FileNotFoundError:
        return


def check_new(path: Path, hint: str = "choose another path or remove it") -> None:
    """Raise UserError where a new directory cannot be made at ``path``: one is there, or a link, even to nothing."""
    if os.path.lexists(path):
        raise UserError(f"{path} exists already: {hint}")
    check_place(path)
