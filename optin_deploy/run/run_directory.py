"""A run's directory: one run each and one at a time; stages are kept as they are done, so that a run can go on.

``run.json`` holds the fingerprint of all that goes into the run, and the SHA-256 of what each stage has written: a run
goes on only from what it wrote itself.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import nn

from optin_deploy.config.recipe import Recipe
from optin_deploy.errors import UserError
from optin_deploy.utils.atomic_files import is_partial, remove_partial, tell_kept, write_text
from optin_deploy.utils.paths import check_place, regular
from optin_deploy.utils.signals import kept_in

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
    """Raise UserError when ``directory`` holds something else than the (unfinished) run with that fingerprint, or that
    run's files have changed since it wrote them."""
    check_place(directory, f"--output {directory}")
    # A run that was killed in its first moments leaves no more than what it was writing.
    if not directory.is_dir() or all(map(is_partial, directory.iterdir())):
        return
    found = _read(directory)
    if found.fingerprint != run:
        raise UserError(
            f"--output {directory} holds another run (other options, weights, data or version): choose another "
            "directory, or remove this one"
        )
    _check_entries(directory)
    for name, digest in found.files.items():
        if (directory / name).exists() and _digest(directory / name) != digest:
            raise UserError(
                f"--output {directory}: {name} is not what the run wrote, but damaged or changed: remove it, and it is "
                "made again"
            )


def _check_entries(directory: Path) -> None:
    """Raise UserError for what stands in a run's directory and can be neither read nor replaced by what the run writes:
    links to nothing, pipes, and directories in the place of files."""
    for entry in directory.iterdir():
        right = entry.is_dir() if entry.name == "checkpoint" else entry.is_file() or not _is_of_run(entry.name)
        if not right and not is_partial(entry):
            what = "directory" if entry.name == "checkpoint" else "file"
            raise UserError(f"--output {directory}: {entry.name} is no {what}: remove it, and it is made again")


def _is_of_run(name: str) -> bool:
    """Whether a run writes a file of that name."""
    return name.startswith(("dense.", "pruned.")) or name.endswith((".json", ".yaml", ".html", ".md", ".safetensors"))


class _Run(BaseModel):
    """``run.json``; ``files`` are SHA-256 by name, of files and of directories."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprint: str
    files: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], str] = {}


def _read(directory: Path) -> _Run:
    try:
        return _Run.model_validate_json(regular(directory / _RUN_NAME).read_bytes())
    except (OSError, ValidationError):
        raise UserError(f"--output {directory} is not empty and holds no run: choose another directory") from None


def _write(directory: Path, run: _Run) -> None:
    write_text(directory / _RUN_NAME, run.model_dump_json(indent=1) + "\n")


@contextmanager
def recorded(path: Path) -> Iterator[None]:
    """While a stage writes ``path``, a file or a directory in the run's directory, which is held; then it is noted."""
    # A run that is killed in here has not noted what was there before.
    run = _read(path.parent)
    if path.name in run.files:
        _write(path.parent, _noted(run, path.name, None))
    yield
    record(path)


def record(path: Path) -> None:
    """Note what stands at ``path`` in the run's directory, which is held."""
    _write(path.parent, _noted(_read(path.parent), path.name, _digest(path)))


def keep(path: Path) -> None:
    """Note and tell that what stands at ``path`` is taken as it is."""
    record(path)
    tell_kept(path)


def _noted(run: _Run, name: str, digest: str | None) -> _Run:
    files = {**run.files, name: digest}
    return run.model_copy(update={"files": {n: d for n, d in files.items() if d is not None}})


def _digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files in a directory."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for part in sorted(p for p in path.rglob("*") if p.is_file() and not is_partial(p)):
        digest.update(f"{part.relative_to(path).as_posix()}\0{_digest(part)}\0".encode())
    return digest.hexdigest()


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
            remove_partial(directory)
            files = _read(directory).files if (directory / _RUN_NAME).exists() else {}
            _write(directory, _Run(fingerprint=run, files=files))
            recipe.save(directory / "recipe.yaml")
        with kept_in(directory):
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
    """The JSON at ``path`` in the run's directory, which is held, or what ``make`` gives, written there."""
    if path.is_file():
        keep(path)
    else:
        value = make()
        with recorded(path):
            write_text(path, json.dumps(value, indent=1) + "\n")
    return read_json(path)


def read_json(path: Path) -> Any:
    """The JSON that a stage wrote at ``path``; UserError when it is none."""
    try:
        return json.loads(regular(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise UserError(f"{path} is damaged: remove it, and it is made again") from None
