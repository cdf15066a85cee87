"""Class numbers of labels in data sets: names of class folders, and labels in tables.

Names are matched before order. A class folder is named by the network's name of the class, by an ImageNet synset, or by
class number. If the network has no names and there is a folder for every class, the order of the folders decides, as
the network's library sorts them: timm in natural order (2 before 10), all others in plain order ("10" before "2").
"""

import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.utils.misc import natural_key

from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.nn.task_head import is_single
from optin_deploy.utils.paths import is_hidden

logger = logging.getLogger(__name__)

# The names that transformers generates for classes without names.
_PLACEHOLDER = re.compile(r"label[_ -]?(\d+)", re.IGNORECASE)
# Names of splits, which are not classes.
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})
# A network has the classes of ImageNet if this share of its names agrees; published lists differ in a few words.
_SAME_NAMES = 0.9


@dataclass(frozen=True)
class _ClassNames:
    """Class numbers by name.

    Attributes:
        exact: by the names in the network's files.
        normalized: by these names after `normalize_name`.
        imagenet: by ImageNet's names, if the network has the classes of ImageNet.
        classes: number of classes.
    """

    exact: Mapping[str, frozenset[int]]
    normalized: Mapping[str, frozenset[int]]
    imagenet: Mapping[str, frozenset[int]]
    classes: int

    def find_by_name(self, folder: str) -> frozenset[int]:
        """Return the classes with exactly this name, or else with a similar one."""
        name = normalize_name(folder)
        return self.exact.get(folder) or self.normalized.get(name) or self.imagenet.get(name) or frozenset()

    def find_by_number(self, folder: str) -> frozenset[int]:
        """Return the class whose number is the folder's name; empty if names of classes are numbers themselves."""
        if any(name.isdecimal() for name in self.exact):
            return frozenset()
        placeholder = _PLACEHOLDER.fullmatch(folder)
        digits = placeholder[1] if placeholder else folder
        number = int(digits) if digits.isdecimal() and len(digits) <= 20 else self.classes
        return frozenset({number} if number < self.classes else ())


def classes_of_folders(network: Network, path: Path, folders: list[str]) -> dict[str, int]:
    """Return the class number of each of ``folders``, the folders with images in ``path``.

    Raises:
        UserError: a name matches no class or several, two folders match one class, or the order of folders is
            ambiguous.
    """
    classes = class_count(network)
    names = _class_names(network, classes)
    matches = {folder: names.find_by_name(folder) or names.find_by_number(folder) for folder in folders}
    unknown = [folder for folder in folders if not matches[folder]]
    if unknown:
        _check_splits(path, folders)
        _check_unknown(path, names, folders, unknown)
        ordered = sorted(folders, key=natural_key if network.source.library == "timm" else None)
        _check_order(network, path, ordered)
        return {folder: number for number, folder in enumerate(ordered)}
    numbers = _match_one_to_one(path, matches)
    if len(folders) == classes and not names.exact and not any(map(names.find_by_name, folders)):
        _check_order(network, path, sorted(folders, key=lambda folder: numbers[folder]))
    return numbers


def class_count(network: Network) -> int:
    """Return the number of classes that the network predicts; 2 (no and yes) for a single logit.

    Raises:
        UserError: a sample has no single class: the network predicts plain numbers, several yes or no answers, or an
            answer for each token or pixel.
    """
    with torch.no_grad():
        logits = network.forward(network.inputs)[network.logits or ""]
    if network.head == "regression":
        raise UserError("the network predicts numbers, not classes: class labels do not apply")
    single = network.head == "binary" and is_single(logits)
    if logits.dim() > 2:
        raise UserError(
            f"the network returns logits of shape {tuple(logits.shape)}, an answer for every token or pixel: one label "
            "per sample is not enough"
        )
    if network.head == "binary" and not single:
        raise UserError(
            f"the network returns {logits.shape[-1]} answers of yes or no for each sample: one label per sample is not "
            "enough"
        )
    return 2 if single else logits.shape[-1]


def class_number(network: Network, label: str, classes: int) -> int:
    """Return the class number of a label: a number, or a name in the network's files; ValueError if neither."""
    pairs = _name_number_pairs(network)
    numbers = {_check_number(name, number, classes) for name, number in pairs if name == label}
    if not numbers and label.isdecimal() and int(label) < classes:
        return int(label)
    if not numbers:
        wanted = normalize_name(label)
        numbers = {_check_number(name, number, classes) for name, number in pairs if normalize_name(name) == wanted}
    if len(numbers) > 1:
        several = " and ".join(map(str, sorted(numbers)))
        raise ValueError(
            f"label {label!r} is the name of classes {several}: correct label2id and id2label in config.json"
        )
    if numbers:
        return numbers.pop()
    known = f" and none of {', '.join(dict.fromkeys(name for name, _ in pairs))}"[:120] if pairs else ""
    hint = ": use these, or name the classes by id2label in the model's config.json" if pairs else ""
    raise ValueError(f"label {label!r} is no class number from 0 to {classes - 1}{known}{hint}")


def normalize_name(name: str) -> str:
    """Return ``name`` in lower case and NFKC, its words separated by single spaces instead of ``_`` and ``-``."""
    return " ".join(re.split(r"[\s_-]+", unicodedata.normalize("NFKC", name).casefold().strip(" _-\t")))


def _check_number(name: str, number: object, classes: int) -> int:
    """Return the class number that a configuration states for ``name``; ValueError if it is none."""
    if isinstance(number, str) and number.isdecimal():
        number = int(number)
    if isinstance(number, int | float) and number in range(classes):
        return int(number)
    raise ValueError(
        f"label {name!r} has number {str(number)[:40]} in the model's config.json, which is no class number from 0 to "
        f"{classes - 1}: correct label2id and id2label there"
    )


def _name_number_pairs(network: Network) -> list[tuple[str, object]]:
    """Return class names with their numbers, from both maps of transformers: people often edit only one of them."""
    config = getattr(network.module, "config", None)
    by_number, by_name = (getattr(config, key, None) for key in ("id2label", "label2id"))
    pairs: list[tuple[str, object]] = [(name, n) for n, names in enumerate(network.class_names) for name in names]
    pairs += [(str(name), number) for number, name in by_number.items()] if isinstance(by_number, Mapping) else []
    pairs += [(str(name), number) for name, number in by_name.items()] if isinstance(by_name, Mapping) else []
    if network.head == "binary" and len({name for name, _ in pairs}) == 1:
        # The only name is that of "yes".
        return [(name, 1) for name, _ in pairs if not _PLACEHOLDER.fullmatch(name)]
    return pairs


def _class_names(network: Network, classes: int) -> _ClassNames:
    try:
        pairs = [
            (name, _check_number(name, number, classes))
            for name, number in _name_number_pairs(network)
            if not _PLACEHOLDER.fullmatch(name)
        ]
    except ValueError as error:
        raise UserError(str(error)) from error
    normalized = _group_by_name((synonym, number) for name, number in pairs for synonym in _synonyms(name))
    return _ClassNames(_group_by_name(pairs), normalized, _imagenet_names(classes, normalized), classes)


def _group_by_name(pairs: Iterable[tuple[str, int]]) -> dict[str, frozenset[int]]:
    numbers: dict[str, set[int]] = {}
    for name, number in pairs:
        numbers.setdefault(name, set()).add(number)
    return {name: frozenset(group) for name, group in numbers.items()}


def _synonyms(name: str) -> set[str]:
    """Return the normalized name and its comma-separated parts: "tench, Tinca tinca" has three."""
    return {normalize_name(part) for part in (name, *name.split(","))} - {""}


@cache
def _imagenet(subset: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the synsets and the descriptions of the classes of ImageNet or a subset, in order."""
    info = ImageNetInfo(subset)
    return tuple(info.label_names()), tuple(info.label_descriptions())


def _imagenet_names(classes: int, own: Mapping[str, frozenset[int]]) -> dict[str, frozenset[int]]:
    """Return class numbers by ImageNet's synsets, and by its descriptions if the network has no names (``own``).

    Some networks have a background class before all others; their own names show that. Empty for other networks.
    """
    for first in (0, 1) if own else (0,):
        subset = infer_imagenet_subset({"num_classes": classes - first})
        if subset is None:
            continue
        synsets, descriptions = _imagenet(subset)
        by_synset = _group_by_name((synset, number) for number, synset in enumerate(synsets, first))
        names = [{synset, *_synonyms(text)} for synset, text in zip(synsets, descriptions, strict=True)]
        if not own:
            return {**_group_by_name((name, n) for n, group in enumerate(names) for name in group), **by_synset}
        same = sum(any(n in own.get(name, ()) for name in group) for n, group in enumerate(names, first))
        if same >= _SAME_NAMES * len(names):
            return by_synset
    return {}


def _check_splits(path: Path, folders: Sequence[str]) -> None:
    """Raise UserError if the folders are splits of a data set."""
    if folders and all(folder.casefold() in _SPLITS for folder in folders):
        raise UserError(
            f"{path} holds {', '.join(folders)}, which are splits of a data set and no classes: give one of them, as "
            f"in {path / folders[-1]}"
        )


def _match_one_to_one(path: Path, matches: Mapping[str, frozenset[int]]) -> dict[str, int]:
    """Return the class of each folder; UserError if a folder matches several classes, or two folders the same."""
    folder_of: dict[int, str] = {}
    for folder, numbers in matches.items():
        if len(numbers) > 1:
            raise UserError(
                f"{path}: folder {folder!r} is the name of classes {', '.join(map(str, sorted(numbers)))}: name the "
                "folder by class number, or correct label2id and id2label in config.json"
            )
        (number,) = numbers
        if number in folder_of:
            raise UserError(
                f"{path}: folders {folder_of[number]!r} and {folder!r} are both of class {number}: put their images "
                "into one, or rename one"
            )
        folder_of[number] = folder
    return {folder: number for number, folder in folder_of.items()}


def _check_unknown(path: Path, names: _ClassNames, folders: Sequence[str], unknown: Sequence[str]) -> None:
    """Raise UserError unless the order of the folders can decide, although the names of ``unknown`` match no class."""
    examples = _examples(unknown)
    if names.exact:
        known = _examples([name for name, _ in sorted(names.exact.items(), key=lambda item: min(item[1]))])
        first = sorted(folders)[0]
        called = next((name for name, numbers in names.exact.items() if 0 in numbers), "class 0")
        by_order = (
            f"; in the order of names {first!r} would be class 0, which the network calls {called!r}"
            if len(folders) == names.classes
            else ""
        )
        raise UserError(
            f"{path} has {len(folders)} class folders, the network has {names.classes} classes, and calls none "
            f"{examples} but {known}{by_order}: name folders by these, or by class number from 0"
        )
    if len(folders) != names.classes:
        empty = sorted(p.name for p in path.iterdir() if p.is_dir() and p.name not in folders and not is_hidden(p.name))
        why = (
            f"{', '.join(map(repr, empty))[:80]} without images"
            if empty
            else f"{examples} is no class number from 0 to {names.classes - 1}"
        )
        raise UserError(
            f"{path} has {len(folders)} class folders, the network has {names.classes} classes: give one folder "
            f"with images for every class, or name folders by class number or label; {why}"
        )
    matched = sum(bool(names.find_by_name(folder)) for folder in folders)
    if 2 * matched >= len(folders):
        raise UserError(
            f"{path}: {matched} of {len(folders)} class folders have names of ImageNet classes, but {examples} not: "
            "name all of them by synset (n01440764) or by class number"
        )


def _check_order(network: Network, path: Path, ordered: Sequence[str]) -> None:
    """Raise UserError, or warn for timm, if natural and plain order of the folders differ.

    Args:
        ordered: the folders in the order of the class numbers that are about to be used.
    """
    plain, natural = sorted(ordered), sorted(ordered, key=natural_key)
    differ = _first_difference(ordered, plain)
    if differ is None and network.source.library != "timm":
        differ = _first_difference(natural, plain)
    if differ is None:
        assigned = ", ".join(f"{folder} = {number}" for number, folder in enumerate(ordered[:20]))
        logger.info("class folders of %s in the order of their names: %s", path, assigned[:300])
        return
    readings = (
        f"class {differ} is {natural[differ]!r} in natural order (as timm sorts them) and {plain[differ]!r} in plain "
        "order (as torchvision's ImageFolder and datasets sort them)"
    )
    if network.source.library != "timm":
        raise UserError(
            f"{path}: the order of the class folders is ambiguous: {readings}; rename them so that both are the same "
            "(01, 02, …), or name the classes by id2label in the model's config.json"
        )
    logger.warning("class folders of %s are taken in natural order: %s", path, readings)


def _first_difference(one: Sequence[str], other: Sequence[str]) -> int | None:
    return next((n for n, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)


def _examples(names: Sequence[str]) -> str:
    return ", ".join(repr(name[:40]) for name in names[:3]) + f" and {len(names) - 3} more" * (len(names) > 3)
