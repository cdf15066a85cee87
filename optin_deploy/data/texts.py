"""Texts and pairs of texts from files, and the class numbers of their labels."""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from optin_deploy.data.labels import class_count, class_number
from optin_deploy.data.preprocessing import Text, TextPreprocessing
from optin_deploy.data.tables import TABLE_KINDS, TextTable, is_table, read_lines, read_table
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.nn.batches import Batch

T = TypeVar("T")

logger = logging.getLogger(__name__)


def read_texts(path: Path, columns: str | None) -> list[Text]:
    """Return the distinct texts of a text file (one per line) or of columns of a table, in order.

    Args:
        columns: comma-separated; each is a column of texts or, as ``first+second``, the two columns of pairs.

    Raises:
        UserError: the file cannot be read or holds no texts, or a column does not exist.
    """
    if is_table(path):
        texts = _table_texts(read_table(path), columns)
    elif path.is_dir():
        raise UserError(
            f"{path} is a folder: a text network calibrates on a text file, a table ({TABLE_KINDS}), .npz or "
            ".safetensors"
        )
    else:
        texts = list(read_lines(path))
    distinct = [text for text in dict.fromkeys(strip_texts(texts)) if any(text)]
    if not distinct:
        raise UserError(f"{path} holds no texts")
    return distinct


def _table_texts(table: TextTable, columns: str | None) -> list[Text]:
    if columns is None:
        # A table with a header and one column needs no choice.
        if table.header is None or table.width != 1:
            choices = f" of {', '.join(table.header)[:120]}" if table.header else " (a number if it has no header)"
            raise UserError(f"{table.path} is a table: name its text column with --calibration-column{choices}")
        columns = "1"
    groups = table.split(columns)
    check_groups(groups, f"--calibration-column {columns}")
    rows = table.select([name for group in groups for name in group])
    size = len(groups[0])
    return [_text(row[start : start + size]) for row in rows for start in range(0, len(row), size)]


def check_groups(groups: Sequence[tuple[str, ...]], option: str) -> None:
    """Raise UserError unless the groups of columns are all texts or all pairs; ``option`` is how they were given."""
    if any(len(group) > 2 for group in groups):
        raise UserError(f"{option}: a pair has two columns, as in first+second")
    if len({len(group) for group in groups}) > 1:
        raise UserError(f"{option}: give columns of texts, as in a,b, or of pairs, as in a+b,c+d, not both")


def _text(cells: Sequence[str]) -> Text:
    return cells[0] if len(cells) == 1 else (cells[0], cells[1])


def as_texts(rows: Sequence[Sequence[str]], group: tuple[str, ...]) -> list[Text]:
    """Return the texts or pairs in the first ``len(group)`` columns of ``rows``."""
    return [_text(row[: len(group)]) for row in rows]


def strip_texts(texts: Sequence[Text]) -> list[Text]:
    """Return ``texts`` without surrounding white space."""
    return [text.strip() if isinstance(text, str) else (text[0].strip(), text[1].strip()) for text in texts]


def text_length(text: Text) -> int:
    """Return the number of characters of a text, or of both texts of a pair."""
    return len(text) if isinstance(text, str) else sum(map(len, text))


def check_texts(texts: Sequence[Text], preprocessing: TextPreprocessing, path: Path | None) -> None:
    """Raise UserError if a text has no tokens: no network takes an empty sequence."""
    empty = preprocessing.without_tokens(texts)
    if empty:
        first = empty[0] if isinstance(empty[0], str) else empty[0][0]
        raise UserError(
            f"{path}: {len(empty)} of {len(texts)} texts have no tokens, the first of them {first[:40]!r}: remove them"
        )


def split_batches(
    items: Sequence[T], to_batch: Callable[[Sequence[T]], Batch], most_tokens: int
) -> Iterator[tuple[Sequence[T], Batch]]:
    """Yield batches of ``items`` with their items, halved until a batch has at most ``most_tokens`` tokens."""
    batch = to_batch(items)
    if len(items) == 1 or max(tensor.shape[:2].numel() for tensor in batch.values()) <= most_tokens:
        yield items, batch
        return
    middle = len(items) // 2
    for half in (items[:middle], items[middle:]):
        yield from split_batches(half, to_batch, most_tokens)


def warn_truncated(texts: Sequence[Text], preprocessing: TextPreprocessing, source: str) -> None:
    """Warn if texts are truncated, with their number."""
    count = preprocessing.count_truncated(texts)
    if count:
        logger.warning(
            "%s: %d of %d texts are longer than %d tokens and are truncated",
            source,
            count,
            len(texts),
            preprocessing.max_length,
        )


def classes_of_labels(
    network: Network, labels: Sequence[str], path: Path, names: tuple[str, ...] | None = None
) -> list[int]:
    """Return the class number of each label, which is a number (also written 1.0) or a name.

    Args:
        names: the file's names for its class numbers. If the network knows all of these names, classes are matched by
            them: data sets and networks often number the same classes differently.

    Raises:
        UserError: a label is no class of the network.
    """
    classes = class_count(network)
    try:
        renumbered = _match_class_names(network, names, path) if names else {}
        numbers = {
            label: renumbered[plain]
            if (plain := label.strip()) in renumbered
            else _parse_label(network, plain, classes)
            for label in dict.fromkeys(labels)
        }
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return [numbers[label] for label in labels]


def _match_class_names(network: Network, names: tuple[str, ...], path: Path) -> dict[str, int]:
    """Return the file's class number -> the network's if the network knows all ``names``, else nothing."""
    id2label = getattr(getattr(network.module, "config", None), "id2label", None)
    if not isinstance(id2label, Mapping):
        return {}
    by_name = {str(name).casefold(): int(number) for number, name in id2label.items()}
    if all(name.casefold() in by_name for name in names):
        return {str(number): by_name[name.casefold()] for number, name in enumerate(names)}
    if any(str(name) != f"LABEL_{number}" for number, name in id2label.items()):
        logger.warning(
            "%s calls its classes %s, the network %s: they are matched by number; check that these agree",
            path,
            ", ".join(names)[:80],
            ", ".join(map(str, id2label.values()))[:80],
        )
    return {}


def _parse_label(network: Network, label: str, classes: int) -> int:
    try:
        return class_number(network, label, classes)
    except ValueError:
        try:
            number = float(label)
        except ValueError:
            number = math.nan
        if not number.is_integer() or label.isdecimal():
            raise
        return class_number(network, str(int(number)), classes)
