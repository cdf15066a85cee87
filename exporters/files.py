"""Write files whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(path: str | Path) -> Iterator[Path]:
    """Yield a path in a temporary folder, whose files are moved next to ``path`` on success, ``path`` itself last.

    The file keeps its name, because an ONNX file refers to its external data by file name.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}.", suffix=".partial", dir=target.parent) as folder:
        temporary = Path(folder) / target.name
        yield temporary
        companions = sorted(file for file in Path(folder).iterdir() if file != temporary)
        for file in [*companions, temporary]:
            file.replace(target.parent / file.name)
