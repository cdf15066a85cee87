"""Files and directories that appear complete or not at all.

They are written under the name ``.NAME.XXXXXXXX.partial`` in the same directory; a killed writer leaves nothing else.
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
from secrets import token_hex
from typing import TYPE_CHECKING

from rich.filesize import decimal

from optin_deploy.utils.paths import check_new

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)

_PARTIAL = ".partial"


def is_partial(path: Path) -> bool:
    """Return whether ``path`` has the name of an unfinished file or directory."""
    return path.name.startswith(".") and path.name.endswith(_PARTIAL)


def remove_partial(directory: Path) -> None:
    """Remove what killed writers left in ``directory``. Nobody may be writing there."""
    for path in filter(is_partial, list(directory.iterdir())):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary path in the same directory, whose file replaces ``path`` if the context ends without an error.

    with atomic_path(path) as temporary:
        temporary.write_text(text)
    """
    temporary = path.with_name(f".{path.name}.{token_hex(4)}{_PARTIAL}")
    try:
        yield temporary
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    log_written(path)


@contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes ``path`` if the context ends without an error.

    UserError if ``path`` exists.
    """
    check_new(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=_PARTIAL))
    try:
        yield temporary
        temporary.chmod(0o755)
        temporary.rename(path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for file in sorted(path.rglob("*")):
        if file.is_file():
            log_written(file)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` as UTF-8, completely or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_tensors(path: Path, tensors: Mapping[str, "Tensor"]) -> None:
    """Write ``tensors`` as safetensors, completely or not at all; OSError if that fails."""
    # Wrong options are reported before torch is loaded.
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    with atomic_path(path) as temporary:
        try:
            save_file(dict(tensors), temporary, metadata={"format": "pt"})
        except SafetensorError as error:
            # The number of the system's error is only in its message.
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1])), str(path)) from error


def link_or_copy(source: Path, target: Path) -> None:
    """Link ``target`` to the file ``source``, or copy it to another file system. Nothing is done if it exists."""
    if target.exists():
        return
    try:
        os.link(source, target)
    except OSError:
        with atomic_path(target) as temporary:
            shutil.copyfile(source, temporary)


def log_written(path: Path) -> None:
    """Log the size of a file. Files in an unfinished directory are logged by `atomic_directory` at its end."""
    if not path.parent.name.startswith("."):
        logger.info("wrote %s, %s", path, decimal(path.stat().st_size))


def log_kept(path: Path) -> None:
    """Log that a file of an earlier run is used, and when that was written."""
    written = datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "seconds")
    logger.info("%s is kept from an earlier run, of %s", path, written)
