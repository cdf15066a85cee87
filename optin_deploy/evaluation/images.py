"""Accuracy on images in class folders."""

from pathlib import Path

import torch
from torch import nn

from optin_deploy.data.image_files import check_image_input, check_images, images_in_folders, read_images
from optin_deploy.data.labels import classes_of_folders
from optin_deploy.data.preprocessing import ImagePreprocessing, VisionPreprocessing
from optin_deploy.errors import UserError
from optin_deploy.evaluation.dataset import Dataset, compute_logits
from optin_deploy.network import Network
from optin_deploy.nn.task_head import answers
from optin_deploy.utils.progress import track

_BATCH_SIZE = 64


def load_images(network: Network, preprocessing: VisionPreprocessing, path: Path) -> Dataset:
    """Return the images in class folders of ``path`` as a data set of top-1 accuracy.

    Raises:
        UserError: an image cannot be read, a folder matches no class, or the network is no image classifier.
    """
    check_image_input(network, preprocessing)
    if isinstance(preprocessing, ImagePreprocessing) and preprocessing.assumed:
        raise UserError(
            f"the files of {network.source.name} do not say how images are prepared, so top-1 would be a guess: save "
            "its image processor next to the weights (preprocessor_config.json)"
        )
    files = images_in_folders(path)
    if network.logits is None:
        raise UserError("the network has no class logits: top-1 cannot be measured")
    if network.head == "regression":
        raise UserError("the network predicts numbers, not classes: evaluate it on a table of texts and numbers")
    folders = [file.relative_to(path).parts[0] for file in files]
    numbers = classes_of_folders(network, path, sorted(set(folders)))
    labels = torch.tensor([numbers[folder] for folder in folders])
    check_images(files, preprocessing)

    def measure(module: nn.Module) -> float:
        correct = 0
        for start in track(range(0, len(files), _BATCH_SIZE)):
            batch = preprocessing(read_images(files[start : start + _BATCH_SIZE]))
            logits = compute_logits(network, module, batch)
            predicted = answers(network.head, logits).reshape(len(logits)).long()
            correct += int((predicted == labels[start : start + _BATCH_SIZE]).sum())
        return 100 * correct / len(files)

    metric = "accuracy" if network.head == "binary" else "top-1"
    return Dataset(metric, str(path), len(files), measure)
