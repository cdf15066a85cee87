"""Convert pickles of weights to safetensors when a user asks for it; no other code of this package reads pickles.

torch's restricted unpickler reads them and builds tensors and plain containers only. All other objects in a file (the
options of a training script, NumPy scalars, the classes of a whole module) become empty containers: no code that the
file names is imported or run.
"""

import json
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar", ".pkl", ".pickle")
# Larger than the weights, and not weights.
_LEFT_OUT = ("optimizer", "optimizers", "optimizer_states", "optimizer_state_dict", "optim", "hyper_parameters")
# Attributes of a pickled module with its tensors and submodules.
_OF_MODULES = ("_parameters", "_buffers", "_modules")
# Files of torch before 1.6 do not list the names that they use.
_USUAL = ("argparse.Namespace", "numpy.core.multiarray.scalar", "numpy.dtype", "collections.defaultdict")
_MOST_SHOWN = 6


def conversion_command(source: Path, target: Path) -> str:
    """Return the shell command that converts the pickle ``source`` to the safetensors file ``target``."""
    return python_command(f"from optin_deploy.models.pickles import convert; convert({str(source)!r}, {str(target)!r})")


def python_command(code: str) -> str:
    """Return the shell command that runs ``code``, one line of Python."""
    # A shell expands these characters within double quotes; within single quotes it expands nothing.
    quoted = f'"{code}"' if not re.search(r'["$`\\!]', code) else "'" + code.replace("'", "'\"'\"'") + "'"
    return f"python -c {quoted}"


def converted_path(source: Path) -> Path:
    """Return the path for the tensors of the pickle ``source``, in the same directory."""
    while source.suffix in SUFFIXES:
        source = source.with_suffix("")
    return source.with_name(f"{source.name}.safetensors")


def convert(source: str | Path, target: str | Path) -> None:
    """Write the tensors of the pickle ``source`` to ``target`` and print a summary.

    Names of nested tensors are joined by dots. Optimizers, hyperparameters and values that are not tensors are skipped.

    Args:
        source: a file of ``torch.save``, or an index of several (``pytorch_model.bin.index.json``).

    Raises:
        SystemExit: the file cannot be read without running code of its own, holds no tensors, or ``target`` exists.
    """
    if Path(target).exists():
        sys.exit(f"{target} exists already: remove it, or give another name in the command")
    try:
        tensors = {name: t for file in _files(Path(source)) for name, t in _tensors(_read(file), ())}
        if not tensors:
            raise ValueError("it holds no tensors")
        save_file(tensors, target, {"format": "pt"})
    except Exception as error:  # damaged files raise errors of any type
        # torch's message begins with how to unpickle without restriction.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
        reason = " ".join(reason.split())[:200] or type(error).__name__
        sys.exit(f"{source} cannot be converted: {reason}; load it where it was made, and save model.state_dict()")
    tops = sorted({name.partition(".")[0] for name in tensors})
    more = f" and {len(tops) - _MOST_SHOWN} more" if len(tops) > _MOST_SHOWN else ""
    sys.stdout.write(f"{target}: {len(tensors)} tensors, under {', '.join(tops[:_MOST_SHOWN])}{more}\n")


def _files(source: Path) -> list[Path]:
    if source.suffix != ".json":
        return [source]
    return [source.parent / name for name in sorted(set(json.loads(source.read_text())["weight_map"].values()))]


def _read(path: Path) -> Any:
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if any(Path(name).name == "constants.pkl" for name in archive.namelist()):
                # TorchScript: its weights are read, its code is not run.
                return torch.jit.load(path, "cpu").state_dict()
        unknown: Iterable[str] = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    else:
        unknown = _USUAL
    known: list[Any] = [(_placeholder(name), name) for name in unknown]
    # From a path with that suffix, torch would read safetensors.
    with torch.serialization.safe_globals(known), path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _placeholder(name: str) -> type:
    """Return a class to build instead of the class or function ``name``."""
    if name.startswith("numpy"):
        # Their states are tuples, which are ignored.
        ignoring = {"__init__": lambda *_, **__: None, "__setstate__": lambda *_: None}
        return type("Placeholder", (), ignoring)
    # The restricted unpickler sets items and attributes of no other mapping.
    return type("Placeholder", (), {"__new__": lambda *_, **__: OrderedDict()})


def _tensors(value: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """Yield copies of the tensors in nested containers and modules with their names; tensors may share memory."""
    if isinstance(value, Tensor):
        yield ".".join(names), value.detach().clone().contiguous()
        return
    if isinstance(value, dict):
        items: Iterable[tuple[Any, Any]] = {**value, **getattr(value, "__dict__", {})}.items()
    else:
        items = enumerate(value) if isinstance(value, list | tuple) else ()
    for key, inner in items:
        if not names and key in _LEFT_OUT:
            continue
        yield from _tensors(inner, names if key in _OF_MODULES else (*names, str(key)))
