"""A run's directory: it belongs to one run and one process at a time, and keeps the result of every stage.

``run.json`` stores the fingerprint of everything that goes into the run, and the SHA-256 of everything that each stage
wrote: an interrupted run continues only from files that it wrote itself.
"""

import hashlib
import json
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, ParamSpec, TypeVar

import torch
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from pydantic_core import to_jsonable_python
from torch import nn

from optin_deploy.config.recipe import Recipe
from optin_deploy.errors import UserError
from optin_deploy.utils.atomic_files import is_partial, log_kept, remove_partial, write_text
from optin_deploy.utils.paths import check_writable, require_regular
from optin_deploy.utils.signals import note_kept

T = TypeVar("T")
P = ParamSpec("P")
CHECKPOINT = "checkpoint"
_RUN_NAME, _LOCK_NAME = "run.json", ".lock"
logger = logging.getLogger(__name__)


def compute_fingerprint(recipe: Recipe, module: nn.Module, calibration_digest: str, version: str) -> str:
    """Return a hash of everything that decides a run's results: options, weights, calibration data, versions."""
    digest = hashlib.sha256()
    digest.update(json.dumps(recipe.model_dump(mode="json"), sort_keys=True).encode())
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    digest.update(f"{calibration_digest} {version} {torch.__version__}".encode())
    return digest.hexdigest()


def default_directory(recipe: Recipe, fingerprint: str) -> Path:
    """Return ``runs/MODEL-flops0.5-HASH``, or ``runs/MODEL-2of4-HASH`` without a budget, for that fingerprint."""
    name = Path(recipe.model).name.replace("/", "-") or "model"
    budgets = {"flops": recipe.flops, "latency": recipe.latency, "ms": recipe.latency_ms}
    parts = [f"{kind}{value:g}" for kind, value in budgets.items() if value is not None]
    if recipe.sparsity is not None:
        parts.append(recipe.sparsity.replace(":", "of"))
    return Path("runs") / "-".join([name, *parts, fingerprint[:8]])


def check(directory: Path, fingerprint: str) -> None:
    """Check that the run with ``fingerprint`` can start or continue in ``directory``.

    Raises:
        UserError: it contains another run or something else, or files of the run have changed since it wrote them.
    """
    check_writable(directory, f"--output {directory}")
    # A run that was killed in its first moments leaves only its lock and partial files.
    if not directory.is_dir() or all(entry.name == _LOCK_NAME or is_partial(entry) for entry in directory.iterdir()):
        return
    run = _read(directory)
    if run.fingerprint != fingerprint:
        raise UserError(
            f"--output {directory} holds another run (other options, weights, data or version): choose another "
            "directory, or remove this one"
        )
    _check_entries(directory)
    for name, digest in run.files.items():
        if (directory / name).exists() and _digest(directory / name) != digest:
            raise UserError(
                f"--output {directory}: {name} is not what the run wrote, but damaged or changed: remove it, and it is "
                "made again"
            )


def _check_entries(directory: Path) -> None:
    """Raise UserError for entries that the run can neither read nor replace.

    These are links to nothing, pipes, and directories in the place of files.
    """
    for entry in directory.iterdir():
        right = entry.is_dir() if entry.name == CHECKPOINT else entry.is_file() or not _is_of_run(entry.name)
        if not right and not is_partial(entry):
            kind = "directory" if entry.name == CHECKPOINT else "file"
            raise UserError(f"--output {directory}: {entry.name} is no {kind}: remove it, and it is made again")


def _is_of_run(name: str) -> bool:
    """Return whether a run writes a file of that name."""
    return name.startswith(("dense.", "pruned.")) or name.endswith((".json", ".yaml", ".html", ".md", ".safetensors"))


class _Run(BaseModel):
    """``run.json``; ``files`` maps names of files and directories to their SHA-256."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    fingerprint: str
    files: dict[Annotated[str, Field(pattern=r"^\w[\w.-]*$")], str] = {}


def _read(directory: Path) -> _Run:
    try:
        return _Run.model_validate_json(require_regular(directory / _RUN_NAME).read_bytes())
    except (OSError, ValidationError):
        raise UserError(f"--output {directory} is not empty and holds no run: choose another directory") from None


def _write(directory: Path, run: _Run) -> None:
    write_text(directory / _RUN_NAME, run.model_dump_json(indent=1) + "\n")


@contextmanager
def recording(path: Path) -> Iterator[None]:
    """Record ``path`` as written by the run, once the code inside has written this file or directory of it."""
    # If the run is killed inside, the old digest must not be left in run.json.
    run = _read(path.parent)
    if path.name in run.files:
        _write(path.parent, _with_digest(run, path.name, None))
    yield
    record(path)


def record(path: Path) -> None:
    """Record the file or directory ``path`` as written by the run."""
    _write(path.parent, _with_digest(_read(path.parent), path.name, _digest(path)))


def keep(path: Path) -> None:
    """Record the file or directory ``path`` of an earlier try, and log that it is used as it is."""
    record(path)
    log_kept(path)


def _with_digest(run: _Run, name: str, digest: str | None) -> _Run:
    files = {**run.files, name: digest}
    return run.model_copy(update={"files": {n: d for n, d in files.items() if d is not None}})


def _digest(path: Path) -> str:
    """Return the SHA-256 of a file, or of the names and contents of all files in a directory."""
    if not path.is_dir():
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    digest = hashlib.sha256()
    for inner in sorted(p for p in path.rglob("*") if p.is_file() and not is_partial(p)):
        digest.update(f"{inner.relative_to(path).as_posix()}\0{_digest(inner)}\0".encode())
    return digest.hexdigest()


@contextmanager
def hold(directory: Path, fingerprint: str, recipe: Recipe) -> Iterator[None]:
    """Create ``directory`` with its recipe and fingerprint, and keep other processes out of it.

    The lock is released when the process ends, even if it is killed; the empty file ``.lock`` remains.

    Raises:
        UserError: another process works there, it contains something else, or it cannot be written.
    """
    with _user_errors(directory):
        directory.mkdir(parents=True, exist_ok=True)
    lock = FileLock(directory / _LOCK_NAME, timeout=0)
    with _user_errors(directory):
        lock.acquire()
    try:
        check(directory, fingerprint)
        with _user_errors(directory):
            remove_partial(directory)
            files = _read(directory).files if (directory / _RUN_NAME).exists() else {}
            _write(directory, _Run(fingerprint=fingerprint, files=files))
            recipe.save(directory / "recipe.yaml")
        with note_kept(directory):
            yield
    finally:
        lock.release()


@contextmanager
def _user_errors(directory: Path) -> Iterator[None]:
    try:
        yield
    except Timeout:
        raise UserError(
            f"--output {directory}: another run is at work there; wait until it is done, or choose another one"
        ) from None
    except OSError as error:
        raise UserError(f"--output {directory} cannot be made or written: {error.strerror}") from error


def load_or_compute(path: Path, kind: type[T], compute: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Return the result of a stage, kept as JSON at ``path`` in the held directory.

    ``compute(*args, **kwargs)`` is called only if an earlier try has not left it. The result is always read from the
    file, so that a file that cannot be read back is found at once.
    """
    if path.is_file():
        keep(path)
    else:
        write_json(path, compute(*args, **kwargs))
    return read_json(path, kind)


def write_json(path: Path, result: object, *, indent: int | None = 1) -> None:
    """Write a stage's result as JSON to ``path`` in the held directory, and record it."""
    with recording(path):
        write_text(path, json.dumps(to_jsonable_python(result), indent=indent) + "\n")


def read_json(path: Path, kind: type[T], advice: str = "remove it, and it is made again") -> T:
    """Read the result of type ``kind`` that a stage wrote to ``path``; UserError with ``advice`` if it is damaged."""
    try:
        return TypeAdapter(kind).validate_json(require_regular(path).read_bytes())
    except (OSError, ValidationError):
        raise UserError(f"{path} is damaged: {advice}") from None


def read_with_checkpoint(directory: Path, name: str, kind: type[T]) -> T:
    """Read a file that was written together with the checkpoint, and can only be recreated together with it."""
    path, checkpoint = directory / name, directory / CHECKPOINT
    if not path.is_file():
        raise UserError(f"{path} is missing: remove {checkpoint} too, to prune again")
    return read_json(path, kind, f"remove it and {checkpoint}, to prune again")
