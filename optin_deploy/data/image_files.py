"""Pictures in folders: found, read, and checked."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, features
from torch import Tensor

from optin_deploy.data.preprocessing import (
    MOST_PIXELS,
    ImagePreprocessing,
    PicturePreprocessing,
    ProcessorPreprocessing,
    different_shapes,
)
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.utils.paths import hidden

logger = logging.getLogger(__name__)

_AVIF = frozenset({".avif"} if features.check("avif") else ())
IMAGE_SUFFIXES = _AVIF | {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
}
# What Pillow makes colours of 8 bits of, as libraries do; of deeper ones it would cut off all above 255.
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})
_DEEP = {"I": "integers of 32 bits", "F": "floating-point numbers"}
_ORIENTATION, _UPRIGHT, _LYING = 0x0112, (0, 1), (5, 6, 7, 8)


def image_files(path: Path) -> list[Path]:
    """All pictures below the folder ``path`` in the order of their names; UserError when there are none.

    Links are followed. Hidden files and folders are left out: editors and archivers put copies there. Files of other
    suffixes are left out, and counted in the log.
    """
    if not path.is_dir():
        raise UserError(
            f"{path} is not a folder: a vision network calibrates on a folder of images, .npz or .safetensors"
        )
    found = list(_walked(path, frozenset()))
    files = sorted(file for file in found if file.suffix.lower() in IMAGE_SUFFIXES)
    suffixes = (file.suffix.lower() or "without suffix" for file in found)
    others = Counter(suffix for suffix in suffixes if suffix not in IMAGE_SUFFIXES)
    told = ", ".join(f"{count} {suffix[:20]}" for suffix, count in others.most_common(8))
    if not files:
        raise UserError(
            f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})"
            + (f", but other files: {told}" if told else "")
        )
    if others:
        logger.warning("%s: %d files are no images that are read: %s", path, others.total(), told)
    return files


def images_in_folders(path: Path) -> list[Path]:
    """The pictures that stand in folders in ``path``; UserError when there are none, a warning for those beside."""
    files = image_files(path)
    inside = [file for file in files if file.parent != path]
    if not inside:
        raise UserError(f"{path} has no class folders: one folder of images per class is needed")
    if len(inside) < len(files):
        logger.warning("%s: %d images stand in no class folder and are left out", path, len(files) - len(inside))
    return inside


def _walked(folder: Path, above: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """Files in ``folder`` and below; a link to a folder that it stands in (``above``, by device and inode) is not
    followed."""
    try:
        status, entries = folder.stat(), list(folder.iterdir())
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read: {error.strerror}") from error
    identity = (status.st_dev, status.st_ino)
    if identity in above:
        logger.warning("%s leads back to a folder that it stands in: it is not followed", folder)
        return
    for entry in entries:
        if hidden(entry.name):
            continue
        # A folder that is called as a picture is told as one that cannot be read.
        if entry.is_dir() and entry.suffix.lower() not in IMAGE_SUFFIXES:
            yield from _walked(entry, above | {identity})
        else:
            yield entry


def read_images(files: Sequence[Path]) -> list[Image.Image]:
    """The pictures as they are; UserError for one that cannot be read, or holds no colours of 8 bits."""
    images = []
    for file in files:
        with _opened(file) as image:
            _check_mode(file, image)
            image.load()
            images.append(image.copy())
    return images


def check_images(files: Sequence[Path], preprocessing: PicturePreprocessing) -> None:
    """Look at pictures that will be read later.

    Raises:
        UserError: one cannot be read to its end, holds no colours of 8 bits, or is too large to be read or resized; or
            they come out in different shapes.
    """
    turned, several = 0, 0
    shapes: dict[tuple[int, int], Path] = {}
    for file in files:
        with _opened(file) as image:
            _check_mode(file, image)
            _check_resized(file, image, preprocessing)
            if isinstance(preprocessing, ProcessorPreprocessing):
                shapes.setdefault(_upright_size(image), file)
            turned += _orientation(image) not in _UPRIGHT
            several += getattr(image, "is_animated", False)
            # Of a JPEG all is read, but an eighth of the size made of it: so many pictures take less time.
            image.draft("RGB", (1, 1))
            image.load()
    if isinstance(preprocessing, ProcessorPreprocessing) and not preprocessing.fixed:
        _check_one_shape(shapes, preprocessing)
    if turned and isinstance(preprocessing, ImagePreprocessing):
        logger.warning("%d pictures have an EXIF orientation, which is not applied: timm's pipeline does not", turned)
    if several:
        logger.warning("%d files hold several pictures or pages: the first of each is taken", several)


def check_fit(network: Network) -> None:
    """Raise UserError where what ``network`` prepares of pictures is not what it takes."""
    preprocessing: PicturePreprocessing = network.preprocessing
    sample = network.inputs.get(preprocessing.input_name)
    if sample is None:
        raise UserError(
            f"the preprocessing makes input {preprocessing.input_name!r}, the network takes {', '.join(network.inputs)}"
        )
    if sample.dim() != 4 or sample.shape[1] != preprocessing.channels:
        raise UserError(
            f"the network takes {preprocessing.input_name} of shape {tuple(sample.shape[1:])}, its preprocessing makes "
            f"pictures of {preprocessing.channels} channels: calibrate it on tensors (.npz, .safetensors)"
        )


def reading(preprocessing: PicturePreprocessing) -> Callable[[list[Path]], dict[str, Tensor]]:
    """What makes a batch of inputs of picture files, each read when it is its turn."""

    def inputs(files: list[Path]) -> dict[str, Tensor]:
        for file in files:
            with _opened(file) as image:
                _check_resized(file, image, preprocessing)
        return preprocessing(read_images(files))

    return inputs


def _check_mode(file: Path, image: Image.Image) -> None:
    """Raise UserError for a picture that libraries would not read as it is meant."""
    if image.mode in _MODES:
        return
    holds = "integers of 16 bits" if image.mode.startswith("I;16") else _DEEP.get(image.mode, f"mode {image.mode}")
    raise UserError(
        f"image {file} holds {holds}, of which pipelines of 8 bits would cut off what is above 255: convert it to "
        "colours or grey of 8 bits, as in training, or calibrate on tensors"
    )


def _check_resized(file: Path, image: Image.Image, preprocessing: PicturePreprocessing) -> None:
    """Raise UserError for a picture too elongated: all of it is resized before it is cropped."""
    width, height = image.size
    resized_width, resized_height = preprocessing.resized(width, height)
    if resized_width * resized_height > MOST_PIXELS or min(resized_width, resized_height) < 1:
        raise UserError(
            f"image {file} is too elongated: its {width} x {height} pixels would be resized to {resized_width} x "
            f"{resized_height}; crop it or remove it"
        )


def _check_one_shape(sizes: Mapping[tuple[int, int], Path], preprocessing: ProcessorPreprocessing) -> None:
    """Raise UserError unless pictures of all ``sizes`` (width, height -> a file of it) come out in one shape."""
    first: tuple[int, int] | None = None
    for size, file in sizes.items():
        shape = preprocessing.shape_of(*size)
        first = first or shape
        if shape != first:
            raise UserError(different_shapes(first, shape, f"as {file}"))


def _orientation(image: Image.Image) -> int:
    return int(image.getexif().get(_ORIENTATION, 1) or 1)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _orientation(image) in _LYING else (width, height)


@contextmanager
def _opened(file: Path) -> Iterator[Image.Image]:
    try:
        # Opening a pipe would wait for somebody to write to it.
        if not file.is_file():
            raise OSError("no file")
        with Image.open(file) as image:
            yield image
    except UserError:
        raise
    except Exception as error:  # of any type: whatever the parser of the format meets
        told = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"image {file} cannot be read: remove it or repair it ({told})") from error
