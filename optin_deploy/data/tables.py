"""Tables of texts, scores and labels in files: CSV, TSV, JSON, JSON Lines, Parquet, Arrow and saved `datasets`."""

import csv
import gzip
import io
import json
import logging
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from optin_deploy.errors import UserError
from optin_deploy.utils.paths import hidden, regular

logger = logging.getLogger(__name__)

_DELIMITED = (".csv", ".tsv", ".tab")
_JSON = (".json", ".jsonl", ".ndjson")
_ARROW = (".parquet", ".arrow", ".feather")
_PLAIN_TEXT = (".txt", ".text", "")
_PACKED = (".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz", ".rar", ".lz4")
TABLE_KINDS = "CSV, TSV, JSON, JSON Lines, Parquet or Arrow"
_HEADERS = frozenset(
    [
        "text",
        "texts",
        "sentence",
        "sentences",
        "sentence1",
        "sentence2",
        "premise",
        "hypothesis",
        "question",
        "query",
        "passage",
        "document",
        "review",
        "content",
        "title",
        "body",
        "label",
        "labels",
        "score",
    ]
)
# A text may hold some zero bytes, a part of its bytes; of UTF-16 they are half, of programs and pictures many.
_MOST_ZEROS = 0.1
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class Table:
    """Rows of cells; what is asked for is given as text.

    Attributes:
        header: names of the columns. None for a CSV or TSV file, whose first row may be one.
        class_names: name of a column -> names of the classes that its numbers stand for, where the file says so.
    """

    path: Path
    rows: Sequence[Sequence[Any]]
    header: tuple[str, ...] | None = None
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def width(self) -> int:
        """Columns of the first row."""
        return len(self.rows[0] if self.header is None else self.header)

    def split(self, columns: str) -> list[tuple[str, ...]]:
        """The parts of a comma-separated list, each one column or, joined by ``+``, the two columns of a pair.

        A column whose own name has a ``+`` stays one.
        """
        named = self.header if self.header is not None else [str(cell).strip() for cell in self.rows[0]]
        parts = [part.strip() for part in columns.split(",")]
        return [(p,) if p in named else tuple(name.strip() for name in p.split("+")) for p in parts]

    def select(self, columns: Sequence[str]) -> list[list[str]]:
        """The named columns, row by row.

        A column is a name of the header; a number counts from 1 and, for a CSV or TSV file, means that there is no
        header line. Raises UserError for a column that is not there and for a cell that is no text or number.
        """
        columns = [column.strip() for column in columns]
        if self.header is not None:
            indices = [self._place(column, self.header) for column in columns]
            return [[self._cell(row, number, i) for i in indices] for number, row in enumerate(self.rows, 1)]
        if all(column.isdecimal() for column in columns):
            return self._numbered(columns)
        return self._under_header(columns)

    def _numbered(self, columns: Sequence[str]) -> list[list[str]]:
        indices = [int(c) - 1 for c in columns]
        width = min(len(row) for row in self.rows)
        wrong = [c for c, i in zip(columns, indices, strict=True) if not 0 <= i < width]
        if wrong:
            raise UserError(
                f"{self.path} has no column {wrong[0]}: its rows have {width} columns, counted from 1"
                + self.separator_hint()
            )
        first = [cell.strip() for cell in self.rows[0]]
        if len(self.rows) > 1 and first == [str(i) for i in range(len(first))]:
            raise UserError(
                f"{self.path}: its first line is {','.join(first)}, a header of numbers as pandas writes it, where "
                f"column {columns[0]} could mean two; give the columns names, or remove that line"
            )
        if any(first[i].lower() in _HEADERS for i in indices):
            logger.warning(
                "%s: columns are given by number, so its first line (%s) is taken for a row; give the columns by name "
                "if it is a header",
                self.path,
                ", ".join(first)[:80],
            )
        return [[row[i] for i in indices] for row in self.rows]

    def _under_header(self, columns: Sequence[str]) -> list[list[str]]:
        header, body = [cell.strip() for cell in self.rows[0]], self.rows[1:]
        for name in columns:
            if name not in header:
                raise UserError(
                    f"{self.path} has no column {name!r} in its header ({', '.join(header)[:120]}); name one of these, "
                    f"or give column numbers from 1 if there is no header line{self.separator_hint()}"
                )
            if header.count(name) > 1:
                raise UserError(f"{self.path} has {header.count(name)} columns {name!r}: give each a name of its own")
        if not body:
            raise UserError(f"{self.path} holds a header and no rows")
        indices = [header.index(name) for name in columns]
        short = next((i for i, row in enumerate(body, 2) if len(row) <= max(indices)), None)
        if short:
            raise UserError(f"{self.path}, row {short}: too few columns for {', '.join(columns)}")
        return [[row[i] for i in indices] for row in body]

    def names_of_classes(self, column: str) -> tuple[str, ...] | None:
        """What the file calls the classes that a column's numbers stand for; None where it does not say."""
        if self.header is None:
            return None
        return self.class_names.get(self.header[self._place(column.strip(), self.header)])

    def separator_hint(self) -> str:
        """A question to put behind an error where all of a row is in one column; else nothing."""
        if self.header is not None or len(self.rows[0]) > 1:
            return ""
        found = [mark for mark in ";\t|," if mark in str(self.rows[0][0])]
        mark = {"\t": "a tab"}.get(found[0], repr(found[0])) if found else ""
        return f"; it has one column: is the separator {mark}? Write commas (.csv) or tabs (.tsv)" if found else ""

    def _place(self, column: str, header: Sequence[str]) -> int:
        if column in header:
            return header.index(column)
        if column.isdecimal() and 1 <= int(column[:9]) <= len(header):
            return int(column) - 1
        raise UserError(f"{self.path} has no column {column!r}; it has {', '.join(header)[:120]}")

    def _cell(self, row: Sequence[Any], number: int, index: int) -> str:
        value, name = row[index], (self.header or ())[index]
        if isinstance(value, bool):
            return str(int(value))
        if isinstance(value, str | int | float):
            return str(value)
        kinds = {type(None): "nothing", dict: "an object"}
        kind = kinds.get(type(value), "a list, a picture or the like")
        raise UserError(f"{self.path}, row {number}: column {name!r} holds {kind}, not a text or a number")


def is_table(path: Path | None) -> bool:
    """Whether a name is one of a table: by the end of a file's name, or by what a directory holds."""
    if path is None:
        return False
    if path.is_dir():
        return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file() or bool(_shards(path))
    return _suffix(path) in _DELIMITED + _JSON + _ARROW


def read_table(path: Path) -> Table:
    """A table, empty rows left out; UserError when it cannot be read, is empty or is none."""
    if path.is_dir():
        table = _arrow_table(path, _arrow_files(path))
    elif _suffix(path) in _ARROW:
        table = _arrow_table(path, [path])
    elif _suffix(path) in _JSON:
        table = _parsed(path, _json_table)
    elif _suffix(path) in _DELIMITED:
        table = _parsed(path, _delimited_table)
    else:
        _check_regular(path, "a table")
        raise UserError(
            f"{path}: {_unknown(path)}; a table is {TABLE_KINDS}, told by the end of its name "
            f"({' '.join(_DELIMITED + _JSON + _ARROW)}; all but the last three also with .gz)"
        )
    if not table.rows:
        raise UserError(f"{path} holds no rows")
    return table


def read_lines(path: Path) -> list[str]:
    """The lines of a text file; UserError when it cannot be read, or its name is not one of a text file."""
    if _suffix(path) not in _PLAIN_TEXT:
        _check_regular(path, "text")
        raise UserError(
            f"{path}: {_unknown(path)}; texts are read from text files (.txt, one text a line) and tables "
            f"({' '.join(_DELIMITED + _JSON + _ARROW)})"
        )
    # Not splitlines, which takes form feeds and the like for ends of lines.
    return io.StringIO(_decoded(path, "text"), newline=None).read().split("\n")


def _suffix(path: Path) -> str:
    """The end of a file's name that says what it is, without that of gzip."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes = suffixes[:-1]
    return suffixes[-1] if suffixes else ""


def _unknown(path: Path) -> str:
    suffix = path.suffix.lower()
    return (
        f"{suffix} files are packed: unpack it"
        if suffix in _PACKED
        else f"{suffix or 'a name without an end'} is unknown"
    )


def _check_regular(path: Path, what: str) -> None:
    try:
        regular(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read as {what} in UTF-8: {error}") from error


def _decoded(path: Path, what: str) -> str:
    """The content of a file in UTF-8, line ends as they are; UserError that tells the encoding where it is another."""
    try:
        data = regular(path).read_bytes()
        if path.suffix.lower() == ".gz":
            data = gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read as {what} in UTF-8: {error}") from error
    cannot = f"{path} cannot be read as {what} in UTF-8"
    if data.startswith(_UTF16):
        raise UserError(f"{cannot}: it is UTF-16; convert it with iconv -f UTF-16 -t UTF-8")
    if data.count(0) > _MOST_ZEROS * len(data):
        raise UserError(f"{cannot}: it holds zero bytes, as binary files and UTF-16 do")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        near = data[max(0, error.start - 12) : error.start + 12].decode("latin-1")
        raise UserError(
            f"{cannot}: byte 0x{data[error.start]:02x} in line {line}; in Latin-1 it reads {near!r}: if that is right, "
            "convert it with iconv -f LATIN1 -t UTF-8"
        ) from error


def _parsed(path: Path, parse: Callable[[Path, str], Table]) -> Table:
    return parse(path, _decoded(path, "a table"))


def _delimited_table(path: Path, text: str) -> Table:
    file = io.StringIO(text, newline="")
    try:
        if _suffix(path) == ".csv":
            # Not strict, a quote that is never closed would swallow all lines behind it.
            rows = list(csv.reader(file, strict=True))
        else:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except csv.Error as error:
        raise UserError(f"{path} cannot be read as a table in UTF-8: {error}") from error
    return Table(path, [row for row in rows if any(cell.strip() for cell in row)])


def _json_table(path: Path, text: str) -> Table:
    try:
        found = _json_lines(text) if _suffix(path) != ".json" else _json_or_lines(text)
    except (ValueError, RecursionError) as error:
        told = " ".join(str(error).split())[:120]
        raise UserError(f"{path} cannot be read as JSON: {told}") from error
    if isinstance(found, dict):
        return _json_columns(path, found)
    if not isinstance(found, list):
        raise UserError(f"{path} holds a {type(found).__name__}: a table is a list of objects, or lists by column")
    if found and all(isinstance(row, str) for row in found):
        return Table(path, [[text] for text in found], ("text",))
    wrong = next((i for i, row in enumerate(found, 1) if not isinstance(row, dict)), None)
    if wrong:
        raise UserError(
            f"{path}, row {wrong}: a {type(found[wrong - 1]).__name__}; every row is an object, or every one a text"
        )
    header = tuple(dict.fromkeys(name for row in found for name in row))
    return Table(path, [[row.get(name) for name in header] for row in found], header)


def _json_lines(text: str) -> list[Any]:
    found = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return found


def _json_or_lines(text: str) -> Any:
    """One JSON value; where more follow it, JSON Lines, which are often called .json, too."""
    if not text.strip():
        return []
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise
        return _json_lines(text)


def _json_columns(path: Path, found: Mapping[str, Any]) -> Table:
    """Lists by column, or what pandas writes: objects by column, their keys the rows."""
    columns = {name: list(c.values()) if isinstance(c, dict) else c for name, c in found.items()}
    lengths = {name: len(column) if isinstance(column, list) else -1 for name, column in columns.items()}
    if len(set(lengths.values())) != 1 or -1 in lengths.values():
        if not columns:
            return Table(path, [])
        wrong = next((n for n, length in lengths.items() if length == -1), None)
        told = f"{wrong!r} is no list" if wrong is not None else f"its columns have lengths {lengths}"[:120]
        raise UserError(f"{path}: {told}; a table is a list of objects, or lists of one length by column")
    return Table(path, list(zip(*columns.values(), strict=True)), tuple(columns))


def _shards(directory: Path) -> list[Path]:
    found = (p for p in sorted(directory.rglob("*")) if p.suffix.lower() in (".parquet", ".arrow"))
    return [p for p in found if p.is_file() and not any(map(hidden, p.relative_to(directory).parts))]


def _arrow_files(directory: Path) -> list[Path]:
    """The files of one data set in a directory: one that `datasets` has saved, or a folder of Parquet files."""
    if (directory / "dataset_dict.json").is_file():
        splits = sorted(p.parent.name for p in directory.glob("*/state.json"))
        example = directory / (splits[0] if splits else "train")
        raise UserError(f"{directory} holds the splits {', '.join(splits) or '-'}: name one, like {example}")
    state = directory / "state.json"
    if not state.is_file():
        files = _shards(directory)
        # What stands before "-00000-of-00002" in the names of shards.
        sets = sorted({str(f.relative_to(directory).parent / f.stem.split("-0")[0]) for f in files})
        if not files:
            raise UserError(
                f"{directory} is a folder without tables: name a file, or a data set that `datasets` has saved"
            )
        if len(sets) > 1:
            raise UserError(f"{directory} holds several data sets ({', '.join(sets)[:120]}): name one file of them")
        return files
    try:
        told = json.loads(regular(state).read_text(encoding="utf-8"))
        names = [str(each["filename"]) for each in told["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{state} cannot be read as that of a data set: {str(error)[:120]}") from error
    if told.get("_indices_files") or told.get("_indices_data_files"):
        raise UserError(f"{directory} keeps its order in a file of its own: save it again after flatten_indices()")
    outside = next((name for name in names if Path(name).name != name), None)
    if outside is not None:
        raise UserError(f"{state} names {outside}: data are read from beside it only")
    return [directory / name for name in names]


def _arrow_table(path: Path, files: Sequence[Path]) -> Table:
    for file in files:
        _check_regular(file, "a table")
    try:
        import pyarrow
    except ImportError as error:
        raise UserError(
            f"{path}: Parquet and Arrow are read with pyarrow; install it: pip install 'optin-deploy[parquet]'"
        ) from error
    try:
        tables = [_read_arrow(file) for file in files]
        whole = pyarrow.concat_tables(tables) if len(tables) > 1 else tables[0]
        columns = [
            whole.column(i).to_pylist() if _is_plain(whole.schema.field(i).type) else None
            for i in range(whole.num_columns)
        ]
    except Exception as error:  # pyarrow's are of many types, some of them Python's own
        told = " ".join(str(error).split())[:200] or type(error).__name__
        raise UserError(f"{path} cannot be read as Parquet or Arrow: {told}") from error
    # Columns of pictures, lists and the like are named, but not read.
    kept = [column if column is not None else [()] * whole.num_rows for column in columns]
    names = tuple(str(name) for name in whole.schema.names)
    return Table(path, list(zip(*kept, strict=True)), names, _class_names(whole.schema.metadata))


def _read_arrow(file: Path) -> Any:
    import pyarrow
    import pyarrow.parquet

    if file.suffix.lower() == ".parquet":
        return pyarrow.parquet.ParquetFile(file).read()
    with pyarrow.OSFile(str(file), "rb") as source:
        # `datasets` writes streams; Feather and others write files.
        if source.read(6) == b"ARROW1":
            source.seek(0)
            return pyarrow.ipc.open_file(source).read_all()
        source.seek(0)
        return pyarrow.ipc.open_stream(source).read_all()


def _is_plain(kind: Any) -> bool:
    """Whether a column holds texts, numbers or truth values."""
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    checks = ("is_string", "is_large_string", "is_integer", "is_floating", "is_boolean", "is_null")
    view = getattr(pyarrow.types, "is_string_view", lambda _: False)
    return any(getattr(pyarrow.types, check)(kind) for check in checks) or view(kind)


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Names of classes by column, where `datasets` has written them."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            str(column): tuple(map(str, feature["names"]))
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
