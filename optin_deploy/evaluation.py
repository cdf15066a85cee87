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
from optin_deploy.places import check_there
from optin_deploy.preprocessing import ImagePreprocessing, TextPreprocessing
from optin_deploy.sample_files import check_images, check_texts, image_files, read_images, read_table, table_columns
from optin_deploy.unread import unread

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

    Class folders are in the order of their names; where some classes have none, folders are named by class number from
    0 or by label.

    Args:
        columns: "text,label" (accuracy) or "first,second,score" (Spearman's correlation of the cosine of the two
            sentences' mean-pooled features with the score), by header names or numbers from 1; without it, files of
            two and of three columns without header are taken in this order.

    Raises:
        UserError: the data is unreadable, empty, or does not suit the network.
    """
    check_there(path, "evaluation data")
    if isinstance(network.preprocessing, ImagePreprocessing):
        return _images(network, path)
    if not isinstance(network.preprocessing, TextPreprocessing):
        if told := unread(network):
            raise UserError(f"--evaluate {path}: {told}, and evaluate the pruned network in Python")
        raise UserError("a module of your own without preprocessing cannot be evaluated on files")
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
    files = image_files(path)
    labelled = [file for file in files if file.parent != path]
    if not labelled:
        raise UserError(f"{path} has no class folders: top-1 needs one folder of images per class")
    if network.logits is None:
        raise UserError("the network has no class logits: top-1 cannot be measured")
    folders = [file.relative_to(path).parts[0] for file in labelled]
    numbers = class_numbers(network, path, sorted(set(folders)))
    labels = [numbers[folder] for folder in folders]
    assert isinstance(network.preprocessing, ImagePreprocessing)
    check_images(labelled, network.preprocessing)

    def measure(module: nn.Module, advance: Callable[[int], None]) -> float:
        def logits(part: list[Path]) -> Tensor:
            return _run(network, module, network.preprocessing(read_images(part)))[network.logits or ""]

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
        predicted = logits(list(part)).argmax(-1).cpu()
        right += int((predicted == torch.tensor(labels[start : start + _BATCH_SIZE])).sum())
        advance(len(part))
    return 100 * right / len(items)


def spearman(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two vectors; equal values share their mean rank."""
    return float(torch.corrcoef(torch.stack([_ranks(a), _ranks(b)]))[0, 1])


def _ranks(values: Tensor) -> Tensor:
    _, inverse, counts = torch.unique(values, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).double()
    return (last - (counts.double() - 1) / 2)[inverse]
