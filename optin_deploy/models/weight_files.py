"""Files of weights: what `--weights` names, the tensors that they hold, and what a file is that holds none."""

import json
import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from optin_deploy.errors import UserError
from optin_deploy.models.pickles import SUFFIXES as PICKLES
from optin_deploy.models.pickles import conversion, converted_name
from optin_deploy.utils.paths import regular

INDEX_SUFFIX = ".index.json"
# At the end of the name of one of several files.
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
LFS_POINTER = b"version https://git-lfs"
# What a name ends with -> what such a file is, and what to do.
_OTHERS = {
    ".onnx": "an exported ONNX graph: give the .safetensors file of the network that it was exported from",
    ".gguf": "quantized weights for llama.cpp: give the .safetensors file that they were made of",
    ".h5": "weights of TensorFlow: write them as .safetensors, by the names that PyTorch has for them",
    ".keras": "weights of TensorFlow: write them as .safetensors, by the names that PyTorch has for them",
    ".msgpack": "weights of JAX: write them as .safetensors, by the names that PyTorch has for them",
    ".tflite": "an exported graph of TensorFlow: give the .safetensors file of the network",
    ".engine": "a built engine: give the .safetensors file of the network that it was built from",
    ".pt2": "an exported program: write the network's state_dict() as .safetensors",
}


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights, and the part of it that is meant.

    Attributes:
        path: a ``.safetensors`` file, or an index of several.
        part: what the names of the tensors begin with, without the dot at its end; None where the user does not say.
    """

    path: Path
    part: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.part is None else f"{self.path}#{self.part}"


def named(given: str) -> WeightsFile:
    """The file that ``--weights FILE`` or ``--weights FILE#PART`` names."""
    path, mark, part = given.rpartition("#")
    if not mark or os.path.lexists(given):
        return WeightsFile(Path(given))
    return WeightsFile(Path(path), part)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in a file or index; no tensor is read. OSError, SafetensorError, ... where it cannot
    be read."""
    shapes = {}
    for each in shards(path):
        with safe_open(regular(each), framework="pt") as file:
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    return shapes


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Name -> tensor of a file or index.

    Raises:
        UserError: it holds no tensors that can be read; what it is instead is told where that shows.
    """
    check_suffix(path)
    each = path
    try:
        tensors: dict[str, Tensor] = {}
        for each in shards(path):
            tensors.update(load_file(regular(each)))
        return tensors
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
        told = kind_of(each) or " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"weights file {each} cannot be read: {told}") from error


def shards(path: Path) -> list[Path]:
    """The files that hold the tensors: ``path`` itself, or those beside it that an index names.

    Raises:
        UserError: the index cannot be read, names a file elsewhere, or one that is not there.
    """
    if path.suffix != ".json":
        return [path]
    try:
        names = set(json.loads(regular(path).read_text(encoding="utf-8"))["weight_map"].values())
        outside = next((name for name in names if Path(name).name != name), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as an index of weights") from error
    if outside is not None:
        raise UserError(f"{path} names {outside}: weights are read from beside it only")
    files = [path.parent / name for name in sorted(names)]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(
            f"{path} names {absent[0]}, which is not there ({len(files) - len(absent)} of {len(files)} files are): "
            "fetch the rest of the weights"
        )
    return files


def check_suffix(path: Path) -> None:
    """Raise UserError for a file whose name says that it is no safetensors file, and no index of some."""
    suffix = path.suffix.lower()
    if suffix == ".safetensors" or path.name.endswith(INDEX_SUFFIX):
        return
    if suffix in _OTHERS:
        raise UserError(f"--weights {path} is {_OTHERS[suffix]}")
    told = f"--weights {path}: give 'pretrained', 'random' or a .safetensors file (pickles are never loaded)"
    if suffix not in PICKLES:
        raise UserError(told)
    kind = _content(path)
    if kind is not None:
        raise UserError(f"--weights {path} is {kind}")
    raise UserError(f"{told}; convert it: {conversion(path, converted_name(path))}")


def kind_of(path: Path) -> str | None:
    """What a file is that is no safetensors file, and what to do, as a part of one line; None where that is unknown."""
    kind = _content(path)
    if kind is not None:
        return f"it is {kind}"
    try:
        with regular(path).open("rb") as file:
            head = file.read(2)
    except OSError:
        return None
    # Pickles begin with their protocol; files of torch.save are zip archives since 1.6.
    if not zipfile.is_zipfile(path) and not (head[:1] == b"\x80" and head[1:] in (b"\x02", b"\x03", b"\x04", b"\x05")):
        return None
    target = path.with_name(f"{path.stem}-converted.safetensors")
    return f"it is a pickle by another name (pickles are never loaded); convert it: {conversion(path, target)}"


def _content(path: Path) -> str | None:
    """What shows at the beginning of files that were not fetched whole."""
    try:
        with regular(path).open("rb") as file:
            head = file.read(64)
    except OSError:
        return None
    if not head:
        return "an empty file: fetch it again"
    if head.startswith(LFS_POINTER):
        return "a pointer of git-lfs and not the file itself: run `git lfs pull` where it was cloned"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page: fetch the file itself"
    return None


def shapes_if_readable(path: Path) -> Mapping[str, tuple[int, ...]] | None:
    """As `read_shapes`; None where the file cannot be read, which reading its tensors will tell."""
    if path.suffix.lower() != ".safetensors" and not path.name.endswith(INDEX_SUFFIX):
        return None
    try:
        return read_shapes(path)
    except (OSError, SafetensorError, ValueError, UserError):
        return None
