"""Disks that are full or cannot be written."""

import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

_LEAST_BYTES = 4096


def _mounted(*arguments: str) -> bool:
    try:
        return subprocess.run(["mount", *arguments], capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def can_mount() -> bool:
    """Whether this process may mount a tmpfs."""
    with TemporaryDirectory(prefix="optin-mount-") as name:
        if not _mounted("-t", "tmpfs", "-o", "size=64k", "tmpfs", name):
            return False
        subprocess.run(["umount", name], check=True)
        return True


@contextmanager
def tmpfs(place: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes at ``place``."""
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={max(size, _LEAST_BYTES)}", "tmpfs", str(place)], check=True)
    try:
        yield place
    finally:
        subprocess.run(["umount", "--lazy", str(place)], check=True)


def resize(place: Path, size: int) -> None:
    """Give the file system that `tmpfs` made another size in bytes."""
    subprocess.run(["mount", "-o", f"remount,size={size}", str(place)], check=True)


@contextmanager
def read_only(place: Path) -> Iterator[Path | None]:
    """An empty directory that nobody can write to; None where there can be none."""
    if os.geteuid() != 0:
        place.mkdir(mode=0o500)
        yield place
    elif not can_mount():
        yield None
    else:
        with tmpfs(place, _LEAST_BYTES):
            subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
            yield place
