"""Files of weights: parse ``--weights``, read the tensors, and describe files that hold none."""

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

from optin_deploy.errors import UserError, one_line
from optin_deploy.models.pickles import SUFFIXES as PICKLES
from optin_deploy.models.pickles import conversion_command, converted_path
from optin_deploy.utils.paths import require_regular

INDEX_SUFFIX = ".index.json"
# The part of a shard's name after that of the whole.
SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
LFS_POINTER = b"version https://git-lfs"
# Suffix -> what the file is, and what to give instead; callers add in which form.
FOREIGN_FORMATS = {
    ".onnx": "an exported ONNX graph: give the network that it was exported from",
    ".gguf": "quantized weights for llama.cpp: give the network that they were made of",
    ".h5": "weights of TensorFlow: give those of PyTorch",
    ".keras": "weights of TensorFlow: give those of PyTorch",
    ".msgpack": "weights of JAX: give those of PyTorch",
    ".tflite": "an exported graph of TensorFlow: give the network that it was exported from",
    ".engine": "a built engine: give the network that it was built from",
    ".pt2": "an exported program: give the network that it was exported from",
}


@dataclass(frozen=True)
class WeightsFile:
    """A file of weights, and which part of it to load.

    Attributes:
        path: a ``.safetensors`` file, or an index of several.
        part: the prefix of the tensors' names, without the dot at its end; None if the user gave none.
    """

    path: Path
    part: str | None = None

    def __str__(self) -> str:
        return str(self.path) if self.part is None else f"{self.path}#{self.part}"


def parse_weights(option: str) -> WeightsFile:
    """Parse ``--weights FILE`` or ``--weights FILE#PART``."""
    path, mark, part = option.rpartition("#")
    if not mark or os.path.lexists(option):
        return WeightsFile(Path(option))
    return WeightsFile(Path(path), part)


def read_shapes(path: Path) -> dict[str, tuple[int, ...]]:
    """Return name -> shape of the tensors in a file or index, without reading the tensors.

    Raises:
        OSError, SafetensorError, ValueError, UserError: it cannot be read.
    """
    shapes = {}
    for shard in shards(path):
        with safe_open(require_regular(shard), framework="pt") as file:
            shapes.update({name: tuple(file.get_slice(name).get_shape()) for name in file.keys()})  # noqa: SIM118
    return shapes


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return name -> tensor of a file or index.

    Raises:
        UserError: the tensors cannot be read; the message names the kind of file if it is recognised.
    """
    check_suffix(path)
    tensors: dict[str, Tensor] = {}
    for shard in shards(path):
        try:
            tensors.update(load_file(require_regular(shard)))
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError, MemoryError) as error:
            reason = _describe_unreadable(shard) or one_line(error)
            raise UserError(f"weights file {shard} cannot be read: {reason}") from error
    return tensors


def shards(path: Path) -> list[Path]:
    """Return the files that hold the tensors: ``path`` itself, or the files in its directory that an index names.

    Raises:
        UserError: the index cannot be read, or names a file in another directory or one that does not exist.
    """
    if path.suffix != ".json":
        return [path]
    try:
        names = set(json.loads(require_regular(path).read_text(encoding="utf-8"))["weight_map"].values())
        outside = next((name for name in names if Path(name).name != name), None)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as an index of weights") from error
    if outside is not None:
        raise UserError(f"{path} names {outside}: weights are read from the same directory only")
    files = [path.parent / name for name in sorted(names)]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise UserError(
            f"{path} names {absent[0]}, which does not exist ({len(files) - len(absent)} of {len(files)} files do): "
            "fetch the rest of the weights"
        )
    return files


def check_suffix(path: Path) -> None:
    """Raise UserError if the suffix is neither that of a safetensors file nor that of an index."""
    suffix = path.suffix.lower()
    if suffix == ".safetensors" or path.name.endswith(INDEX_SUFFIX):
        return
    if suffix in FOREIGN_FORMATS:
        raise UserError(f"--weights {path} is {FOREIGN_FORMATS[suffix]}, as a .safetensors file")
    message = f"--weights {path}: give 'pretrained', 'random' or a .safetensors file (pickles are never loaded)"
    if suffix not in PICKLES:
        raise UserError(message)
    if kind := _describe_incomplete(path):
        raise UserError(f"--weights {path} is {kind}")
    raise UserError(f"{message}; convert it: {conversion_command(path, converted_path(path))}")


def _describe_unreadable(path: Path) -> str | None:
    """Describe a file that is not a safetensors file, and what to do; None if its kind is unknown."""
    if kind := _describe_incomplete(path):
        return f"it is {kind}"
    head = _first_bytes(path)
    if head is None:
        return None
    # Pickles begin with their protocol, 2 to 5; files of torch.save are zip archives since 1.6.
    if not zipfile.is_zipfile(path) and not re.match(rb"\x80[\x02-\x05]", head):
        return None
    target = path.with_name(f"{path.stem}-converted.safetensors")
    return f"it is a pickle by another name (pickles are never loaded); convert it: {conversion_command(path, target)}"


def _first_bytes(path: Path) -> bytes | None:
    try:
        with require_regular(path).open("rb") as file:
            return file.read(64)
    except OSError:
        return None


def _describe_incomplete(path: Path) -> str | None:
    """Describe a file that was not downloaded completely, by its first bytes; None for other files."""
    head = _first_bytes(path)
    if head is None:
        return None
    if not head:
        return "an empty file: fetch it again"
    if head.startswith(LFS_POINTER):
        return "a pointer of git-lfs and not the file itself: run `git lfs pull` where it was cloned"
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        return "a web page: fetch the file itself"
    return None


def shapes_if_readable(path: Path) -> Mapping[str, tuple[int, ...]] | None:
    """Return the same as `read_shapes`, or None if the file cannot be read; reading its tensors reports that."""
    if path.suffix.lower() != ".safetensors" and not path.name.endswith(INDEX_SUFFIX):
        return None
    try:
        return read_shapes(path)
    except (OSError, SafetensorError, ValueError, UserError):
        return None
