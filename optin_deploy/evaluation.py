"""Accuracy on a labelled set, dense and pruned alike."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from optin_deploy.dataset import Dataset
from optin_deploy.errors import UserError
from optin_deploy.labels import class_numbers
from optin_deploy.network import Network
from optin_deploy.places import check_there
from optin_deploy.preprocessing import ImagePreprocessing, TextPreprocessing
from optin_deploy.sample_files import check_images, image_files, read_images
from optin_deploy.text_evaluation import load_texts

_BATCH_SIZE = 64


def load_dataset(network: Network, path: Path, columns: str | None = None) -> Dataset:
    """A folder with one folder of images per class (top-1), or a table of texts (see `tables`).

    Class folders are in the order of their names; where some classes have none, folders are named by class number from
    0 or by label.

    Args:
        columns: of a table, by names of its header or numbers from 1: "text,label", "first+second,label" or
            "first,second,label" (see `text_evaluation.load_texts`); without it, tables of two and of three columns are
            taken in this order.

    Raises:
        UserError: the data is unreadable, empty, or does not suit the network.
    """
    check_there(path, "evaluation data")
    if isinstance(network.preprocessing, ImagePreprocessing):
        return _images(network, path)
    if not isinstance(network.preprocessing, TextPreprocessing):
        raise UserError("a module of your own without preprocessing cannot be evaluated on files")
    return load_texts(network, network.preprocessing, path, columns)


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


def _run(network: Network, module: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with torch.inference_mode():
        return network.forward({name: t.to(device) for name, t in batch.items()}, module)


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
