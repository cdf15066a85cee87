"""Files of latency tables in the user's cache folder."""

import hashlib
import json
import os
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

from profilers.errors import ProfilingError
from profilers.latency_table import LatencyTable

# Increased when the measured quantity or the method changes, so that older tables are not found.
_LAYOUT = 3
# Raised when files that are not tables are read as such.
_DAMAGED = (ArithmeticError, AttributeError, LookupError, RecursionError, StopIteration, TypeError, ValueError)


def cache_folder() -> Path:
    """Return the folder of the tables: ``optin-deploy/tables`` in the user's cache folder (``XDG_CACHE_HOME``)."""
    return user_cache_path("optin-deploy", appauthor=False) / "tables"


def table_file(setting: Mapping[str, Any]) -> Path:
    """Return the file of the table with that setting; it may not exist."""
    text = json.dumps({"layout": _LAYOUT, **setting}, sort_keys=True)
    return cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:24]}.json"


def read_table(setting: Mapping[str, Any]) -> LatencyTable | None:
    """Return the cached table of that setting; None if there is none, ProfilingError if its file is damaged."""
    path = table_file(setting)
    if not path.is_file():
        return None
    try:
        table = LatencyTable.from_dict(json.loads(path.read_text(encoding="utf-8")))
        # A table whose costs cannot be computed is as damaged as one that is not JSON.
        for part in {row.part for row in table.rows}:
            table.grid(part)
        if table_file(table.setting) != path or not isfinite(table.block_ms):
            raise ValueError("it is another table")
        return table
    except (OSError, *_DAMAGED) as error:
        raise ProfilingError(f"the latency table {path} cannot be read: remove it to measure again") from error


def cached_settings() -> list[dict[str, Any]]:
    """Return the settings of all cached tables, the newest first, without damaged files."""
    files = cache_folder().glob("*.json") if cache_folder().is_dir() else ()
    settings = []
    for path in sorted(files, key=lambda path: -path.stat().st_mtime):
        try:
            setting = dict(json.loads(path.read_text(encoding="utf-8"))["setting"])
            if table_file(setting) == path:
                settings.append(setting)
        except (OSError, *_DAMAGED):
            continue
    return settings


def check_cache() -> None:
    """Raise ProfilingError if tables cannot be stored. Call it before they are measured."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProfilingError(
            f"latency tables cannot be kept in {folder}: {error.strerror}; name another folder by XDG_CACHE_HOME"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ProfilingError(f"latency tables cannot be kept in {folder}: no permission to write there")


def save_table(table: LatencyTable) -> Path:
    """Write the table into the cache, completely or not at all."""
    path = table_file(table.setting)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(table.to_dict()), encoding="utf-8")
    temporary.replace(path)
    return path
