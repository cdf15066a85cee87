"""Checks of paths before they are read or written."""

import os
import stat
from pathlib import Path

from optin_deploy.errors import UserError

# What `atomic_files` adds to a name while the file is being written.
_ADDED = "..12345678.partial"


def check_exists(path: Path | None, what: str) -> None:
    """Raise UserError, starting with ``what``, if ``path`` does not exist; None passes."""
    if path is not None and not path.exists():
        raise UserError(f"{what} {path} does not exist")


def is_hidden(name: str) -> bool:
    """Return whether a file or folder was made by a tool, not by the user."""
    return name.startswith(".") or name == "__MACOSX"


def require_regular(path: Path) -> Path:
    """Return ``path``; OSError unless it is a regular file, links followed. Reading a pipe may never end."""
    if not stat.S_ISREG(path.stat().st_mode):
        raise OSError("it is no regular file")
    return path


def check_regular_inside(directory: Path) -> None:
    """Raise UserError if ``directory`` has entries other than files and folders, which libraries would open."""
    for entry in directory.iterdir():
        if entry.exists() and not entry.is_file() and not entry.is_dir():
            raise UserError(f"{entry} is no regular file: remove it, or put a copy of what it leads to there")


def check_writable(path: Path, what: str | None = None) -> None:
    """Raise UserError, starting with ``what``, if no directory can be made or written at ``path``. Nothing is made."""
    what = what or str(path)
    try:
        whole = path.absolute()
        nearest = next(parent for parent in (whole, *whole.parents) if os.path.lexists(parent))
        if not nearest.exists():
            raise UserError(f"{what} cannot be made: {nearest} is a link to nothing; choose another path")
        if not nearest.is_dir():
            reason = "is a file: give a directory" if nearest == whole else f"cannot be made: {nearest} is a file"
            raise UserError(f"{what} {reason}")
        if not os.access(nearest, os.W_OK | os.X_OK):
            raise UserError(f"{what} cannot be made or written: no permission to write in {nearest}")
        for name in whole.relative_to(nearest).parts:
            _check_name(nearest / f"{name}{_ADDED}")
    except OSError as error:
        raise UserError(f"{what} cannot be made: {error.strerror}; choose another path") from error


def _check_name(path: Path) -> None:
    """Raise OSError if the file system does not accept the name."""
    try:
        path.lstat()
    except FileNotFoundError:
        return


def check_new(path: Path, hint: str = "choose another path or remove it") -> None:
    """Raise UserError if ``path`` exists, as a dangling link too, or if no directory can be made there."""
    if os.path.lexists(path):
        raise UserError(f"{path} exists already: {hint}")
    check_writable(path)
