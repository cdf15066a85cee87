"""Accuracy on a labelled set, dense and pruned alike."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.labels import class_count, class_number, class_numbers
from optin_deploy.network import Network
from optin_deploy.picture_files import check_fit, check_images, images_in_folders, read_images
from optin_deploy.places import check_there
from optin_deploy.preprocessing import ImagePreprocessing, PicturePreprocessing, TextPreprocessing
from optin_deploy.sample_files import check_texts, read_table, table_columns

_BATCH_SIZE = 64


@dataclass(frozen=True)
class Dataset:
    """A labelled set. ``measure`` gives its metric, in per cent, for a module in the network's place, in ``steps``."""

    metric: str
    name: str
    samples: int
    steps: int
    measure: Callable[[nn.Module, Callable[[int], None]], float]


def load_dataset(network: Network, path: Path, columns: str | None = None) -> Dataset:
    """A folder with one folder of images per class (top-1), or a CSV or TSV file.

    Class folders are named as the network calls its classes, by ImageNet synset or by class number from 0. Where the
    network has no names, and there is a folder for every class, they may be in the order that the network's library
    sorts folders in (see ``labels``).

    Args:
        columns: "text,label" (accuracy) or "first,second,score" (Spearman's correlation of the cosine of the two
            sentences' mean-pooled features with the score), by header names or numbers from 1; without it, files of
            two and of three columns without header are taken in this order.

    Raises:
        UserError: the data is unreadable, empty, or does not suit the network.
    """
    check_there(path, "evaluation data")
    if isinstance(network.preprocessing, PicturePreprocessing):
        return _images(network, path)
    if not isinstance(network.preprocessing, TextPreprocessing):
        raise UserError(f"{network.source.name} is a network without preprocessing: it cannot be evaluated on files")
    if path.is_dir():
        raise UserError(f"{path} is a folder: a text network is evaluated on a CSV or TSV file")
    names = columns.split(",") if columns else [str(i + 1) for i in range(len(read_table(path)[0]))]
    if len(names) == 2:
        return _texts(network, path, table_columns(path, names))
    if len(names) == 3:
        return _pairs(network, path, table_columns(path, names))
    raise UserError(
        f"{path}: {len(names)} columns; name two (text,label) or three (first,second,score) with --evaluate-columns"
    )


def _images(network: Network, path: Path) -> Dataset:
    preprocessing: PicturePreprocessing = network.preprocessing
    check_fit(network)
    if isinstance(preprocessing, ImagePreprocessing) and preprocessing.assumed:
        raise UserError(
            f"the files of {network.source.name} do not say how pictures are prepared, so that top-1 would be a guess: "
            "save its image processor beside the weights (preprocessor_config.json)"
        )
    labelled = images_in_folders(path)
    if network.logits is None:
        raise UserError("the network has no class logits: top-1 cannot be measured")
    folders = [file.relative_to(path).parts[0] for file in labelled]
    numbers = class_numbers(network, path, sorted(set(folders)))
    labels = [numbers[folder] for folder in folders]
    check_images(labelled, preprocessing)

    def measure(module: nn.Module, advance: Callable[[int], None]) -> float:
        def logits(part: list[Path]) -> Tensor:
            return _run(network, module, preprocessing(read_images(part)))[network.logits or ""]

        return _accuracy(labelled, labels, logits, advance)

    return Dataset("top-1", str(path), len(labelled), len(labelled), measure)


def _texts(network: Network, path: Path, rows: list[list[str]]) -> Dataset:
    if network.logits is None:
        raise UserError(
            "the network has no class logits: accuracy cannot be measured (sentence pairs need three columns)"
        )
    try:
        classes = class_count(network)
        labels = [class_number(network, row[1].strip(), classes) for row in rows]
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    assert isinstance(network.preprocessing, TextPreprocessing)
    check_texts([row[0] for row in rows], network.preprocessing, path)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i][0]))

    def measure(module: nn.Module, advance: Callable[[int], None]) -> float:
        def logits(part: list[str]) -> Tensor:
            return _run(network, module, network.preprocessing(part))[network.logits or ""]

        return _accuracy([rows[i][0] for i in order], [labels[i] for i in order], logits, advance)

    return Dataset("accuracy", str(path), len(rows), len(rows), measure)


def _pairs(network: Network, path: Path, rows: list[list[str]]) -> Dataset:
    try:
        scores = torch.tensor([float(row[2]) for row in rows], dtype=torch.float64)
    except ValueError as error:
        raise UserError(f"{path}: the third column must be a number: {error}") from error
    if not scores.isfinite().all() or len(scores.unique()) < 2:
        raise UserError(f"{path}: a correlation needs finite scores, and at least two different ones")
    if "last_hidden_state" not in network.outputs:
        raise UserError("sentence pairs need a network that gives token features (last_hidden_state)")
    texts = sorted({text for row in rows for text in row[:2]}, key=lambda text: (len(text), text))
    assert isinstance(network.preprocessing, TextPreprocessing)
    check_texts(texts, network.preprocessing, path)
    place = {text: i for i, text in enumerate(texts)}

    def measure(module: nn.Module, advance: Callable[[int], None]) -> float:
        parts = []
        for start in range(0, len(texts), _BATCH_SIZE):
            part = texts[start : start + _BATCH_SIZE]
            parts.append(_embed(network, module, part))
            advance(len(part))
        features = torch.cat(parts)
        first, second = (features[[place[row[i]] for row in rows]] for i in (0, 1))
        return 100 * spearman((first * second).sum(1), scores)

    return Dataset("Spearman × 100", str(path), len(rows), len(texts), measure)


def _run(network: Network, module: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        return network.forward({name: t.to(device) for name, t in batch.items()}, module)


def _embed(network: Network, module: nn.Module, texts: list[str]) -> Tensor:
    """Mean over tokens of the last features, normalised; ``(texts, width)`` in float64 on the CPU."""
    batch = network.preprocessing(texts)
    features = _run(network, module, batch)["last_hidden_state"].double().cpu()
    weights = batch[network.token_mask].double() if network.token_mask else torch.ones(features.shape[:2]).double()
    return F.normalize((features * weights[..., None]).sum(1) / weights.sum(1, keepdim=True), dim=-1)


def _accuracy(
    items: Sequence[object], labels: Sequence[int], logits: Callable[..., Tensor], advance: Callable[[int], None]
) -> float:
    right = 0
    for start in range(0, len(items), _BATCH_SIZE):
        part = items[start : start + _BATCH_SIZE]
        predicted = _classes(logits(list(part))).cpu()
        right += int((predicted == torch.tensor(labels[start : start + _BATCH_SIZE])).sum())
        advance(len(part))
    return 100 * right / len(items)


def _classes(logits: Tensor) -> Tensor:
    """Class numbers of ``(samples, classes)``; one logit says no (0) or yes (1)."""
    return (logits[:, 0] > 0).long() if logits.shape[-1] == 1 else logits.argmax(-1)


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors; equal values share their mean rank."""
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]
