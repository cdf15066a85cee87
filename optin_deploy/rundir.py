"""A run's directory: one run each and one at a time; stages are kept as they are done, so that a run can go on."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import Any

import torch
from torch import nn

from optin_deploy.errors import UserError
from optin_deploy.files import write_text
from optin_deploy.recipe import Recipe

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_RUN_NAME = "run.json"
logger = logging.getLogger(__name__)


def fingerprint(recipe: Recipe, module: nn.Module, calibration_digest: str, version: str) -> str:
    """A hash of all that decides a run's results: options, weights, calibration data, versions."""
    digest = hashlib.sha256()
    digest.update(json.dumps(recipe.model_dump(mode="json"), sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(f"{calibration_digest} {version} {torch.__version__}".encode())
    return digest.hexdigest()


def default_directory(recipe: Recipe, run: str) -> Path:
    """``runs/MODEL-flops0.5-HASH`` (``MODEL-2of4-HASH`` without a budget) for the run with that fingerprint."""
    name = Path(recipe.model).name.replace("/", "-") or "model"
    asked = {"flops": recipe.flops, "latency": recipe.latency, "ms": recipe.latency_ms}
    parts = [f"{what}{value:g}" for what, value in asked.items() if value is not None]
    if recipe.sparsity is not None:
        parts.append(recipe.sparsity.replace(":", "of"))
    return Path("runs") / "-".join([name, *parts, run[:8]])


def check(directory: Path, run: str) -> None:
    """Raise UserError when ``directory`` holds something else than the (unfinished) run with that fingerprint."""
    if directory.is_file():
        raise UserError(f"--output {directory} is a file: give a directory")
    if not directory.is_dir() or not any(directory.iterdir()):
        return
    try:
        held = json.loads((directory / _RUN_NAME).read_text(encoding="utf-8"))["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"--output {directory} is not empty and holds no run: choose another directory") from None
    if held != run:
        raise UserError(
            f"--output {directory} holds another run (other options, weights, data or version): choose another "
            "directory, or remove this one"
        )


@contextmanager
def held(directory: Path, run: str, recipe: Recipe) -> Iterator[None]:
    """Make ``directory`` with the resolved recipe and the fingerprint ``run``, and keep other runs out of it meanwhile.

    The directory itself is locked (flock, where the system has it): that leaves no file behind, and goes with the
    process, however that ends.

    Raises:
        UserError: another run is at work there, it holds something else, or it cannot be written.
    """
    with _writable(directory):
        directory.mkdir(parents=True, exist_ok=True)
    with _locked(directory):
        check(directory, run)
        with _writable(directory):
            write_text(directory / _RUN_NAME, json.dumps({"fingerprint": run}) + "\n")
            recipe.save(directory / "recipe.yaml")
        yield


@contextmanager
def _locked(directory: Path) -> Iterator[None]:
    if fcntl is None:
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(
                f"--output {directory}: another run is at work there; wait until it is done, or choose another one"
            ) from None
        yield
    finally:
        os.close(descriptor)


@contextmanager
def _writable(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"--output {directory} cannot be made or written: {error.strerror}") from error


def kept_json(path: Path, make: Callable[[], Any]) -> Any:
    """The JSON at ``path``, or what ``make`` gives, written there."""
    if path.is_file():
        tell_kept(path)
        return json.loads(path.read_text(encoding="utf-8"))
    value = make()
    write_text(path, json.dumps(value, indent=1) + "\n")
    return json.loads(path.read_text(encoding="utf-8"))


def tell_kept(path: Path) -> None:
    """Log that what an earlier run of the same directory has made is taken, and when that was."""
    made = datetime.fromtimestamp(path.stat().st_mtime).isoformat(" ", "seconds")
    logger.info("%s is kept from an earlier run, of %s", path, made)
