"""Pickles of weights, converted to safetensors where a user asks for that; nothing else of this package reads any.

torch's restricted unpickler reads them. It builds tensors and plain containers only. Whatever else a file names (the
options of a training script, numpy's numbers, the classes of a whole module) becomes an empty container: no code that
the file names is imported or run.
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
# Far larger than the weights, and nobody's weights.
_LEFT_OUT = ("optimizer", "optimizers", "optimizer_states", "optimizer_state_dict", "optim", "hyper_parameters")
# Where a whole pickled module keeps its tensors and submodules.
_OF_MODULES = ("_parameters", "_buffers", "_modules")
# Files of torch before 1.6 do not tell which names they use.
_USUAL = ("argparse.Namespace", "numpy.core.multiarray.scalar", "numpy.dtype", "collections.defaultdict")
_MOST_SHOWN = 6


def conversion(source: Path, target: Path) -> str:
    """The command for a shell that converts the pickle ``source`` to the safetensors file ``target``."""
    return python_command(f"from optin_deploy.models.pickles import convert; convert({str(source)!r}, {str(target)!r})")


def python_command(code: str) -> str:
    """The command for a shell that runs ``code``, one line of Python."""
    # Within double quotes a shell reads these as its own; single ones hide all but themselves.
    quoted = f'"{code}"' if not re.search(r'["$`\\!]', code) else "'" + code.replace("'", "'\"'\"'") + "'"
    return f"python -c {quoted}"


def converted_name(source: Path) -> Path:
    """Where the tensors of the pickle ``source`` go: beside it."""
    while source.suffix in SUFFIXES:
        source = source.with_suffix("")
    return source.with_name(f"{source.name}.safetensors")


def convert(source: str | Path, target: str | Path) -> None:
    """Write the tensors of the pickle ``source`` to ``target``; the names of nested ones are joined by dots.

    Optimizers and hyperparameters are left out, and so is what is no tensor. What was written is told on stdout.

    Args:
        source: a file of ``torch.save``, or an index of several (``pytorch_model.bin.index.json``).

    Raises:
        SystemExit: it cannot be read without running code of its own, holds no tensors, or ``target`` exists; one line
            says which.
    """
    if Path(target).exists():
        sys.exit(f"{target} exists already: remove it, or give another name in the command")
    try:
        tensors = {name: t for file in _files(Path(source)) for name, t in _tensors(_read(file), ())}
        if not tensors:
            raise ValueError("it holds no tensors")
        save_file(tensors, target, {"format": "pt"})
    except Exception as error:  # of any type, on damaged files
        # Torch says first how to unpickle without restriction.
        reason = str(error).rpartition("WeightsUnpickler error:")[2].partition("Check the documentation")[0]
        told = " ".join(reason.split())[:200] or type(error).__name__
        sys.exit(f"{source} cannot be converted: {told}; load it where it was made, and save model.state_dict()")
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
                # TorchScript, which is run by torch's own interpreter and here not at all.
                return torch.jit.load(path, "cpu").state_dict()
        unknown: Iterable[str] = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
    else:
        unknown = _USUAL
    known: list[Any] = [(_stand_in(name), name) for name in unknown]
    # By its name alone, torch would take a file for one of safetensors.
    with torch.serialization.safe_globals(known), path.open("rb") as file:
        return torch.load(file, map_location="cpu", weights_only=True)


def _stand_in(name: str) -> type:
    """What is made in the place of an object of the class ``name``, or of what the function of that name gives."""
    if name.startswith("numpy"):
        # Their states are tuples, which are dropped.
        ignoring = {"__init__": lambda *_, **__: None, "__setstate__": lambda *_: None}
        return type("Left", (), ignoring)
    # The restricted unpickler fills in items and attributes of no other mapping.
    return type("Left", (), {"__new__": lambda *_, **__: OrderedDict()})


def _tensors(value: Any, names: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    """The tensors in nested containers and modules, with their names; a copy each, since they may share memory."""
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
