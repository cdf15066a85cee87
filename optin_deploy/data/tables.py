"""Tables of texts, scores and labels from CSV, TSV, JSON, JSON Lines, Parquet, Arrow and saved `datasets`."""

import csv
import gzip
import io
import json
import logging
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from optin_deploy.errors import UserError, one_line
from optin_deploy.utils.json_types import JsonObject, JsonValue
from optin_deploy.utils.paths import is_hidden, require_regular

logger = logging.getLogger(__name__)

_DELIMITED = (".csv", ".tsv", ".tab")
_JSON = (".json", ".jsonl", ".ndjson")
_ARROW = (".parquet", ".arrow", ".feather")
_PLAIN_TEXT = (".txt", ".text", "")
_PACKED = (".bz2", ".xz", ".zst", ".zip", ".7z", ".tar", ".tgz", ".rar", ".lz4")
TABLE_KINDS = "CSV, TSV, JSON, JSON Lines, Parquet or Arrow"
# Usual column names of data sets of texts.
_HEADERS = frozenset(
    {
        *(
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
        ),
        *("passage", "document", "review", "content", "title", "body", "label", "labels", "score"),
    }
)
# The largest share of zero bytes in a text file; UTF-16 has about a half, programs and images have many.
_MOST_ZEROS = 0.1
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


@dataclass(frozen=True)
class TextTable:
    """Rows of cells, which are returned as text.

    Attributes:
        header: names of the columns; None for CSV and TSV, where the first row may be a header.
        class_names: name of a column -> names of its class numbers, if the file stores them.
    """

    path: Path
    rows: Sequence[Sequence[JsonValue]]
    header: tuple[str, ...] | None = None
    class_names: Mapping[str, tuple[str, ...]] = field(default_factory=lambda: MappingProxyType({}))

    @property
    def width(self) -> int:
        """Number of columns."""
        return len(self.rows[0] if self.header is None else self.header)

    def split(self, columns: str) -> list[tuple[str, ...]]:
        """Split a comma-separated list into groups of one column or, joined by ``+``, the two columns of a pair.

        A column whose name contains ``+`` is not split.
        """
        names = self.header if self.header is not None else [str(cell).strip() for cell in self.rows[0]]
        groups = [group.strip() for group in columns.split(",")]
        return [(g,) if g in names else tuple(name.strip() for name in g.split("+")) for g in groups]

    def select(self, columns: Sequence[str]) -> list[list[str]]:
        """Return the given columns, row by row.

        A column is a name of the header, or a number from 1. For CSV and TSV, numbers mean that there is no header.

        Raises:
            UserError: a column does not exist, or a cell holds neither text nor a number.
        """
        columns = [column.strip() for column in columns]
        if self.header is not None:
            indices = [self._find_column(column, self.header) for column in columns]
            return [[self._cell(row, number, i) for i in indices] for number, row in enumerate(self.rows, 1)]
        if all(column.isdecimal() for column in columns):
            return self._select_by_number(columns)
        return self._select_by_header(columns)

    def _select_by_number(self, columns: Sequence[str]) -> list[list[str]]:
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
                f"{self.path}: its first line is {','.join(first)}, a header of numbers as pandas writes it, so column "
                f"{columns[0]} is ambiguous; give the columns names, or remove that line"
            )
        if any(first[i].lower() in _HEADERS for i in indices):
            logger.warning(
                "%s: columns are given by number, so its first line (%s) is read as a row; give the columns by name if "
                "it is a header",
                self.path,
                ", ".join(first)[:80],
            )
        return [[row[i] for i in indices] for row in self.rows]

    def _select_by_header(self, columns: Sequence[str]) -> list[list[str]]:
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
        """Return the file's names for the class numbers in ``column``; None if it stores none."""
        if self.header is None:
            return None
        return self.class_names.get(self.header[self._find_column(column.strip(), self.header)])

    def separator_hint(self) -> str:
        """Return a hint to append to an error if the rows seem to have another separator, else an empty string."""
        if self.header is not None or len(self.rows[0]) > 1:
            return ""
        separator = next((mark for mark in ";\t|," if mark in str(self.rows[0][0])), None)
        if separator is None:
            return ""
        name = "a tab" if separator == "\t" else repr(separator)
        return f"; it has one column: is the separator {name}? Write commas (.csv) or tabs (.tsv)"

    def _find_column(self, column: str, header: Sequence[str]) -> int:
        if column in header:
            return header.index(column)
        if column.isdecimal() and 1 <= int(column[:9]) <= len(header):
            return int(column) - 1
        raise UserError(f"{self.path} has no column {column!r}; it has {', '.join(header)[:120]}")

    def _cell(self, row: Sequence[JsonValue], number: int, index: int) -> str:
        value, name = row[index], (self.header or ())[index]
        if isinstance(value, bool):
            return str(int(value))
        if isinstance(value, str | int | float):
            return str(value)
        kind = {type(None): "nothing", dict: "an object"}.get(type(value), "a list, an image or the like")
        raise UserError(f"{self.path}, row {number}: column {name!r} holds {kind}, not a text or a number")


def is_table(path: Path | None) -> bool:
    """Whether ``path`` is a table, by a file's suffix or a directory's content."""
    if path is None:
        return False
    if path.is_dir():
        return (path / "state.json").is_file() or (path / "dataset_dict.json").is_file() or bool(_shards(path))
    return _suffix(path) in _DELIMITED + _JSON + _ARROW


def read_table(path: Path) -> TextTable:
    """Return a table without empty rows; UserError if it cannot be read, is empty or is not a table."""
    if path.is_dir():
        table = _arrow_table(path, _arrow_files(path))
    elif _suffix(path) in _ARROW:
        table = _arrow_table(path, [path])
    elif _suffix(path) in _JSON:
        table = _json_table(path, _read_text(path, "a table"))
    elif _suffix(path) in _DELIMITED:
        table = _delimited_table(path, _read_text(path, "a table"))
    else:
        _check_regular(path, "a table")
        raise UserError(
            f"{path}: {_unknown(path)}; a table is {TABLE_KINDS}, with the suffix "
            f"{' '.join(_DELIMITED + _JSON + _ARROW)} (all but the last three also with .gz)"
        )
    if not table.rows:
        raise UserError(f"{path} holds no rows")
    return table


def read_lines(path: Path) -> list[str]:
    """Return the lines of a text file; UserError if it cannot be read, or its suffix is not one of text files."""
    if _suffix(path) not in _PLAIN_TEXT:
        _check_regular(path, "text")
        raise UserError(
            f"{path}: {_unknown(path)}; texts are read from text files (.txt, one text a line) and tables "
            f"({' '.join(_DELIMITED + _JSON + _ARROW)})"
        )
    # splitlines would also split at form feeds and the like.
    return io.StringIO(_read_text(path, "text"), newline=None).read().split("\n")


def _suffix(path: Path) -> str:
    """Return the suffix of a file's name in lower case, without ``.gz``."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _unknown(path: Path) -> str:
    suffix = path.suffix.lower()
    if suffix in _PACKED:
        return f"{suffix} files are packed: unpack it"
    return f"{suffix or 'a name without suffix'} is unknown"


def _check_regular(path: Path, what: str) -> None:
    try:
        require_regular(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read as {what} in UTF-8: {error}") from error


def _read_text(path: Path, what: str) -> str:
    """Return the text of a UTF-8 file with its line ends; UserError with the likely encoding if it is another."""
    try:
        data = require_regular(path).read_bytes()
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


def _delimited_table(path: Path, text: str) -> TextTable:
    file = io.StringIO(text, newline="")
    try:
        if _suffix(path) == ".csv":
            # Without strict, an unclosed quote would swallow all lines after it.
            rows = list(csv.reader(file, strict=True))
        else:
            rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    except csv.Error as error:
        raise UserError(f"{path} cannot be read as a table in UTF-8: {error}") from error
    return TextTable(path, [row for row in rows if any(cell.strip() for cell in row)])


def _json_table(path: Path, text: str) -> TextTable:
    try:
        content = _json_lines(text) if _suffix(path) != ".json" else _json_or_lines(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {one_line(error, 120)}") from error
    if isinstance(content, dict):
        return _json_columns(path, content)
    if not isinstance(content, list):
        raise UserError(f"{path} holds a {type(content).__name__}: a table is a list of objects, or lists by column")
    if content and all(isinstance(row, str) for row in content):
        return TextTable(path, [[text] for text in content], ("text",))
    for number, row in enumerate(content, 1):
        if not isinstance(row, dict):
            raise UserError(f"{path}, row {number}: a {type(row).__name__}; rows must be all objects, or all texts")
    header = tuple(dict.fromkeys(name for row in content for name in row))
    return TextTable(path, [[row.get(name) for name in header] for row in content], header)


def _json_lines(text: str) -> list[JsonValue]:
    values = []
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                values.append(json.loads(line))
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from error
    return values


def _json_or_lines(text: str) -> JsonValue:
    """Parse JSON, or JSON Lines if several values follow each other: such files are often called .json too."""
    if not text.strip():
        return []
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        if not error.msg.startswith("Extra data"):
            raise
        return _json_lines(text)


def _json_columns(path: Path, content: JsonObject) -> TextTable:
    """Return a table from lists by column, or from objects by column (row name -> cell), as pandas writes them."""
    columns = {name: list(c.values()) if isinstance(c, dict) else c for name, c in content.items()}
    wrong = next((name for name, column in columns.items() if not isinstance(column, list)), None)
    lengths = {name: len(column) for name, column in columns.items() if isinstance(column, list)}
    if wrong is not None or len(set(lengths.values())) > 1:
        reason = f"{wrong!r} is not a list" if wrong is not None else f"its columns have lengths {lengths}"[:120]
        raise UserError(f"{path}: {reason}; a table is a list of objects, or lists of one length by column")
    return TextTable(path, list(zip(*columns.values(), strict=True)), tuple(columns))


def _shards(directory: Path) -> list[Path]:
    files = (p for p in sorted(directory.rglob("*")) if p.suffix.lower() in (".parquet", ".arrow"))
    return [p for p in files if p.is_file() and not any(map(is_hidden, p.relative_to(directory).parts))]


def _arrow_files(directory: Path) -> list[Path]:
    """Return the files of one data set in a directory: saved by `datasets`, or a folder of Parquet files."""
    if (directory / "dataset_dict.json").is_file():
        splits = sorted(p.parent.name for p in directory.glob("*/state.json"))
        example = directory / (splits[0] if splits else "train")
        raise UserError(f"{directory} holds the splits {', '.join(splits) or '-'}: name one, like {example}")
    state = directory / "state.json"
    if not state.is_file():
        files = _shards(directory)
        # The names of shards without "-00000-of-00002".
        sets = sorted({str(f.relative_to(directory).parent / f.stem.split("-0")[0]) for f in files})
        if not files:
            raise UserError(f"{directory} is a folder without tables: name a file, or a data set saved by `datasets`")
        if len(sets) > 1:
            raise UserError(f"{directory} holds several data sets ({', '.join(sets)[:120]}): name one file of them")
        return files
    try:
        content = json.loads(require_regular(state).read_text(encoding="utf-8"))
        names = [str(entry["filename"]) for entry in content["_data_files"]]
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{state} is not the state of a data set: {one_line(error, 120)}") from error
    if content.get("_indices_files") or content.get("_indices_data_files"):
        raise UserError(f"{directory} stores its order in a separate file: save it again after flatten_indices()")
    outside = next((name for name in names if Path(name).name != name), None)
    if outside is not None:
        raise UserError(f"{state} names {outside}: data is read from the same directory only")
    return [directory / name for name in names]


def _arrow_table(path: Path, files: Sequence[Path]) -> TextTable:
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
    except Exception as error:  # pyarrow raises errors of many types, some of them Python's own
        raise UserError(f"{path} cannot be read as Parquet or Arrow: {one_line(error)}") from error
    # Columns of images, lists and the like keep their names, but are not read.
    kept = [column if column is not None else [()] * whole.num_rows for column in columns]
    names = tuple(str(name) for name in whole.schema.names)
    return TextTable(path, list(zip(*kept, strict=True)), names, _class_names(whole.schema.metadata))


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
    """Whether a column of the pyarrow type ``kind`` holds texts, numbers or truth values."""
    import pyarrow

    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    checks = ("is_string", "is_large_string", "is_integer", "is_floating", "is_boolean", "is_null")
    view = getattr(pyarrow.types, "is_string_view", lambda _: False)
    return any(getattr(pyarrow.types, check)(kind) for check in checks) or view(kind)


def _class_names(metadata: Mapping[bytes, bytes] | None) -> dict[str, tuple[str, ...]]:
    """Return the names of classes by column that `datasets` stores in the schema."""
    try:
        features = json.loads((metadata or {})[b"huggingface"])["info"]["features"]
        return {
            str(column): tuple(map(str, feature["names"]))
            for column, feature in features.items()
            if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
        }
    except (KeyError, ValueError, TypeError, AttributeError, RecursionError):
        return {}
