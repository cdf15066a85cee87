"""Image files in folders: list, check and read them."""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, features

from optin_deploy.data.preprocessing import (
    IMAGE_CHANNELS,
    MOST_PIXELS,
    ImagePreprocessing,
    ProcessorPreprocessing,
    VisionPreprocessing,
    shape_mismatch,
)
from optin_deploy.errors import UserError, one_line
from optin_deploy.network import Network
from optin_deploy.nn.batches import Batch
from optin_deploy.utils.paths import is_hidden

logger = logging.getLogger(__name__)

_AVIF = frozenset({".avif"} if features.check("avif") else ())
IMAGE_SUFFIXES = _AVIF | {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm", ".pbm")
}
# Modes that Pillow converts to 8 bits per channel without loss; it clips deeper ones at 255.
_MODES = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV"})
_DEEP = {"I": "integers of 32 bits", "F": "floating-point numbers"}
# The EXIF tag of the orientation, its values for upright images, and those for images turned by 90 degrees.
_ORIENTATION, _UPRIGHT, _TURNED = 0x0112, (0, 1), (5, 6, 7, 8)
# Samples, channels, height and width.
_IMAGE_AXES = 4


def image_files(path: Path) -> list[Path]:
    """Return all image files below the folder ``path``, sorted by path.

    Links are followed. Hidden files and folders are skipped: editors and archivers leave copies there. Files with other
    suffixes are skipped with a warning.

    Raises:
        UserError: ``path`` is not a folder, or holds no images.
    """
    if not path.is_dir():
        raise UserError(
            f"{path} is not a folder: a vision network calibrates on a folder of images, .npz or .safetensors"
        )
    entries = list(_walk(path, frozenset()))
    files = sorted(file for file in entries if file.suffix.lower() in IMAGE_SUFFIXES)
    suffixes = (file.suffix.lower() or "without suffix" for file in entries)
    others = Counter(suffix for suffix in suffixes if suffix not in IMAGE_SUFFIXES)
    counts = ", ".join(f"{count} {suffix[:20]}" for suffix, count in others.most_common(8))
    if not files:
        raise UserError(
            f"{path} holds no images ({', '.join(sorted(IMAGE_SUFFIXES))})"
            + (f", but other files: {counts}" if counts else "")
        )
    if others:
        logger.warning("%s: %d files are skipped, which are not images: %s", path, others.total(), counts)
    return files


def images_in_folders(path: Path) -> list[Path]:
    """Return the image files in folders of ``path``; UserError if there are none. Other images are skipped."""
    files = image_files(path)
    inside = [file for file in files if file.parent != path]
    if not inside:
        raise UserError(f"{path} has no class folders: one folder of images per class is needed")
    if len(inside) < len(files):
        logger.warning("%s: %d images are in no class folder and are skipped", path, len(files) - len(inside))
    return inside


def _walk(folder: Path, parents: frozenset[tuple[int, int]]) -> Iterator[Path]:
    """Yield the files in ``folder`` and below.

    Links to one of the ``parents`` (device and inode of the folders above) are not followed.
    """
    try:
        status, entries = folder.stat(), list(folder.iterdir())
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read: {error.strerror}") from error
    identity = (status.st_dev, status.st_ino)
    if identity in parents:
        logger.warning("%s links to a folder that contains it and is not followed", folder)
        return
    for entry in entries:
        if is_hidden(entry.name):
            continue
        # A folder with an image's suffix is reported as an image that cannot be read.
        if entry.is_dir() and entry.suffix.lower() not in IMAGE_SUFFIXES:
            yield from _walk(entry, parents | {identity})
        else:
            yield entry


def read_images(files: Sequence[Path]) -> list[Image.Image]:
    """Return the images unchanged; UserError for one that cannot be read or has more than 8 bits per channel."""
    images = []
    for file in files:
        with _open(file) as image:
            _check_mode(file, image)
            image.load()
            images.append(image.copy())
    return images


def check_images(files: Sequence[Path], preprocessing: VisionPreprocessing) -> None:
    """Check images that will be read later.

    Raises:
        UserError: an image cannot be read completely, has more than 8 bits per channel, or is too large to be read or
            resized; or the prepared images have different shapes.
    """
    turned, animated = 0, 0
    shapes: dict[tuple[int, int], Path] = {}
    for file in files:
        with _open(file) as image:
            _check_mode(file, image)
            _check_resized(file, image, preprocessing)
            if isinstance(preprocessing, ProcessorPreprocessing):
                shapes.setdefault(_upright_size(image), file)
            turned += _orientation(image) not in _UPRIGHT
            animated += getattr(image, "is_animated", False)
            # The whole JPEG is read, but decoded at an eighth of its size, which is faster.
            image.draft("RGB", (1, 1))
            image.load()
    if isinstance(preprocessing, ProcessorPreprocessing) and not preprocessing.fixed:
        _check_one_shape(shapes, preprocessing)
    if turned and isinstance(preprocessing, ImagePreprocessing):
        logger.warning("%d images have an EXIF orientation, which is ignored, as in timm's pipeline", turned)
    if animated:
        logger.warning("%d files hold several images or pages: the first one of each is used", animated)


def check_image_input(network: Network, preprocessing: VisionPreprocessing) -> None:
    """Raise UserError if the preprocessing of ``network`` makes images that it does not take."""
    sample = network.inputs.get(preprocessing.input_name)
    if sample is None:
        raise UserError(
            f"the preprocessing makes input {preprocessing.input_name!r}, the network takes {', '.join(network.inputs)}"
        )
    if sample.dim() != 4 or sample.shape[1] != preprocessing.channels:
        raise UserError(
            f"the network takes {preprocessing.input_name} of shape {tuple(sample.shape[1:])}, its preprocessing makes "
            f"images of {preprocessing.channels} channels: calibrate it on tensors (.npz, .safetensors)"
        )


def channels_error(network: Network) -> str | None:
    """Return why image files cannot be read for ``network``, as the beginning of a message; None if they can."""
    for name, sample in network.inputs.items():
        if network.source.library != "custom" and sample.dim() == _IMAGE_AXES and sample.shape[1] != IMAGE_CHANNELS:
            shape = ", ".join(map(str, sample.shape[1:]))
            return (
                f"{network.source.name} takes images of {sample.shape[1]} channels, and image files are read with "
                f"{IMAGE_CHANNELS} channels: prepare them as a tensor {name!r} of shape (samples, {shape})"
            )
    return None


def image_loader(preprocessing: VisionPreprocessing) -> Callable[[Sequence[Path]], Batch]:
    """Return a function from image files to a batch of inputs; files are read when it is called."""

    def load(files: Sequence[Path]) -> Batch:
        for file in files:
            with _open(file) as image:
                _check_resized(file, image, preprocessing)
        return preprocessing(read_images(files))

    return load


def _check_mode(file: Path, image: Image.Image) -> None:
    """Raise UserError for an image that would be clipped to 8 bits per channel."""
    if image.mode in _MODES:
        return
    holds = "integers of 16 bits" if image.mode.startswith("I;16") else _DEEP.get(image.mode, f"mode {image.mode}")
    raise UserError(
        f"image {file} holds {holds}, which 8-bit pipelines would clip at 255: convert it to 8-bit colors or grey, "
        "as in training, or calibrate on tensors"
    )


def _check_resized(file: Path, image: Image.Image, preprocessing: VisionPreprocessing) -> None:
    """Raise UserError for a very elongated image: it would be huge after resizing, before the crop."""
    width, height = image.size
    resized_width, resized_height = preprocessing.resized_size(width, height)
    if resized_width * resized_height > MOST_PIXELS or min(resized_width, resized_height) < 1:
        raise UserError(
            f"image {file} is too elongated: its {width} x {height} pixels would be resized to {resized_width} x "
            f"{resized_height}; crop it or remove it"
        )


def _check_one_shape(sizes: Mapping[tuple[int, int], Path], preprocessing: ProcessorPreprocessing) -> None:
    """Raise UserError unless images of all ``sizes`` ((width, height) -> an example file) are prepared to one shape."""
    first: tuple[int, int] | None = None
    for size, file in sizes.items():
        shape = preprocessing.shape_of(*size)
        first = first or shape
        if shape != first:
            raise UserError(shape_mismatch(first, shape, f"as {file}"))


def _orientation(image: Image.Image) -> int:
    return int(image.getexif().get(_ORIENTATION, 1) or 1)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    width, height = image.size
    return (height, width) if _orientation(image) in _TURNED else (width, height)


@contextmanager
def _open(file: Path) -> Iterator[Image.Image]:
    try:
        # Opening a pipe would block.
        if not file.is_file():
            raise OSError("not a file")
        with Image.open(file) as image:
            yield image
    except UserError:
        raise
    except Exception as error:  # parsers of image formats raise errors of any type
        raise UserError(f"image {file} cannot be read: remove it or repair it ({one_line(error, 120)})") from error
