"""Samples in files, read and checked: pictures and tensors."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.places import hidden, regular
from optin_deploy.preprocessing import MOST_PIXELS, ImagePreprocessing

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
# What tensors are made of that the network's own type can be made of: no 8-bit floats, no complex numbers.
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_READ = (torch.float16, torch.bfloat16, torch.float32, torch.float64, *_INTEGERS, torch.bool)


def image_files(path: Path) -> list[Path]:
    """All pictures below the folder ``path`` in the order of their names; UserError when there are none.

    Hidden ones are left out, and those in hidden folders: editors and archivers put copies there.
    """
    if not path.is_dir():
        raise UserError(
            f"{path} is not a folder: a vision network calibrates on a folder of images, .npz or .safetensors"
        )
    found = (p for p in path.rglob("*") if p.suffix.lower() in IMAGE_SUFFIXES)
    files = sorted(p for p in found if not any(map(hidden, p.relative_to(path).parts)))
    if not files:
        raise UserError(f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})")
    return files


def read_images(files: Sequence[Path]) -> list[Image.Image]:
    """The pictures in RGB; UserError for one that cannot be read."""
    images = []
    for file in files:
        with _opened(file) as image:
            images.append(image.convert("RGB"))
    return images


def check_images(files: Sequence[Path], preprocessing: ImagePreprocessing) -> None:
    """Raise UserError for a file that cannot be read as a picture to its end, or is too large to be read or resized."""
    for file in files:
        with _opened(file) as image:
            _check_resized(file, image, preprocessing)
            # Of a JPEG all is read, but an eighth of the size made of it: so many pictures take less time.
            image.draft("RGB", (1, 1))
            image.load()


def _check_resized(file: Path, image: Image.Image, preprocessing: ImagePreprocessing) -> None:
    """Raise UserError for a picture too elongated: all of it is resized before it is cropped."""
    width, height = image.size
    resized_width, resized_height = preprocessing.resized(width, height)
    if resized_width * resized_height > MOST_PIXELS or min(resized_width, resized_height) < 1:
        raise UserError(
            f"image {file} is too elongated: its {width} x {height} pixels would be resized to {resized_width} x "
            f"{resized_height}; crop it or remove it"
        )


def reading(preprocessing: ImagePreprocessing) -> Callable[[list[Path]], dict[str, Tensor]]:
    """What makes a batch of inputs of picture files, each read when it is its turn."""

    def inputs(files: list[Path]) -> dict[str, Tensor]:
        for file in files:
            with _opened(file) as image:
                _check_resized(file, image, preprocessing)
        return preprocessing(read_images(files))

    return inputs


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    try:
        # Opening a pipe would wait for somebody to write to it.
        if not file.is_file():
            raise OSError("no file")
        with Image.open(file) as image:
            yield image
    except Exception as error:  # of any type: whatever the parser of the format meets
        told = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"image {file} cannot be read: remove it or repair it ({told})") from error


def read_tensors(network: Network, path: Path) -> dict[str, Tensor]:
    """The network's inputs by name ``(samples, …)``; UserError for a file that cannot be read or does not fit."""
    try:
        if path.suffix.lower() == ".npz":
            # np.load would take a pickle or a single array by the same name.
            with regular(path).open("rb") as file, np.lib.npyio.NpzFile(file, allow_pickle=False) as arrays:
                tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        else:
            tensors = load_file(regular(path))
    except Exception as error:  # zip files, numpy's headers and safetensors each have their own types
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"calibration tensors {path} cannot be read: {told}") from error
    _check_tensors(network, path, tensors)
    return {name: tensors[name].to(sample.dtype) for name, sample in network.inputs.items()}


def selecting(tensors: Mapping[str, Tensor]) -> Callable[[list[int]], dict[str, Tensor]]:
    """What makes a batch of inputs of rows of ``tensors``."""
    return lambda rows: {name: tensor[rows] for name, tensor in tensors.items()}


def _check_tensors(network: Network, path: Path, tensors: Mapping[str, Tensor]) -> None:
    rows = {len(t) if t.dim() else 0 for t in tensors.values()}
    for name, sample in network.inputs.items():
        if name not in tensors:
            raise UserError(f"{path} has no tensor {name!r}; it has {', '.join(tensors) or 'none'}")
        given, first = tuple(tensors[name].shape), 2 if name in network.sequence_inputs else 1
        if len(given) != sample.dim() or given[first:] != tuple(sample.shape[first:]):
            wanted = ", ".join(["samples", "sequence"][:first] + [str(n) for n in sample.shape[first:]])
            raise UserError(f"{path}: {name} has shape {given}, the network takes ({wanted})")
        if 0 in given[1:]:
            raise UserError(f"{path}: {name} has shape {given}: give sequences of at least one token")
        if tensors[name].dtype not in _READ:
            read = ", ".join(_named(dtype) for dtype in _READ)
            raise UserError(f"{path}: {name} holds {_named(tensors[name].dtype)}; convert it to what is read: {read}")
        if tensors[name].is_floating_point() and not sample.is_floating_point():
            raise UserError(f"{path}: {name} holds {tensors[name].dtype}, the network takes integers")
        if not torch.isfinite(tensors[name]).all():
            raise UserError(f"{path}: {name} holds NaN or infinity")
    _check_mask(network, path, tensors)
    lengths = {name: tensors[name].shape[1] for name in network.sequence_inputs}
    if len(set(lengths.values())) > 1:
        raise UserError(f"{path}: the sequences have different lengths: {lengths}")
    if len(rows) != 1 or not min(rows):
        raise UserError(
            f"{path}: tensors need one first axis of samples, at least one long; found lengths {sorted(rows)}"
        )


def _check_mask(network: Network, path: Path, tensors: Mapping[str, Tensor]) -> None:
    """A sample that is padding alone gives NaN or nothing, and with it all that is summed over samples."""
    if network.token_mask is None:
        return
    padding = (tensors[network.token_mask] == 0).flatten(1).all(1).nonzero().flatten().tolist()
    if padding:
        raise UserError(
            f"{path}: {network.token_mask} is 0 everywhere in {len(padding)} of its samples, the first of them number "
            f"{padding[0]} from 0: remove them"
        )


def _named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
