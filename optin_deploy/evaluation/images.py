"""Accuracy on a labelled set, dense and pruned alike."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from optin_deploy.data.image_files import check_fit, check_images, images_in_folders, read_images
from optin_deploy.data.labels import class_numbers
from optin_deploy.data.preprocessing import ImagePreprocessing, PicturePreprocessing, TextPreprocessing
from optin_deploy.data.unread import unread
from optin_deploy.errors import UserError
from optin_deploy.evaluation.dataset import Dataset
from optin_deploy.evaluation.texts import load_texts
from optin_deploy.network import Network
from optin_deploy.nn.task_head import answers
from optin_deploy.utils.paths import check_there
from optin_deploy.utils.progress import track

_BATCH_SIZE = 64


def load_dataset(network: Network, path: Path, columns: str | None = None) -> Dataset:
    """A folder with one folder of images per class (top-1), or a table of texts (see `tables`).

    Class folders are named as the network calls its classes, by ImageNet synset or by class number from 0. Where the
    network has no names, and there is a folder for every class, they may be in the order that the network's library
    sorts folders in (see ``labels``).

    Args:
        columns: of a table, by names of its header or numbers from 1: "text,label", "first+second,label" or
            "first,second,label" (see `text_evaluation.load_texts`); without it, tables of two and of three columns are
            taken in this order.

    Raises:
        UserError: the data is unreadable, empty, or does not suit the network.
    """
    check_there(path, "evaluation data")
    if isinstance(network.preprocessing, PicturePreprocessing):
        return _images(network, path)
    if not isinstance(network.preprocessing, TextPreprocessing):
        if told := unread(network):
            raise UserError(f"--evaluate {path}: {told}, and evaluate the pruned network in Python")
        raise UserError(f"{network.source.name} is a network without preprocessing: it cannot be evaluated on files")
    return load_texts(network, network.preprocessing, path, columns)


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
    if network.head == "regression":
        raise UserError("the network gives numbers, not classes: evaluate it on a table of texts and numbers, or not")
    folders = [file.relative_to(path).parts[0] for file in labelled]
    numbers = class_numbers(network, path, sorted(set(folders)))
    labels = [numbers[folder] for folder in folders]
    check_images(labelled, preprocessing)

    def measure(module: nn.Module) -> float:
        def predicted(part: list[Path]) -> Tensor:
            return _classes(network, _run(network, module, preprocessing(read_images(part))))

        return _accuracy(labelled, labels, predicted)

    metric = "accuracy" if network.head == "binary" else "top-1"
    return Dataset(metric, str(path), len(labelled), measure)


def _run(network: Network, module: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    with torch.no_grad():
        return network.forward({name: t.to(device) for name, t in batch.items()}, module)


def _classes(network: Network, outputs: Mapping[str, Tensor]) -> Tensor:
    """Class numbers ``(batch,)`` that the logits give; of a single logit 1 for yes."""
    found = answers(network.head, outputs[network.logits or ""])
    return found.reshape(len(found)).long()


def _accuracy(items: Sequence[object], labels: Sequence[int], predict: Callable[..., Tensor]) -> float:
    """How often ``predict`` gives the label of an item, in per cent."""
    right = 0
    for start in track(range(0, len(items), _BATCH_SIZE)):
        part = items[start : start + _BATCH_SIZE]
        predicted = predict(list(part)).cpu()
        right += int((predicted == torch.tensor(labels[start : start + _BATCH_SIZE])).sum())
    return 100 * right / len(items)
