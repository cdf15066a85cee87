"""Class numbers from what files say: class folders, and labels in tables."""

from pathlib import Path

import torch

from optin_deploy.errors import UserError
from optin_deploy.network import Network


def class_numbers(network: Network, path: Path, folders: list[str]) -> dict[str, int]:
    """Class folders in the order of their names where there is one for every class, else what their names say."""
    classes = class_count(network)
    if len(folders) == classes:
        return {folder: number for number, folder in enumerate(folders)}
    try:
        return {folder: class_number(network, folder, classes) for folder in folders}
    except ValueError as error:
        raise UserError(
            f"{path} has {len(folders)} class folders, the network tells {classes} classes: give one folder "
            f"with images for every class, or name folders by class number or label; {error}"
        ) from error


def class_count(network: Network) -> int:
    """How many classes the network tells apart."""
    with torch.inference_mode():
        return network.forward(network.inputs)[network.logits or ""].shape[-1]


def class_number(network: Network, label: str, classes: int) -> int:
    """The number of a class given by number, or by its name in the network's configuration; ValueError if neither."""
    names = getattr(getattr(network.module, "config", None), "label2id", None) or {}
    if label in names:
        return int(names[label])
    if label.isdecimal() and int(label) < classes:
        return int(label)
    known = f" and none of {', '.join(map(str, names))}"[:120] if names else ""
    raise ValueError(f"label {label!r} is no class number from 0 to {classes - 1}{known}")
