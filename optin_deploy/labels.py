"""Class numbers from what files say: class folders, and labels in tables."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.places import hidden
from optin_deploy.task_head import is_single


def class_numbers(network: Network, path: Path, folders: list[str]) -> dict[str, int]:
    """Class folders in the order of their names where there is one for every class, else what their names say."""
    classes = class_count(network)
    if len(folders) == classes:
        return {folder: number for number, folder in enumerate(folders)}
    try:
        return {folder: class_number(network, folder, classes) for folder in folders}
    except ValueError as error:
        empty = sorted(p.name for p in path.iterdir() if p.is_dir() and p.name not in folders and not hidden(p.name))
        why = f"{', '.join(map(repr, empty))[:80]} without images" if empty else str(error)
        raise UserError(
            f"{path} has {len(folders)} class folders, the network tells {classes} classes: give one folder "
            f"with images for every class, or name folders by class number or label; {why}"
        ) from error


def class_count(network: Network) -> int:
    """How many classes the network tells apart: two by a single logit, no and yes.

    Raises:
        UserError: one label cannot say what is right for a sample: the network gives numbers, several yes or no for
            each sample, or answers for each token or pixel.
    """
    with torch.inference_mode():
        logits = network.forward(network.inputs)[network.logits or ""]
    if network.head == "regression":
        raise UserError("the network gives numbers, not classes: labels of classes mean nothing for it")
    single = network.head == "binary" and is_single(logits)
    if logits.dim() > 2:
        raise UserError(
            f"the network gives logits of shape {tuple(logits.shape)}, an answer for every token or pixel: one label a "
            "sample cannot say whether they are right"
        )
    if network.head == "binary" and not single:
        raise UserError(
            f"the network gives {logits.shape[-1]} answers of yes or no for each sample: one label a sample cannot say "
            "whether they are right"
        )
    return 2 if single else logits.shape[-1]


def class_number(network: Network, label: str, classes: int) -> int:
    """The number of a class given by number, or by its name in the network's configuration; ValueError if neither."""
    names = _names(getattr(network.module, "config", None))
    if network.head == "binary" and len(names) < 2:
        # One name is that of the logit, "LABEL_0" where nobody gave any: what a yes says, and not what no does.
        names = {name: 1 for name in names if name != "LABEL_0"}
    if label in names:
        number = names[label]
        if isinstance(number, str) and number.isdecimal():
            number = int(number)
        if isinstance(number, int | float) and number in range(classes):
            return int(number)
        raise ValueError(
            f"label {label!r} is {str(number)[:40]} by the model's config.json, which is no class number from 0 to "
            f"{classes - 1}: correct label2id and id2label there"
        )
    if label.isdecimal() and int(label) < classes:
        return int(label)
    known = f" and none of {', '.join(map(str, names))}"[:120] if names else ""
    hint = ": use these, or name the classes by id2label in the model's config.json" if names else ""
    raise ValueError(f"label {label!r} is no class number from 0 to {classes - 1}{known}{hint}")


def _names(config: Any) -> dict[str, Any]:
    """Numbers by class name, of both maps of transformers: whoever names classes by hand often writes one only."""
    by_number, by_name = (getattr(config, key, None) for key in ("id2label", "label2id"))
    names = {str(name): number for number, name in by_number.items()} if isinstance(by_number, Mapping) else {}
    return {**names, **(by_name if isinstance(by_name, Mapping) else {})}
