"""Files that appear whole or not at all."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(path: str | Path) -> Iterator[Path]:
    """Yields a path with `path`'s own name in a temporary folder beside it; on success everything in that folder is
    moved next to `path`, `path` itself last, and on any exception nothing is.

    The name is kept because an ONNX file refers to its external data by file name.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".partial", dir=target.parent) as folder:
        temporary = Path(folder) / target.name
        yield temporary
        companions = sorted(file for file in Path(folder).iterdir() if file != temporary)
        for file in [*companions, temporary]:
            file.replace(target.parent / file.name)
