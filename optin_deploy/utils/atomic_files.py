"""Files and directories that appear whole or not at all.

What is being written stands beside its place as ``.NAME.….partial``: all that a writer that was killed leaves behind.
"""

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.filesize import decimal

from optin_deploy.utils.paths import check_new

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

PARTIAL = ".partial"


def is_partial(path: Path) -> bool:
    """Whether ``path`` is named like something that is being written, or that was when its writer was killed."""
    return path.name.startswith(".") and path.name.endswith(PARTIAL)


def remove_partial(directory: Path) -> None:
    """Remove what killed writers have left in ``directory``, in which nobody may be writing meanwhile."""
    for path in filter(is_partial, list(directory.iterdir())):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to a temporary name beside ``path``, then rename it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
        tell_written(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Write ``tensors`` as safetensors to a temporary name beside ``path``, then rename it; OSError if that fails."""
    # Wrong options are told before torch is loaded.
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    temporary = path.with_name(f".{path.name}{PARTIAL}")
    try:
        save_file(dict(tensors), temporary, metadata={"format": "pt"})
        temporary.chmod(0o644)
        temporary.replace(path)
        tell_written(path)
    except SafetensorError as error:
        temporary.unlink(missing_ok=True)
        # It tells the system's error in words only.
        number = re.search(r"os error (\d+)", str(error))
        if number is None:
            raise
        raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def link_or_copy(source: Path, target: Path) -> None:
    """Make ``target`` the same file as ``source`` or, across file systems, a copy; nothing where it exists already."""
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        temporary = target.with_name(f".{target.name}{PARTIAL}")
        try:
            shutil.copyfile(source, temporary)
            temporary.replace(target)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes ``path`` when the context ends without an error; UserError if it exists."""
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(path)
        for file in sorted(path.rglob("*")):
            if file.is_file():
                tell_written(file)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def tell_written(path: Path) -> None:
    """Log a file's size; not of one in a directory that is not whole yet, which `whole_directory` tells of."""
    if not path.parent.name.startswith("."):
        logger.info("wrote %s, %s", path, decimal(path.stat().st_size))


def tell_kept(path: Path) -> None:
    """Log that what an earlier run of the same directory has made is taken, and when that was."""
    made = datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "seconds")
    logger.info("%s is kept from an earlier run, of %s", path, made)
