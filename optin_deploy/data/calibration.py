"""Unlabelled samples for scores and compensation: from files, or a small built-in set."""

import hashlib
import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from optin_deploy.data.builtin import builtin_images, builtin_texts
from optin_deploy.data.image_files import (
    channels_error,
    check_image_input,
    image_files,
    image_loader,
    images_in_folders,
)
from optin_deploy.data.labels import classes_of_folders
from optin_deploy.data.preprocessing import TextPreprocessing, VisionPreprocessing, shape_mismatch
from optin_deploy.data.tables import TABLE_KINDS, is_table, read_table
from optin_deploy.data.tensor_files import read_tensors, row_selector
from optin_deploy.data.texts import (
    as_texts,
    check_groups,
    check_texts,
    classes_of_labels,
    read_texts,
    split_batches,
    strip_texts,
    text_length,
    warn_truncated,
)
from optin_deploy.errors import UserError, one_line
from optin_deploy.network import Network
from optin_deploy.nn.batches import Batch, Batches, batch_size
from optin_deploy.utils.paths import check_exists
from optin_deploy.utils.spill import SpillList

_Kind = Literal["image", "text", "tensor"]
DEFAULT_SAMPLES: dict[_Kind, int] = {"image": 128, "text": 1024, "tensor": 1024}
_BATCH_SIZE: dict[_Kind, int] = {"image": 16, "text": 32, "tensor": 32}
# Samples that scores and compensation do not use: the pruned network is compared with the dense one on them.
_HELD_OUT = 32
# Tokens of a batch, padding included: 32 texts of 128 tokens. Longer texts come in smaller batches.
_MOST_TOKENS = 4096
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Calibration:
    """Calibration batches by input name.

    Attributes:
        batches: not all in memory at once (see ``utils.spill``): iterate over them.
        held_out: batches of other samples, for the comparison with the dense network.
        source: the path, or a description.
        builtin: whether the samples are the built-in ones.
        samples: number of samples in ``batches``.
        digest: a hash of all tensors.
        labels: class numbers for each of ``batches``, if they are known.
    """

    batches: Batches
    held_out: tuple[Batch, ...]
    source: str
    builtin: bool
    samples: int
    digest: str
    labels: tuple[Tensor, ...] | None = None

    def __repr__(self) -> str:
        held_out = sum(map(batch_size, self.held_out))
        count = f"{self.samples} samples in {len(self.batches)} batches"
        return f"<Calibration on {self.source}: {count}, {held_out} held out>"


@dataclass(frozen=True)
class _Samples:
    """All samples of a source, before some are drawn.

    Attributes:
        items: images, image files, texts or row numbers.
        preprocess: makes a batch from some of the items.
        path: where they are from; None for the built-in samples.
        classes: the class number of each item, if known.
    """

    items: Sequence[Any]
    preprocess: Callable[[Sequence[Any]], Batch]
    kind: _Kind
    path: Path | None
    classes: Sequence[int] | None = None

    @property
    def source(self) -> str:
        return "built-in samples" if self.path is None else str(self.path)

    def take(self, indices: Iterable[int]) -> list[Any]:
        return [self.items[i] for i in indices]


def load_calibration(
    network: Network,
    path: Path | None = None,
    *,
    column: str | None = None,
    labels: str | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> Calibration:
    """Return calibration samples for ``network``.

    Args:
        path: a folder of images, a text file with one text per line, a table of texts (see `tables`), tensors by input
            name (``.npz``, ``.safetensors``; the first axis is the sample), or None for the built-in samples.
        column: text column of a table: a name in its header, or a number from 1; several, separated by commas, are
            joined. ``first+second`` are pairs, which the network takes as one input.
        labels: where class labels are, for a criterion that needs them: a column of the table (named like ``column``),
            or "folders" for images in one folder per class (see `load_dataset`).
        samples: at most this many, drawn at random; 128 images, 1,024 texts or tensors when None.

    Raises:
        UserError: ``path`` holds nothing usable, or it does not suit the network.

    Example:
        >>> calibration = load_calibration(network, Path("reviews.csv"), column="text", samples=512)
    """
    if samples is not None and samples < 1:
        raise UserError(f"--calibration-samples {samples}: at least 1 is needed")
    check_exists(path, "calibration data")
    if column is not None and not is_table(path):
        raise UserError(
            f"--calibration-column {column}: only a table ({TABLE_KINDS}) given as --calibration has columns"
        )
    if labels is not None:
        pool = _labelled_samples(network, path, column, labels)
    elif path is None:
        pool = _builtin_samples(network, samples, seed)
    else:
        pool = _unlabelled_samples(network, path, column)
    calibration = _draw(pool, samples or DEFAULT_SAMPLES[pool.kind], seed)
    if isinstance(network.preprocessing, VisionPreprocessing) and pool.kind == "image":
        _check_image_shapes(network, network.preprocessing.input_name, calibration)
    else:
        _check_extremes(network, calibration)
    return calibration


def _builtin_samples(network: Network, samples: int | None, seed: int) -> _Samples:
    preprocessing = network.preprocessing
    if isinstance(preprocessing, VisionPreprocessing):
        check_image_input(network, preprocessing)
        images = builtin_images((samples or DEFAULT_SAMPLES["image"]) + _HELD_OUT, seed)
        if not preprocessing.fixed:
            height, width = preprocessing.size
            images = [image.resize((width, height), Image.Resampling.BICUBIC) for image in images]
        return _Samples(images, preprocessing, "image", None)
    if isinstance(preprocessing, TextPreprocessing):
        texts = builtin_texts()
        check_texts(texts, preprocessing, None)
        return _Samples(texts, preprocessing, "text", None)
    raise _needs_tensors(network)


def _unlabelled_samples(network: Network, path: Path, column: str | None) -> _Samples:
    preprocessing = network.preprocessing
    if path.suffix.lower() in (".npz", ".safetensors"):
        tensors = read_tensors(network, path)
        return _Samples(range(batch_size(tensors)), row_selector(tensors), "tensor", path)
    if isinstance(preprocessing, VisionPreprocessing):
        check_image_input(network, preprocessing)
        return _Samples(image_files(path), image_loader(preprocessing), "image", path)
    if not isinstance(preprocessing, TextPreprocessing):
        raise _needs_tensors(network)
    texts = read_texts(path, column)
    check_texts(texts, preprocessing, path)
    if network.logits is not None and isinstance(texts[0], str) and column is not None and "," in column:
        logger.warning(
            "--calibration-column %s: each column is a text of its own; a classifier of pairs takes them as one input, "
            "which is written %s",
            column,
            column.replace(",", "+", 1),
        )
    return _Samples(texts, preprocessing, "text", path)


def _needs_tensors(network: Network) -> UserError:
    if reason := channels_error(network):
        return UserError(f"{reason}, and give them as --calibration FILE.npz or .safetensors")
    return UserError(
        f"{network.source.name} is a network without preprocessing, which needs tensors: --calibration FILE.npz or "
        ".safetensors"
    )


def _labelled_samples(network: Network, path: Path | None, column: str | None, labels: str) -> _Samples:
    preprocessing = network.preprocessing
    if network.logits is None:
        raise UserError(f"--calibration-labels {labels}: the network has no class logits")
    if isinstance(preprocessing, VisionPreprocessing) and path is not None:
        check_image_input(network, preprocessing)
        if labels != "folders":
            raise UserError(f"--calibration-labels {labels}: images are labelled by their class folders: say `folders`")
        files = images_in_folders(path)
        folders = [file.relative_to(path).parts[0] for file in files]
        numbers = classes_of_folders(network, path, sorted(set(folders)))
        return _Samples(files, image_loader(preprocessing), "image", path, [numbers[f] for f in folders])
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
        classes = classes_of_labels(network, [row[-1] for row in rows], path, table.names_of_classes(labels))
        class_of = dict(zip(strip_texts(as_texts(rows, group)), classes, strict=True))
        check_texts(list(class_of), preprocessing, path)
        return _Samples(list(class_of), preprocessing, "text", path, list(class_of.values()))
    raise UserError(f"--calibration-labels {labels}: only a table of texts and a folder of class folders have labels")


def from_batches(batches: Batches, labels: Sequence[Tensor] | None = None) -> Calibration:
    """Return a calibration on the user's own batches by input name, at least two; the last one is held out.

    Args:
        labels: class numbers for each batch, for a criterion that needs them.

    Raises:
        UserError: there are fewer than two batches, or not as many labels.
    """
    if len(batches) < 2:
        raise UserError(f"{len(batches)} calibration batches: at least 2 are needed, one of them to compare on")
    if labels is not None and len(labels) != len(batches):
        raise UserError(f"labels for {len(labels)} batches, {len(batches)} batches given")
    return Calibration(
        batches=tuple(dict(batch) for batch in batches[:-1]),
        held_out=(dict(batches[-1]),),
        source="tensors given by the caller",
        builtin=False,
        samples=sum(map(batch_size, batches[:-1])),
        digest=_hash(chain(batches, ({"labels": numbers} for numbers in labels or ()))),
        labels=None if labels is None else tuple(labels[:-1]),
    )


def _draw(pool: _Samples, count: int, seed: int) -> Calibration:
    """Draw ``count`` samples without replacement, fewer if there are not enough, and hold out others."""
    if len(pool.items) < 2:
        raise UserError(f"{pool.path} holds {len(pool.items)} sample: at least 2 are needed, one of them to compare on")
    order = torch.randperm(len(pool.items), generator=torch.Generator().manual_seed(seed)).tolist()
    # A small set holds out an eighth of its samples.
    enough = len(pool.items) >= count + _HELD_OUT
    held = _HELD_OUT if enough else max(1, len(pool.items) // 8)
    used = order[: min(count, len(pool.items) - held)]
    unused = order[len(used) : len(used) + held]
    if isinstance(pool.preprocess, TextPreprocessing):
        warn_truncated(pool.take(used + unused), pool.preprocess, pool.source)
    batches: SpillList[Batch] = SpillList()
    batch_indices = []
    for indices, batch in _batches(pool, _group_by_length(pool, used, seed)):
        batch_indices.append(indices)
        batches.append(batch)
    held_out = tuple(batch for _, batch in _batches(pool, _split(unused, _BATCH_SIZE[pool.kind])))
    classes = pool.classes
    labels = None if classes is None else tuple(torch.tensor([classes[i] for i in part]) for part in batch_indices)
    return Calibration(
        batches=batches,
        held_out=held_out,
        source=pool.source,
        builtin=pool.path is None,
        samples=len(used),
        digest=_hash(chain(batches, held_out, ({"labels": numbers} for numbers in labels or ()))),
        labels=labels,
    )


def _group_by_length(pool: _Samples, indices: list[int], seed: int) -> list[list[int]]:
    """Split ``indices`` into batches; texts of similar length share a batch, which saves padding.

    The batches of texts are shuffled, so that the first ones are a random sample too.
    """
    size = _BATCH_SIZE[pool.kind]
    if pool.kind != "text":
        return _split(indices, size)
    parts = _split(sorted(indices, key=lambda i: text_length(pool.items[i])), size)
    order = torch.randperm(len(parts), generator=torch.Generator().manual_seed(seed)).tolist()
    return [parts[i] for i in order]


def _split(indices: list[int], size: int) -> list[list[int]]:
    return [indices[start : start + size] for start in range(0, len(indices), size)]


def _batches(pool: _Samples, parts: Iterable[list[int]]) -> Iterator[tuple[Sequence[int], Batch]]:
    """Yield the batch of each part with its indices; several batches if long texts would make it large."""

    def to_batch(indices: Sequence[int]) -> Batch:
        return pool.preprocess(pool.take(indices))

    for part in parts:
        if pool.kind == "text":
            yield from split_batches(part, to_batch, _MOST_TOKENS)
        else:
            yield part, to_batch(part)


def _check_extremes(network: Network, calibration: Calibration) -> None:
    """Raise UserError if the network fails on a sample with an extreme input value, or on a longest sequence."""
    for name, sample in _extreme_samples(network, calibration):
        try:
            with torch.no_grad():
                network.forward(sample)
        except (RuntimeError, IndexError, ValueError) as error:
            values, shape = sample[name], tuple(sample[name].shape)
            raise UserError(
                f"calibration on {calibration.source}: the network fails on {name} of shape {shape} with values from "
                f"{values.min()} to {values.max()}: {one_line(error)}"
            ) from error


def _extreme_samples(network: Network, calibration: Calibration) -> Iterator[tuple[str, Batch]]:
    """Yield samples with the largest and smallest value of each integer input, and with the longest sequence.

    Each comes with the name of the input.
    """
    for name, sign in ((n, sign) for n, t in network.inputs.items() if not t.is_floating_point() for sign in (1, -1)):
        batches = chain(calibration.batches, calibration.held_out)
        batch = max(batches, key=lambda b: int((sign * b[name]).max()))
        row = int((sign * batch[name]).flatten(1).amax(1).argmax())
        yield name, {n: t[row : row + 1] for n, t in batch.items()}
    for name in network.sequence_inputs[:1]:
        batch = max(chain(calibration.batches, calibration.held_out), key=lambda b: b[name].shape[1])
        row = 0 if network.token_mask is None else int(batch[network.token_mask].sum(1).argmax())
        yield name, {n: t[row : row + 1] for n, t in batch.items()}


def _check_image_shapes(network: Network, name: str, calibration: Calibration) -> None:
    """Raise UserError if the images of input ``name`` have different shapes, or a shape that the network refuses."""
    batches = chain(calibration.batches, calibration.held_out)
    first, *others = dict.fromkeys(tuple(batch[name].shape[2:]) for batch in batches)
    if others:
        raise UserError(f"calibration on {calibration.source}: {shape_mismatch(first, others[0], 'of them')}")
    if first == tuple(network.inputs[name].shape[2:]):
        return
    try:
        with torch.inference_mode():
            network.forward({n: tensor[:1] for n, tensor in calibration.held_out[0].items()})
    except (AssertionError, RuntimeError, IndexError, ValueError) as error:
        raise UserError(
            f"calibration on {calibration.source}: the network takes no images of {' x '.join(map(str, first))} "
            f"(height x width), the size that its preprocessing makes: {one_line(error)}"
        ) from error


def _hash(batches: Iterable[Batch]) -> str:
    digest = hashlib.sha256()
    for batch in batches:
        for name, tensor in sorted(batch.items()):
            digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
