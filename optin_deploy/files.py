"""Files and directories that appear whole or not at all."""

import logging
import os
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rich.filesize import decimal

from optin_deploy.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger(__name__)


def write_text(path: Path, text: str) -> None:
    """Write ``text`` to a temporary name beside ``path``, then rename it."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
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

    temporary = path.with_name(f".{path.name}")
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
        temporary = target.with_name(f".{target.name}")
        shutil.copyfile(source, temporary)
        temporary.replace(target)


@contextmanager
def whole_directory(path: Path) -> Iterator[Path]:
    """A temporary directory that becomes ``path`` when the context ends without an error; UserError if it exists."""
    if path.exists():
        raise UserError(f"{path} exists already; choose another path or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
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
