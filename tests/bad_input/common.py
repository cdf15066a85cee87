"""What rows are made of."""

import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optin_deploy.models import checkpoint
from optin_deploy.network import Network
from optin_deploy.structure.plan import Plan

LONG = "n" * 300
"""Longer than the name of a file may be."""
MARK = "it-ran"
"""A file that code which comes with a model would make."""
QUICK: dict[str, Any] = {
    "runtimes": ("ort-cpu",),
    "batch_sizes": (1,),
    "profile_seconds": 0.1,
    "threads": 1,
    "flops": 0.6,
    "calibration_samples": 8,
}
QUICKLY = (
    *("--runtimes", "ort-cpu", "--batch-sizes", "1", "--profile-seconds", "0.1", "--threads", "1"),
    *("--flops", "0.6", "--calibration-samples", "8"),
)


@dataclass(frozen=True)
class Material:
    """Good input in ``folder``: ``shallow`` (a checkpoint of ours, pictures), ``bert`` (transformers, texts),
    ``small-bert`` (a checkpoint of it), ``images``, and ``run``, a finished run of shallow on images."""

    folder: Path

    def copy(self, *names: str) -> None:
        """Into the working directory."""
        for name in names:
            shutil.copytree(self.folder / name, name)


@dataclass(frozen=True)
class Row:
    """One bad input.

    Attributes:
        name: of the row.
        make: writes it into the working directory and gives the command line.
        told: what the one line says, a regular expression: the file or value that is wrong, and how.
        runs_code: it would run code of its own if that were let.
    """

    name: str
    make: Callable[[Material], Sequence[str]]
    told: str = ""
    runs_code: bool = False


class Marking:
    """Unpickled, it makes the file `MARK`."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (Path.touch, (Path(MARK),))


def pipe(path: Path) -> None:
    """Put a pipe that nobody writes to in the place of ``path``."""
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def endless(path: Path) -> None:
    """Put a link to a device without end in the place of ``path``."""
    path.unlink(missing_ok=True)
    path.symlink_to("/dev/zero")


def save_pickle(path: Path) -> None:
    """A checkpoint of the kind that torch unpickles."""
    torch.save({"weight": Marking()}, path)


def save_text_checkpoint(network: Network, path: Path) -> None:
    """``network`` as a checkpoint, nothing pruned."""
    checkpoint.save(network, Plan({}), path)


def pruning(model: str, *more: str) -> list[str]:
    """The command that prunes ``model``."""
    return ["prune-export", "--model", model, *QUICKLY, *more]


def pruning_text(*more: str) -> list[str]:
    """The command that prunes bert, on texts that follow."""
    return pruning("bert", "--sequence-length", "12", *more)
