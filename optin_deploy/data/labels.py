"""Class numbers from what files say: class folders, and labels in tables.

Names come before order. A folder is named by what the network calls a class, by an ImageNet synset, or by class number.
Where the network has no names and there is a folder for every class, the order of the folders tells, as the network's
library sorts them: timm in natural order (2 before 10), all others in plain order ("10" before "2").
"""

import logging
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from timm.data import ImageNetInfo, infer_imagenet_subset
from timm.utils.misc import natural_key

from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.nn.task_head import is_single
from optin_deploy.utils.paths import hidden

logger = logging.getLogger(__name__)

# What transformers calls classes that nobody has named.
_PLACEHOLDER = re.compile(r"label[_ -]?(\d+)", re.IGNORECASE)
# Parts of a data set. As class folders they are a mistake.
_SPLITS = frozenset({"train", "training", "val", "valid", "validation", "dev", "test", "testing"})
# So large a share of names agrees where a network tells the classes of ImageNet apart. Its lists differ in a few words.
_SAME_NAMES = 0.9


@dataclass(frozen=True)
class _Names:
    """Class numbers by name.

    Attributes:
        own: as the network's files name the classes.
        alike: the same by the names that `normalised` makes of these.
        table: as ImageNet does, where the network tells its classes apart.
        classes: how many there are.
    """

    own: Mapping[str, frozenset[int]]
    alike: Mapping[str, frozenset[int]]
    table: Mapping[str, frozenset[int]]
    classes: int

    def named(self, folder: str) -> frozenset[int]:
        """The classes of that name, or of one like it where none has it exactly."""
        plain = normalised(folder)
        return self.own.get(folder) or self.alike.get(plain) or self.table.get(plain) or frozenset()

    def numbered(self, folder: str) -> frozenset[int]:
        """The class whose number the folder's name is; none where names of classes are numbers themselves."""
        if any(name.isdecimal() for name in self.own):
            return frozenset()
        placeholder = _PLACEHOLDER.fullmatch(folder)
        digits = placeholder[1] if placeholder else folder
        number = int(digits) if digits.isdecimal() and len(digits) <= 20 else self.classes
        return frozenset({number} if number < self.classes else ())


def class_numbers(network: Network, path: Path, folders: list[str]) -> dict[str, int]:
    """The class number of each of ``folders`` (in ``path``, with images).

    Raises:
        UserError: a name is of no class or of several, two folders are of one class, or their order can be read in
            two ways.
    """
    classes = class_count(network)
    names = _names(network, classes)
    found = {folder: names.named(folder) or names.numbered(folder) for folder in folders}
    unknown = [folder for folder in folders if not found[folder]]
    if unknown:
        _check_splits(path, folders)
        _check_unknown(path, names, folders, unknown)
        ordered = sorted(folders, key=natural_key if network.source.library == "timm" else None)
        _check_order(network, path, ordered)
        return {folder: number for number, folder in enumerate(ordered)}
    numbers = _single(path, found)
    if len(folders) == classes and not names.own and not any(map(names.named, folders)):
        _check_order(network, path, sorted(folders, key=lambda folder: numbers[folder]))
    return numbers


def class_count(network: Network) -> int:
    """How many classes the network tells apart: two by a single logit, no and yes.

    Raises:
        UserError: one label cannot say what is right for a sample: the network gives numbers, several yes or no for
            each sample, or answers for each token or pixel.
    """
    with torch.no_grad():
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
    """The number of a class given by number, or by its name in the network's files; ValueError if neither."""
    pairs = _named_numbers(network)
    numbers = {_checked(name, number, classes) for name, number in pairs if name == label}
    if not numbers and label.isdecimal() and int(label) < classes:
        return int(label)
    if not numbers:
        plain = normalised(label)
        numbers = {_checked(name, number, classes) for name, number in pairs if normalised(name) == plain}
    if len(numbers) > 1:
        told = " and ".join(map(str, sorted(numbers)))
        raise ValueError(f"label {label!r} is the name of classes {told}: correct label2id and id2label in config.json")
    if numbers:
        return numbers.pop()
    known = f" and none of {', '.join(dict.fromkeys(name for name, _ in pairs))}"[:120] if pairs else ""
    hint = ": use these, or name the classes by id2label in the model's config.json" if pairs else ""
    raise ValueError(f"label {label!r} is no class number from 0 to {classes - 1}{known}{hint}")


def normalised(name: str) -> str:
    """``name`` without what is written in different ways: case, accents as one or two characters, and what parts words:
    spaces, underscores, hyphens."""
    return " ".join(re.split(r"[\s_-]+", unicodedata.normalize("NFKC", name).casefold().strip(" _-\t")))


def _checked(name: str, number: Any, classes: int) -> int:
    if isinstance(number, str) and number.isdecimal():
        number = int(number)
    if isinstance(number, int | float) and number in range(classes):
        return int(number)
    raise ValueError(
        f"label {name!r} is {str(number)[:40]} by the model's config.json, which is no class number from 0 to "
        f"{classes - 1}: correct label2id and id2label there"
    )


def _named_numbers(network: Network) -> list[tuple[str, Any]]:
    """Names of classes and their numbers, of both maps of transformers: by hand, people often write one only."""
    config = getattr(network.module, "config", None)
    by_number, by_name = (getattr(config, key, None) for key in ("id2label", "label2id"))
    pairs: list[tuple[str, Any]] = [(name, n) for n, told in enumerate(network.class_names) for name in told]
    pairs += [(str(name), number) for number, name in by_number.items()] if isinstance(by_number, Mapping) else []
    pairs += [(str(name), number) for name, number in by_name.items()] if isinstance(by_name, Mapping) else []
    if network.head == "binary" and len({name for name, _ in pairs}) == 1:
        # The one name says what a yes means; what a no means has no name.
        return [(name, 1) for name, _ in pairs if not _PLACEHOLDER.fullmatch(name)]
    return pairs


def _names(network: Network, classes: int) -> _Names:
    try:
        real = [(n, _checked(n, c, classes)) for n, c in _named_numbers(network) if not _PLACEHOLDER.fullmatch(n)]
    except ValueError as error:
        raise UserError(str(error)) from error
    own = _collected(real)
    alike = _collected((word, number) for name, number in real for word in _words(name))
    return _Names(own, alike, _table(classes, alike), classes)


def _collected(pairs: Iterable[tuple[str, int]]) -> dict[str, frozenset[int]]:
    found: dict[str, set[int]] = {}
    for name, number in pairs:
        found.setdefault(name, set()).add(number)
    return {name: frozenset(numbers) for name, numbers in found.items()}


def _words(name: str) -> set[str]:
    """A name as it is compared, and the words in it that commas part: "tench, Tinca tinca" is both."""
    return {normalised(each) for each in (name, *name.split(","))} - {""}


@cache
def _imagenet(subset: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Synsets and descriptions of the classes of ImageNet, or of a part of it, in their order."""
    info = ImageNetInfo(subset)
    return tuple(info.label_names()), tuple(info.label_descriptions())


def _table(classes: int, alike: Mapping[str, frozenset[int]]) -> dict[str, frozenset[int]]:
    """Class numbers by ImageNet's synsets, and by its words where the network has no names of its own (``alike``).

    Some networks have one class more, for what is none of the others, before all others: their own names tell that.
    """
    for first in (0, 1) if alike else (0,):
        subset = infer_imagenet_subset({"num_classes": classes - first})
        if subset is None:
            continue
        synsets, descriptions = _imagenet(subset)
        of_synset = _collected((synset, number) for number, synset in enumerate(synsets, first))
        told = [{synset, *_words(words)} for synset, words in zip(synsets, descriptions, strict=True)]
        if not alike:
            return {**_collected((word, n) for n, words in enumerate(told) for word in words), **of_synset}
        same = sum(any(n in alike.get(word, ()) for word in words) for n, words in enumerate(told, first))
        if same >= _SAME_NAMES * len(told):
            return of_synset
    return {}


def _check_splits(path: Path, folders: Sequence[str]) -> None:
    """Raise UserError where the folders are parts of a data set."""
    if folders and all(folder.casefold() in _SPLITS for folder in folders):
        raise UserError(
            f"{path} holds {', '.join(folders)}, which are parts of a data set and no classes: give one of them, as in "
            f"{path / folders[-1]}"
        )


def _single(path: Path, found: Mapping[str, frozenset[int]]) -> dict[str, int]:
    """The one class of each folder; UserError where that is not one, or is the same for two."""
    of_class: dict[int, str] = {}
    for folder, numbers in found.items():
        if len(numbers) > 1:
            raise UserError(
                f"{path}: folder {folder!r} is the name of classes {', '.join(map(str, sorted(numbers)))}: name the "
                "folder by class number, or correct label2id and id2label in config.json"
            )
        (number,) = numbers
        if number in of_class:
            raise UserError(
                f"{path}: folders {of_class[number]!r} and {folder!r} are both of class {number}: put their images "
                "into one, or rename one"
            )
        of_class[number] = folder
    return {folder: number for number, folder in of_class.items()}


def _check_unknown(path: Path, names: _Names, folders: Sequence[str], unknown: Sequence[str]) -> None:
    """Raise UserError unless the order of folders can tell their classes, although ``unknown`` are no names."""
    listed = _listed(unknown)
    if names.own:
        known = _listed([name for name, _ in sorted(names.own.items(), key=lambda each: min(each[1]))])
        first = sorted(folders)[0]
        called = next((name for name, numbers in names.own.items() if 0 in numbers), "class 0")
        by_order = (
            f"; in the order of names {first!r} would be class 0, which the network calls {called!r}"
            if len(folders) == names.classes
            else ""
        )
        raise UserError(
            f"{path} has {len(folders)} class folders, the network tells {names.classes} classes, and calls none "
            f"{listed} but {known}{by_order}: name folders by these, or by class number from 0"
        )
    if len(folders) != names.classes:
        empty = sorted(p.name for p in path.iterdir() if p.is_dir() and p.name not in folders and not hidden(p.name))
        why = (
            f"{', '.join(map(repr, empty))[:80]} without images"
            if empty
            else f"{listed} is no class number from 0 to {names.classes - 1}"
        )
        raise UserError(
            f"{path} has {len(folders)} class folders, the network tells {names.classes} classes: give one folder "
            f"with images for every class, or name folders by class number or label; {why}"
        )
    of_table = [folder for folder in folders if names.named(folder)]
    if 2 * len(of_table) >= len(folders):
        raise UserError(
            f"{path}: {len(of_table)} of {len(folders)} class folders are named as ImageNet's classes are, {listed} "
            "not: name all of them by synset (n01440764) or by class number"
        )


def _check_order(network: Network, path: Path, ordered: Sequence[str]) -> None:
    """Warn, or raise UserError, where folders ``ordered`` by what their classes seem to be are so in one way only."""
    plain = sorted(ordered)
    differ = next((n for n, pair in enumerate(zip(ordered, plain, strict=True)) if pair[0] != pair[1]), None)
    natural = sorted(ordered, key=natural_key)
    if differ is None and network.source.library != "timm":
        differ = next((n for n, pair in enumerate(zip(natural, plain, strict=True)) if pair[0] != pair[1]), None)
    if differ is None:
        told = ", ".join(f"{folder} = {number}" for number, folder in enumerate(ordered[:20]))
        logger.info("class folders of %s in the order of their names: %s", path, told[:300])
        return
    readings = (
        f"class {differ} is {natural[differ]!r} in natural order (as timm sorts them) and {plain[differ]!r} in plain "
        "order (as torchvision's ImageFolder and datasets sort them)"
    )
    if network.source.library != "timm":
        raise UserError(
            f"{path}: the order of the class folders is not clear: {readings}; rename them so that both are the same "
            "(01, 02, …), or name the classes by id2label in the model's config.json"
        )
    logger.warning("class folders of %s are taken in natural order: %s", path, readings)


def _listed(names: Sequence[str]) -> str:
    told = ", ".join(repr(name[:40]) for name in names[:3])
    return told + f" and {len(names) - 3} more" * (len(names) > 3)
