"""Texts and pairs of texts in files, and the class numbers that labels beside them stand for."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

from optin_deploy.data.labels import class_count, class_number
from optin_deploy.data.preprocessing import Text, TextPreprocessing
from optin_deploy.data.tables import TABLE_KINDS, Table, is_table, read_lines, read_table
from optin_deploy.errors import UserError
from optin_deploy.network import Network

logger = logging.getLogger(__name__)


def read_texts(path: Path, columns: str | None) -> list[Text]:
    """Distinct texts of a text file (one a line) or of columns of a table, in order.

    Args:
        columns: comma-separated, each a column of texts or, as ``first+second``, the two columns of pairs.
    """
    if is_table(path):
        texts = _of_table(read_table(path), columns)
    elif path.is_dir():
        raise UserError(
            f"{path} is a folder: a text network calibrates on a text file, a table ({TABLE_KINDS}), .npz or "
            ".safetensors"
        )
    else:
        texts = list(read_lines(path))
    found = [text for text in dict.fromkeys(map(_stripped, texts)) if any(text)]
    if not found:
        raise UserError(f"{path} holds no texts")
    return found


def _of_table(table: Table, columns: str | None) -> list[Text]:
    if columns is None:
        # A table that has a header and one column leaves nothing to choose.
        if table.header is None or table.width != 1:
            told = f" of {', '.join(table.header)[:120]}" if table.header else " (a number if it has no header)"
            raise UserError(f"{table.path} is a table: name its text column with --calibration-column{told}")
        columns = "1"
    groups = table.split(columns)
    check_groups(groups, f"--calibration-column {columns}")
    rows = table.select([name for group in groups for name in group])
    size = len(groups[0])
    return [_text(row[start : start + size]) for row in rows for start in range(0, len(row), size)]


def check_groups(groups: Sequence[tuple[str, ...]], option: str) -> None:
    """Raise UserError unless all groups of columns are texts, or all are pairs."""
    if any(len(group) > 2 for group in groups):
        raise UserError(f"{option}: a pair has two columns, as in first+second")
    if len({len(group) for group in groups}) > 1:
        raise UserError(f"{option}: give columns of texts, as in a,b, or of pairs, as in a+b,c+d, not both")


def _text(cells: Sequence[str]) -> Text:
    return cells[0] if len(cells) == 1 else (cells[0], cells[1])


def as_texts(rows: Sequence[Sequence[str]], group: tuple[str, ...]) -> list[Text]:
    """The texts or pairs in the first columns of ``rows``, as many as ``group`` has."""
    return [_text(row[: len(group)]) for row in rows]


def _stripped(text: Text) -> Text:
    return text.strip() if isinstance(text, str) else (text[0].strip(), text[1].strip())


def stripped(texts: Sequence[Text]) -> list[Text]:
    """``texts`` without white space around them."""
    return [_stripped(text) for text in texts]


def length(text: Text) -> int:
    """Characters of a text, or of both texts of a pair."""
    return len(text) if isinstance(text, str) else sum(map(len, text))


def check_texts(texts: Sequence[Text], preprocessing: TextPreprocessing, path: Path | None) -> None:
    """Raise UserError for a text without tokens: no network takes a sequence of length 0."""
    bare = preprocessing.without_tokens(texts)
    if bare:
        shown = bare[0] if isinstance(bare[0], str) else bare[0][0]
        raise UserError(
            f"{path}: {len(bare)} of {len(texts)} texts give no tokens, the first of them {shown[:40]!r}: remove them"
        )


def tell_cut(texts: Sequence[Text], preprocessing: TextPreprocessing, source: str) -> None:
    """Log how many texts are longer than what the network is given of them."""
    count = preprocessing.cut(texts)
    if count:
        logger.warning(
            "%s: %d of %d texts are longer than %d tokens and are cut",
            source,
            count,
            len(texts),
            preprocessing.max_length,
        )


def class_numbers_of(
    network: Network, labels: Sequence[str], path: Path, names: tuple[str, ...] | None = None
) -> list[int]:
    """The number of the class of each label, given by number (also as 1.0) or by name.

    Args:
        names: what the file calls the classes that its numbers stand for. Where the network knows all of these names,
            they say which class is which: data sets and networks often number the same classes differently.

    Raises:
        UserError: a label is no class of the network.
    """
    classes = class_count(network)
    try:
        known = _numbers_by_name(network, names, path) if names else {}
        found = {
            label: known[n] if (n := label.strip()) in known else _number(network, n, classes)
            for label in dict.fromkeys(labels)
        }
    except ValueError as error:
        raise UserError(f"{path}: {error}") from error
    return [found[label] for label in labels]


def _numbers_by_name(network: Network, names: tuple[str, ...], path: Path) -> dict[str, int]:
    """The file's number -> the network's, where it knows all the names of the file; nothing where it knows none."""
    own = getattr(getattr(network.module, "config", None), "id2label", None)
    if not isinstance(own, Mapping):
        return {}
    by_name = {str(name).casefold(): int(number) for number, name in own.items()}
    if all(name.casefold() in by_name for name in names):
        return {str(number): by_name[name.casefold()] for number, name in enumerate(names)}
    if any(str(name) != f"LABEL_{number}" for number, name in own.items()):
        logger.warning(
            "%s calls its classes %s, the network %s: they are matched by number; check that these agree",
            path,
            ", ".join(names)[:80],
            ", ".join(map(str, own.values()))[:80],
        )
    return {}


def _number(network: Network, label: str, classes: int) -> int:
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
