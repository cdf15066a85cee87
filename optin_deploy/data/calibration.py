"""Unlabelled samples for scores and repair: from files, or a small built-in set."""

import hashlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from optin_deploy.data.image_files import check_fit, image_files, images_in_folders, reading
from optin_deploy.data.labels import class_numbers
from optin_deploy.data.preprocessing import PicturePreprocessing, TextPreprocessing, different_shapes
from optin_deploy.data.tables import TABLE_KINDS, is_table, read_table
from optin_deploy.data.tensor_files import read_tensors, selecting
from optin_deploy.data.texts import (
    as_texts,
    check_groups,
    check_texts,
    class_numbers_of,
    length,
    read_texts,
    stripped,
    tell_cut,
)
from optin_deploy.data.unread import unread
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.utils.paths import check_there
from optin_deploy.utils.spill import Shelf

DEFAULT_SAMPLES = {"image": 128, "text": 1024, "tensor": 1024}
_BATCH_SIZE = {"image": 16, "text": 32, "tensor": 32}
# Samples kept from scores and repair, on which the pruned network is compared with the dense one.
_HELD_OUT = 32
# Tokens of a batch, padding included: as many as 32 texts of 128 have. Longer texts come in smaller batches.
_MOST_TOKENS = 4096
logger = logging.getLogger(__name__)


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
    path: Path | None = None,
    *,
    column: str | None = None,
    labels: str | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> Calibration:
    """Samples for ``network``.

    Args:
        path: a folder of images, a text file with one text a line, a table of texts (see `tables`), ready tensors by
            input name (``.npz``, ``.safetensors``; first axis the sample), or None for the built-in set.
        column: of a table: a name of its header, or a number counting from 1; several, separated by commas, add up.
            ``first+second`` are pairs, which the network takes as one input.
        labels: where class labels are, for a criterion that needs them: a column of the table (named like ``column``),
            or "folders" for images in one folder per class (see `evaluation.load_dataset`).
        samples: at most this many, drawn at random; 128 images, 1,024 texts or tensors when None.

    Raises:
        UserError: nothing usable at ``path``, or it does not suit the network.
    """
    if samples is not None and samples < 1:
        raise UserError(f"--calibration-samples {samples}: at least 1 is needed")
    check_there(path, "calibration data")
    preprocessing = network.preprocessing
    if column is not None and not is_table(path):
        raise UserError(
            f"--calibration-column {column}: only a table ({TABLE_KINDS}) given as --calibration has columns"
        )
    if labels is not None:
        items, classes, preprocess, kind = _labelled(network, path, column, labels)
        calibration = _accepted(network, _calibration(items, preprocess, path, kind, samples, seed, classes))
        return _fitting(network, calibration) if kind == "image" else calibration
    if path is not None and path.suffix.lower() in (".npz", ".safetensors"):
        tensors = read_tensors(network, path)
        rows = range(len(next(iter(tensors.values()))))
        return _accepted(network, _calibration(rows, selecting(tensors), path, "tensor", samples, seed))
    if isinstance(preprocessing, PicturePreprocessing):
        check_fit(network)
        if path is not None:
            files = image_files(path)
            return _fitting(network, _calibration(files, reading(preprocessing), path, "image", samples, seed))
        images = builtin_images((samples or DEFAULT_SAMPLES["image"]) + _HELD_OUT, seed)
        if not preprocessing.fixed:
            height, width = preprocessing.size
            images = [image.resize((width, height), Image.Resampling.BICUBIC) for image in images]
        return _fitting(network, _calibration(images, preprocessing, None, "image", samples, seed))
    if isinstance(preprocessing, TextPreprocessing):
        texts = builtin_texts() if path is None else read_texts(path, column)
        check_texts(texts, preprocessing, path)
        if network.logits is not None and isinstance(texts[0], str) and column is not None and "," in column:
            logger.warning(
                "--calibration-column %s: each column is a text of its own; a classifier of pairs takes them as one "
                "input, which is written %s",
                column,
                column.replace(",", "+", 1),
            )
        return _accepted(network, _calibration(texts, preprocessing, path, "text", samples, seed))
    if told := unread(network):
        raise UserError(f"{told}, and give them as --calibration FILE.npz or .safetensors")
    raise UserError(
        f"{network.source.name} is a network without preprocessing, which needs tensors: --calibration FILE.npz or "
        ".safetensors"
    )


def _labelled(
    network: Network, path: Path | None, column: str | None, labels: str
) -> tuple[Sequence[Any], list[int], Callable[[list[Any]], dict[str, Tensor]], str]:
    """Items, their class numbers, what makes inputs of them, and of what kind they are."""
    preprocessing = network.preprocessing
    if network.logits is None:
        raise UserError(f"--calibration-labels {labels}: the network has no class logits")
    if isinstance(preprocessing, PicturePreprocessing) and path is not None:
        check_fit(network)
        if labels != "folders":
            raise UserError(f"--calibration-labels {labels}: images are labelled by their class folders: say `folders`")
        files = images_in_folders(path)
        folders = [file.relative_to(path).parts[0] for file in files]
        numbers = class_numbers(network, path, sorted(set(folders)))
        return files, [numbers[f] for f in folders], reading(preprocessing), "image"
    if isinstance(preprocessing, TextPreprocessing) and path is not None and is_table(path):
        if column is None or "," in column:
            raise UserError(
                f"--calibration-labels {labels}: name the one text column, or first+second, with --calibration-column"
            )
        table = read_table(path)
        (group,) = table.split(column)
        check_groups([group], f"--calibration-column {column}")
        rows = [row for row in table.select([*group, labels]) if any(cell.strip() for cell in row[:-1])]
        if not rows:
            raise UserError(f"{path} holds no texts in {column}")
        classes = class_numbers_of(network, [row[-1] for row in rows], path, table.names_of_classes(labels))
        of_text = dict(zip(stripped(as_texts(rows, group)), classes, strict=True))
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
    others = order[len(used) : len(used) + held]
    if isinstance(preprocess, TextPreprocessing):
        tell_cut([items[i] for i in used + others], preprocess, "built-in samples" if path is None else str(path))
    digest, parts = hashlib.sha256(), []
    batches: Shelf[dict[str, Tensor]] = Shelf()
    for whole in _parts(items, used, kind, seed):
        for part, batch in _bounded(items, preprocess, whole, kind):
            parts.append(part)
            batches.append(batch)
            _add(digest, batches[-1])
    held_out = [
        batch for part in _split(others, _BATCH_SIZE[kind]) for _, batch in _bounded(items, preprocess, part, kind)
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
    """``calibration`` as it is; UserError when the network fails on the samples with the extremes of an input, or on
    one of the longest."""
    for name, sample in _extremes(network, calibration):
        try:
            with torch.no_grad():
                network.forward(sample)
        except (RuntimeError, IndexError, ValueError) as error:
            values, shape = sample[name], tuple(sample[name].shape)
            raise UserError(
                f"calibration on {calibration.source}: the network fails on {name} of shape {shape} with values from "
                f"{values.min()} to {values.max()}: {' '.join(str(error).split())[:200]}"
            ) from error
    return calibration


def _fitting(network: Network, calibration: Calibration) -> Calibration:
    """``calibration`` on pictures as it is; UserError when they have different shapes, or the network takes none of
    theirs, which is another than that of the sample inputs."""
    name = network.preprocessing.input_name
    batches = chain(calibration.batches, calibration.held_out)
    first, *others = dict.fromkeys(tuple(batch[name].shape[2:]) for batch in batches)
    if others:
        raise UserError(f"calibration on {calibration.source}: {different_shapes(first, others[0], 'of them')}")
    if first == tuple(network.inputs[name].shape[2:]):
        return calibration
    try:
        with torch.inference_mode():
            network.forward({n: tensor[:1] for n, tensor in calibration.held_out[0].items()})
    except (AssertionError, RuntimeError, IndexError, ValueError) as error:
        told = " ".join(str(error).split())[:200]
        raise UserError(
            f"calibration on {calibration.source}: the network takes no pictures of {' x '.join(map(str, first))} "
            f"(height x width), in which its preprocessing leaves them: {told}"
        ) from error
    return calibration


def _extremes(network: Network, calibration: Calibration) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Name of an input, and the sample that has its largest or smallest value, or the longest sequence."""
    for name, sign in ((n, sign) for n, t in network.inputs.items() if not t.is_floating_point() for sign in (1, -1)):
        batches = chain(calibration.batches, calibration.held_out)
        batch = max(batches, key=lambda b: int((sign * b[name]).max()))
        row = int((sign * batch[name]).flatten(1).amax(1).argmax())
        yield name, {n: t[row : row + 1] for n, t in batch.items()}
    for name in network.sequence_inputs[:1]:
        batch = max(chain(calibration.batches, calibration.held_out), key=lambda b: b[name].shape[1])
        row = 0 if network.token_mask is None else int(batch[network.token_mask].sum(1).argmax())
        yield name, {n: t[row : row + 1] for n, t in batch.items()}


def _bounded(
    items: Sequence[Any], preprocess: Callable[[list[Any]], dict[str, Tensor]], part: list[int], kind: str
) -> Iterator[tuple[list[int], dict[str, Tensor]]]:
    """The batch of the items of ``part``, or several of them where long texts would make it large."""
    batch = preprocess([items[i] for i in part])
    if kind != "text" or len(part) == 1 or max(t.shape[:2].numel() for t in batch.values()) <= _MOST_TOKENS:
        yield part, batch
        return
    middle = len(part) // 2
    for half in (part[:middle], part[middle:]):
        yield from _bounded(items, preprocess, half, kind)


def _parts(items: Sequence[Any], used: list[int], kind: str, seed: int) -> list[list[int]]:
    """Indices batch by batch. Texts of like length share a batch, so that little is padding; batches come in random
    order, so that the first ones are as good a sample as any."""
    if kind != "text":
        return _split(used, _BATCH_SIZE[kind])
    parts = _split(sorted(used, key=lambda i: length(items[i])), _BATCH_SIZE[kind])
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [parts[i] for i in order]


def _split(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def builtin_texts() -> list[str]:
    """256 English sentences of many kinds."""
    return (
        resources.files("optin_deploy.data").joinpath("builtin_sentences.txt").read_text(encoding="utf-8").splitlines()
    )


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


def _add(digest: "hashlib._Hash", batch: Mapping[str, Tensor]) -> None:
    """Let ``digest`` see the content of a batch."""
    for name, tensor in sorted(batch.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
