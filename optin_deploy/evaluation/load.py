"""Load a labelled data set for a network: class folders of images, or a table of texts."""

from pathlib import Path

from optin_deploy.data.image_files import channels_error
from optin_deploy.data.preprocessing import TextPreprocessing, VisionPreprocessing
from optin_deploy.errors import UserError
from optin_deploy.evaluation.dataset import Dataset
from optin_deploy.evaluation.images import load_images
from optin_deploy.evaluation.texts import load_texts
from optin_deploy.network import Network
from optin_deploy.utils.paths import check_exists


def load_dataset(network: Network, path: Path, columns: str | None = None) -> Dataset:
    """Return a folder with one folder of images per class (top-1), or a table of texts (see `tables`), as a data set.

    Class folders are named by the network's class names, by ImageNet synset or by class number from 0. If the network
    has no names and there is a folder for every class, their sorted order decides (see ``data.labels``).

    Args:
        columns: columns of a table, by names of its header or numbers from 1: "text,label", "first+second,label" or
            "first,second,label" (see `load_texts`). When None, tables of two and of three columns are read in this
            order.

    Raises:
        UserError: the data is unreadable, empty, or does not suit the network.
    """
    check_exists(path, "evaluation data")
    preprocessing = network.preprocessing
    if isinstance(preprocessing, VisionPreprocessing):
        return load_images(network, preprocessing, path)
    if isinstance(preprocessing, TextPreprocessing):
        return load_texts(network, preprocessing, path, columns)
    if reason := channels_error(network):
        raise UserError(f"--evaluate {path}: {reason}, and evaluate the pruned network in Python")
    raise UserError(f"{network.source.name} is a network without preprocessing: it cannot be evaluated on files")
