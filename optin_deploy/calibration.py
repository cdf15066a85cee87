"""Unlabelled samples for scores and repair: from files, or a small built-in set."""

import csv
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from optin_deploy.errors import UserError
from optin_deploy.files import regular
from optin_deploy.labels import class_count, class_number, class_numbers, hidden
from optin_deploy.network import Network
from optin_deploy.preprocessing import MOST_PIXELS, ImagePreprocessing, TextPreprocessing
from optin_deploy.shelf import Shelf

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff"})
DEFAULT_SAMPLES = {"image": 128, "text": 1024, "tensor": 1024}
_BATCH_SIZE = {"image": 16, "text": 32, "tensor": 32}
# Samples kept from scores and repair, on which the pruned network is compared with the dense one.
_HELD_OUT = 32
# What tensors are made of that the network's own type can be made of: no 8-bit floats, no complex numbers.
_INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64)
_READ = (torch.float16, torch.bfloat16, torch.float32, torch.float64, *_INTEGERS, torch.bool)


@dataclass(frozen=True)
class Calibration:
    """Batches by input name, others held out for comparison, where they came from, and a hash of their content.

    Many batches are not all in memory (see ``shelf``): take one after the other.
    """

    batches: Sequence[dict[str, Tensor]]
    held_out: tuple[dict[str, Tensor], ...]
    source: str
    builtin: bool
    samples: int
    digest: str
    labels: tuple[Tensor, ...] | None = None

    def __repr__(self) -> str:
        held_out = sum(len(next(iter(batch.values()))) for batch in self.held_out)
        count = f"{self.samples} samples in {len(self.batches)} batches"
        return f"<Calibration on {self.source}: {count}, {held_out} held out>"


def load_calibration(
    network: Network,
    path: Path | None,
    *,
    column: str | None = None,
    labels: str | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> Calibration:
    """Samples for ``network``.

    Args:
        path: a folder of images, a text file with one text a line, a CSV or TSV file, ready tensors by input name
            (``.npz``, ``.safetensors``; first axis the sample), or None for the built-in set.
        column: of a CSV or TSV file: a name of its header line, or a number counting from 1 in a file without header;
            several, separated by commas, add up.
        labels: where class labels are, for a criterion that needs them: a column of the table (named like ``column``),
            or "folders" for images in one folder per class (see `evaluation.load_dataset`).
        samples: at most this many, drawn at random; 128 images, 1,024 texts or tensors when None.

    Raises:
        UserError: nothing usable at ``path``, or it does not suit the network.
    """
    if samples is not None and samples < 1:
        raise UserError(f"--calibration-samples {samples}: at least 1 is needed")
    if path is not None and not path.exists():
        raise UserError(f"calibration data {path} does not exist")
    preprocessing = network.preprocessing
    if column is not None and not _is_table(path):
        raise UserError(f"--calibration-column {column}: only a CSV or TSV file given as --calibration has columns")
    if labels is not None:
        items, classes, preprocess, kind = _labelled(network, path, column, labels)
        return _accepted(network, _calibration(items, preprocess, path, kind, samples, seed, classes))
    if path is not None and path.suffix.lower() in (".npz", ".safetensors"):
        tensors = _read_tensors(network, path)
        rows = range(len(next(iter(tensors.values()))))
        return _accepted(network, _calibration(rows, _selecting(tensors), path, "tensor", samples, seed))
    if isinstance(preprocessing, ImagePreprocessing):
        if path is not None:
            return _calibration(image_files(path), _reading(preprocessing), path, "image", samples, seed)
        images = builtin_images((samples or DEFAULT_SAMPLES["image"]) + _HELD_OUT, seed)
        return _calibration(images, preprocessing, None, "image", samples, seed)
    if isinstance(preprocessing, TextPreprocessing):
        texts = builtin_texts() if path is None else read_texts(path, column)
        check_texts(texts, preprocessing, path)
        return _accepted(network, _calibration(texts, preprocessing, path, "text", samples, seed))
    raise UserError("a module of your own without preprocessing needs tensors: --calibration FILE.npz or .safetensors")


def _labelled(
    network: Network, path: Path | None, column: str | None, labels: str
) -> tuple[Sequence[Any], list[int], Callable[[list[Any]], dict[str, Tensor]], str]:
    """Items, their class numbers, what makes inputs of them, and of what kind they are."""
    preprocessing = network.preprocessing
    if network.logits is None:
        raise UserError(f"--calibration-labels {labels}: the network has no class logits")
    if isinstance(preprocessing, ImagePreprocessing) and path is not None:
        if labels != "folders":
            raise UserError(f"--calibration-labels {labels}: images are labelled by their class folders: say `folders`")
        files = [file for file in image_files(path) if file.parent != path]
        if not files:
            raise UserError(f"{path} has no class folders: one folder of images per class is needed")
        folders = [file.relative_to(path).parts[0] for file in files]
        numbers = class_numbers(network, path, sorted(set(folders)))
        return files, [numbers[f] for f in folders], _reading(preprocessing), "image"
    if isinstance(preprocessing, TextPreprocessing) and path is not None and _is_table(path):
        if column is None or "," in column:
            raise UserError(f"--calibration-labels {labels}: name the one text column with --calibration-column")
        rows, count = table_columns(path, [column, labels]), class_count(network)
        try:
            of_text = {t.strip(): class_number(network, c.strip(), count) for t, c in rows if t.strip()}
        except ValueError as error:
            raise UserError(f"{path}: {error}") from error
        check_texts(list(of_text), preprocessing, path)
        return list(of_text), list(of_text.values()), preprocessing, "text"
    raise UserError(f"--calibration-labels {labels}: only a table of texts and a folder of class folders have labels")


def from_batches(batches: Sequence[Mapping[str, Tensor]], labels: Sequence[Tensor] | None = None) -> Calibration:
    """Calibration on ready batches of the user's own, by input name; the last one is held out. Two at least.

    Args:
        labels: class numbers for each batch, for a criterion that needs them.
    """
    if len(batches) < 2:
        raise UserError(f"{len(batches)} calibration batches: at least 2 are needed, one of them to compare on")
    if labels is not None and len(labels) != len(batches):
        raise UserError(f"labels for {len(labels)} batches, {len(batches)} batches given")
    own, digest = [dict(batch) for batch in batches], hashlib.sha256()
    for batch in (*own, *({"labels": each} for each in labels or ())):
        _add(digest, batch)
    return Calibration(
        batches=tuple(own[:-1]),
        held_out=tuple(own[-1:]),
        source="tensors given by the caller",
        builtin=False,
        samples=sum(len(next(iter(batch.values()))) for batch in own[:-1]),
        digest=digest.hexdigest(),
        labels=None if labels is None else tuple(labels[: len(own) - 1]),
    )


def _calibration(
    items: Sequence[Any],
    preprocess: Callable[[list[Any]], dict[str, Tensor]],
    path: Path | None,
    kind: str,
    samples: int | None,
    seed: int,
    classes: Sequence[int] | None = None,
) -> Calibration:
    """Draw from ``items`` without replacement; an eighth of them is held out where there are few."""
    if len(items) < 2:
        raise UserError(f"{path} holds {len(items)} sample: at least 2 are needed, one of them to compare on")
    count = samples or DEFAULT_SAMPLES[kind]
    order = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).tolist()
    # A plentiful set is cut to what is asked for; of a small one, an eighth is held out.
    plenty = len(items) >= count + _HELD_OUT
    held = _HELD_OUT if plenty else max(1, len(items) // 8)
    used = order[: min(count, len(items) - held)]
    parts, digest = _parts(items, used, kind, seed), hashlib.sha256()
    batches: Shelf[dict[str, Tensor]] = Shelf()
    for part in parts:
        batches.append(preprocess([items[i] for i in part]))
        _add(digest, batches[-1])
    held_out = [
        preprocess([items[i] for i in part]) for part in _split(order[len(used) : len(used) + held], _BATCH_SIZE[kind])
    ]
    labels = None if classes is None else tuple(torch.tensor([classes[i] for i in part]) for part in parts)
    for batch in (*held_out, *({"labels": each} for each in labels or ())):
        _add(digest, batch)
    return Calibration(
        batches=batches,
        held_out=tuple(held_out),
        source="built-in samples" if path is None else str(path),
        builtin=path is None,
        samples=len(used),
        digest=digest.hexdigest(),
        labels=labels,
    )


def _accepted(network: Network, calibration: Calibration) -> Calibration:
    """``calibration`` as it is; UserError when the network fails on the samples with the extremes of an input."""
    for name, sign in ((n, sign) for n, t in network.inputs.items() if not t.is_floating_point() for sign in (1, -1)):
        batches = chain(calibration.batches, calibration.held_out)
        batch = max(batches, key=lambda b: int((sign * b[name]).max()))
        row = int((sign * batch[name]).flatten(1).amax(1).argmax())
        sample = {n: t[row : row + 1] for n, t in batch.items()}
        try:
            with torch.inference_mode():
                network.forward(sample)
        except (RuntimeError, IndexError, ValueError) as error:
            values, shape = sample[name], tuple(sample[name].shape)
            raise UserError(
                f"calibration on {calibration.source}: the network fails on {name} of shape {shape} with values from "
                f"{values.min()} to {values.max()}: {' '.join(str(error).split())[:200]}"
            ) from error
    return calibration


def _is_table(path: Path | None) -> bool:
    return path is not None and path.suffix.lower() in (".csv", ".tsv")


def _parts(items: Sequence[Any], used: list[int], kind: str, seed: int) -> list[list[int]]:
    """Indices batch by batch. Texts of like length share a batch, so that little is padding; batches come in random
    order, so that the first ones are as good a sample as any."""
    if kind != "text":
        return _split(used, _BATCH_SIZE[kind])
    parts = _split(sorted(used, key=lambda i: len(items[i])), _BATCH_SIZE[kind])
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [parts[i] for i in order]


def _split(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


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


def _reading(preprocessing: ImagePreprocessing) -> Callable[[list[Path]], dict[str, Tensor]]:
    def inputs(files: list[Path]) -> dict[str, Tensor]:
        for file in files:
            with _opened(file) as image:
                _check_resized(file, image, preprocessing)
        return preprocessing(read_images(files))

    return inputs


def check_texts(texts: Sequence[str], preprocessing: TextPreprocessing, path: Path | None) -> None:
    """Raise UserError for a text without tokens: no network takes a sequence of length 0."""
    bare = preprocessing.without_tokens(texts)
    if bare:
        raise UserError(
            f"{path}: {len(bare)} of {len(texts)} texts give no tokens, the first of them {bare[0][:40]!r}: remove them"
        )


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


def read_table(path: Path) -> list[list[str]]:
    """Rows of a CSV or TSV file, empty ones left out; UserError when it cannot be read or is empty."""
    try:
        with regular(path).open(encoding="utf-8-sig", newline="") as file:
            if path.suffix.lower() == ".tsv":
                rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
            else:
                # Not strict, a quote that is never closed would swallow all lines behind it.
                rows = list(csv.reader(file, strict=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read as a table in UTF-8: {error}") from error
    rows = [row for row in rows if any(cell.strip() for cell in row)]
    if not rows:
        raise UserError(f"{path} holds no rows")
    return rows


def table_columns(path: Path, columns: Sequence[str]) -> list[list[str]]:
    """The named columns of a CSV or TSV file, row by row.

    A column is a name of the header line; numbers count from 1 and mean that there is no header line.
    """
    rows, columns = read_table(path), [c.strip() for c in columns]
    if all(c.isdecimal() for c in columns):
        indices = [int(c) - 1 for c in columns]
        width = min(len(row) for row in rows)
        wrong = [c for c, i in zip(columns, indices, strict=True) if not 0 <= i < width]
        if wrong:
            raise UserError(f"{path} has no column {wrong[0]}: its rows have {width} columns, counted from 1")
        return [[row[i] for i in indices] for row in rows]
    header, body = [name.strip() for name in rows[0]], rows[1:]
    for name in columns:
        if name not in header:
            raise UserError(
                f"{path} has no column {name!r} in its header ({', '.join(header)[:120]}); name one of these, or give "
                "column numbers from 1 if there is no header line"
            )
    if not body:
        raise UserError(f"{path} holds a header and no rows")
    indices = [header.index(name) for name in columns]
    short = next((i for i, row in enumerate(body, 2) if len(row) <= max(indices)), None)
    if short:
        raise UserError(f"{path}, row {short}: too few columns for {', '.join(columns)}")
    return [[row[i] for i in indices] for row in body]


def read_texts(path: Path, column: str | None) -> list[str]:
    """Distinct texts of a text file (one a line) or of columns of a CSV or TSV file, in order."""
    if path.is_dir():
        raise UserError(f"{path} is a folder: a text network calibrates on a text file, CSV, TSV, .npz or .safetensors")
    if _is_table(path):
        if column is None:
            raise UserError(
                f"{path} is a table: name its text column with --calibration-column (a number if it has no header)"
            )
        texts = [cell for row in table_columns(path, column.split(",")) for cell in row]
    else:
        try:
            # Not splitlines, which takes form feeds and the like for ends of lines.
            texts = regular(path).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path} cannot be read as text in UTF-8: {error}") from error
    texts = [text for text in dict.fromkeys(text.strip() for text in texts) if text]
    if not texts:
        raise UserError(f"{path} holds no texts")
    return texts


def builtin_texts() -> list[str]:
    """256 English sentences of many kinds."""
    return resources.files("optin_deploy.data").joinpath("sentences.txt").read_text(encoding="utf-8").splitlines()


def builtin_images(count: int, seed: int) -> list[Image.Image]:
    """Random crops of the photograph that matplotlib ships, every second one mixed with noise of natural spectrum."""
    import matplotlib.cbook

    path = matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    with Image.open(path) as opened:
        photo = opened.convert("RGB")
    rng = np.random.default_rng(seed)
    return [_builtin_image(photo, rng, noisy=index % 2 == 1) for index in range(count)]


def _builtin_image(photo: Image.Image, rng: np.random.Generator, *, noisy: bool) -> Image.Image:
    side = int(rng.integers(96, min(photo.size)))
    left, top = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
    crop = photo.crop((left, top, left + side, top + side)).resize((256, 256), Image.Resampling.BICUBIC)
    pixels = np.asarray(crop, dtype=np.float64)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if noisy:
        pixels = 0.4 * pixels + 0.6 * _natural_noise(rng)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _natural_noise(rng: np.random.Generator) -> np.ndarray[Any, Any]:
    """Colour noise whose amplitude falls with 1/frequency, as in photographs; ``(256, 256, 3)`` in 0…255."""
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)[None, :])
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal((3, 256, 256))) / frequency
    noise = np.moveaxis(np.fft.irfft2(spectrum), 0, -1)
    return 127.5 + 64 * (noise - noise.mean()) / noise.std()


def _read_tensors(network: Network, path: Path) -> dict[str, Tensor]:
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


def _selecting(tensors: Mapping[str, Tensor]) -> Callable[[list[int]], dict[str, Tensor]]:
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


def _add(digest: "hashlib._Hash", batch: Mapping[str, Tensor]) -> None:
    """Let ``digest`` see the content of a batch."""
    for name, tensor in sorted(batch.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
