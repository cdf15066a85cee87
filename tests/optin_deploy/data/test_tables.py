"""Tables in files of every kind that is read, and what is said of others."""

import gzip
import json
import logging
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optin_deploy.data.tables import is_table, read_lines, read_table
from optin_deploy.errors import UserError

ROWS = [("a b", 0), ('say "no", Bob\nand go', 1), ("café", 2)]
WANTED = [["a b", "0"], ['say "no", Bob\nand go', "1"], ["café", "2"]]


def as_json(value: Any) -> bytes:
    return json.dumps(value).encode()


def objects() -> list[dict[str, Any]]:
    return [{"id": i, "text": text, "label": label} for i, (text, label) in enumerate(ROWS)]


def lines(rows: list[Any]) -> bytes:
    return b"\n".join(map(as_json, rows)) + b"\n\n"


CSV = b'id,text,label\r\n0,a b,0\r\n1,"say ""no"", Bob\nand go",1\r\n\r\n2,caf\xc3\xa9,2\r\n'
COLUMNS = {"text": [t for t, _ in ROWS], "label": [label for _, label in ROWS]}
FILES: dict[str, bytes] = {
    "t.csv": CSV,
    "bom.CSV": b"\xef\xbb\xbf" + CSV,
    "t.csv.gz": gzip.compress(CSV, mtime=0),
    "t.json": as_json(objects()),
    "columns.json": as_json(COLUMNS),
    "pandas.json": as_json({name: {str(i): v for i, v in enumerate(c)} for name, c in COLUMNS.items()}),
    "lines.json": lines(objects()),
    "t.jsonl": lines(objects()),
    "t.ndjson": lines(objects()),
    "t.jsonl.gz": gzip.compress(lines(objects())),
    "crlf.jsonl": lines(objects()).replace(b"\n", b"\r\n"),
}


@pytest.mark.parametrize("name", FILES)
def test_the_same_rows(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(FILES[name])
    assert is_table(tmp_path / name)
    assert read_table(tmp_path / name).select(["text", "label"]) == WANTED


@pytest.mark.parametrize("name", ["t.tsv", "t.tab", "t.tab.gz"])
def test_tabs(tmp_path: Path, name: str) -> None:
    data = b'text\tlabel\n"a b\t0\ncaf\xc3\xa9\t2\n'
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    assert read_table(tmp_path / name).select(["text", "label"]) == [['"a b', "0"], ["café", "2"]]


def test_cells_are_text(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(
        as_json([{"a": True, "b": 1.0, "c": 3, "d": "x"}, {"a": False, "b": 2.5, "c": 4, "d": ""}])
    )
    table = read_table(tmp_path / "t.json")
    assert table.select(["a", "b", "c", "d"]) == [["1", "1.0", "3", "x"], ["0", "2.5", "4", ""]]
    assert table.select(["4", "1"]) == [["x", "1"], ["", "0"]]


def test_a_list_of_texts(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(as_json(["one", "two"]))
    assert read_table(tmp_path / "t.json").select(["text"]) == [["one"], ["two"]]


def test_names_come_before_numbers_where_there_is_a_header(tmp_path: Path) -> None:
    (tmp_path / "t.json").write_bytes(as_json([{"2": "a", "1": "b"}]))
    assert read_table(tmp_path / "t.json").select(["1", "2"]) == [["b", "a"]]


def test_pairs_of_columns(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,b,c+d\n1,2,3\n")
    table = read_table(tmp_path / "t.csv")
    assert table.split("a+b, c+d") == [("a", "b"), ("c+d",)]
    assert table.split("1 + 2,3") == [("1", "2"), ("3",)]


def told(path: Path, columns: list[str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        read_table(path).select(columns or ["text"])
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("t.csv", b"text;label\na;1\nb;0\n", "it has one column: is the separator ';'?"),
        ("t.csv", b"text\tlabel\na\t1\n", "is the separator a tab?"),
        ("t.csv", b"a|text\n1|b\n", "is the separator '|'?"),
        ("t.tsv", b"id,text\n1,b\n", "is the separator ','?"),
        ("t.csv", b"text,text\n1,b\n", "has 2 columns 'text'"),
        ("t.csv", "text\na\n".encode("utf-16"), "it is UTF-16; convert it"),
        ("t.csv", "text\na\n".encode("utf-16-le"), "zero bytes, as binary files and UTF-16 do"),
        ("t.csv", b"text\ncaf\xe9 au lait\n", "byte 0xe9 in line 2; in Latin-1 it reads 'text\\ncafé au lait"),
        ("t.csv.gz", b"no gzip", "cannot be read as a table in UTF-8: Not a gzipped file"),
        ("t.csv.gz", gzip.compress(CSV, mtime=0)[:-9], "cannot be read as a table in UTF-8"),
        ("t.json", b"{", "cannot be read as JSON"),
        ("t.json", b"", "holds no rows"),
        ("t.json", b"3", "holds a int: a table is a list of objects"),
        ("t.json", b"{}", "holds no rows"),
        ("t.json", b'{"text": ["a"], "label": [1, 2]}', "its columns have lengths"),
        ("t.json", b'{"text": "a"}', "'text' is not a list"),
        ("t.json", b'[{"text": "a"}, 3]', "row 2: a int"),
        ("t.json", b"[" * 100_000, "cannot be read as JSON"),
        ("t.jsonl", b'{"text": "a"}\n{"text"\n', "cannot be read as JSON: line 2"),
        ("t.jsonl", b'{"text": "a"}\n{"other": 1}\n', "row 2: column 'text' holds nothing"),
        ("t.jsonl", b'{"text": ["a"]}\n', "row 1: column 'text' holds a list"),
        ("t.jsonl", b'{"text": {"en": "a"}}\n', "row 1: column 'text' holds an object"),
        ("t.jsonl", b'{"sentence": "a"}\n', "has no column 'text'; it has sentence"),
        ("t.xlsx", b"PK", ".xlsx is unknown; a table is CSV"),
        ("t.pkl", b"\x80", ".pkl is unknown"),
        ("t.txt", b"a\n", ".txt is unknown"),
        ("t.csv.zip", b"PK", ".zip files are packed: unpack it"),
        ("t.csv.bz2", b"BZ", ".bz2 files are packed"),
    ],
)
def test_what_is_wrong_is_told(tmp_path: Path, name: str, data: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(data)
    assert expected in told(tmp_path / name)


def test_numbers_that_are_a_header(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "t.csv").write_text("0,1\nw1,w2\n")
    assert re.search(r"first line .*0,1", told(tmp_path / "t.csv", ["1"]))
    (tmp_path / "t.csv").write_text("Text,Label\nw1,0\n")
    with caplog.at_level(logging.WARNING):
        assert read_table(tmp_path / "t.csv").select(["1"]) == [["Text"], ["w1"]]
    assert "its first line (Text, Label) is read as a row" in caplog.text


@pytest.mark.parametrize("name", ["t.txt", "t", "t.TXT", "t.txt.gz"])
def test_lines_of_text(tmp_path: Path, name: str) -> None:
    data = b"\xef\xbb\xbfone\r\ntwo\rthree\n"
    (tmp_path / name).write_bytes(gzip.compress(data, mtime=0) if name.endswith(".gz") else data)
    assert not is_table(tmp_path / name)
    assert read_lines(tmp_path / name) == ["one", "two", "three", ""]


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("t.pdf", b"%PDF", ".pdf is unknown; texts are read from text files (.txt"),
        ("t.docx", b"PK", ".docx is unknown"),
        ("t.md", b"# a", ".md is unknown"),
        ("t.zip", b"PK", ".zip files are packed"),
        ("t.txt", b"a\0b", "zero bytes"),
        ("t", b"\x7fELF\x02\x01\0\0", "zero bytes"),
    ],
)
def test_what_is_no_text_is_refused_by_name(tmp_path: Path, name: str, data: bytes, expected: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError) as caught:
        read_lines(tmp_path / name)
    assert expected in str(caught.value)
    assert str(tmp_path / name) in str(caught.value)


# Parquet and Arrow


def arrow_table(names: tuple[str, ...] | None = None) -> Any:
    pyarrow = pytest.importorskip("pyarrow")
    columns = {
        "text": pyarrow.array([t for t, _ in ROWS]).dictionary_encode(),
        "label": pyarrow.array([label for _, label in ROWS], pyarrow.int64()),
        "tokens": [["a"], [], ["b"]],
    }
    table = pyarrow.table(columns)
    if names is None:
        return table
    features = {"text": {"_type": "Value"}, "label": {"names": list(names), "_type": "ClassLabel"}}
    return table.replace_schema_metadata({b"huggingface": as_json({"info": {"features": features}})})


def write_parquet(path: Path, table: Any) -> None:
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(table, path)


def write_stream(path: Path, table: Any) -> None:
    import pyarrow

    with pyarrow.OSFile(str(path), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)


def write_feather(path: Path, table: Any) -> None:
    import pyarrow.feather

    pyarrow.feather.write_feather(table, str(path), compression="uncompressed")


def save_to_disk(path: Path, table: Any, **state: Any) -> None:
    """What `datasets` saves, in two shards."""
    path.mkdir(parents=True)
    names = [f"data-0000{i}-of-00002.arrow" for i in (0, 1)]
    write_stream(path / names[0], table.slice(0, 1))
    write_stream(path / names[1], table.slice(1))
    (path / "state.json").write_bytes(as_json({"_data_files": [{"filename": n} for n in names], **state}))
    (path / "dataset_info.json").write_bytes(b"{}")


def write_shards(path: Path, table: Any) -> None:
    write_parquet(path / "data" / "train-00000-of-00002.parquet", table.slice(0, 2))
    write_parquet(path / "data" / "train-00001-of-00002.parquet", table.slice(2))


WRITERS: dict[str, Callable[[Path, Any], None]] = {
    "t.parquet": write_parquet,
    "t.arrow": write_stream,
    "t.feather": write_feather,
    "saved": save_to_disk,
    "folder": write_shards,
}


@pytest.mark.parametrize("name", WRITERS)
def test_arrow(tmp_path: Path, name: str) -> None:
    table = arrow_table(("bad", "fair", "good"))
    WRITERS[name](tmp_path / name, table)
    path = tmp_path / name
    assert is_table(path)
    found = read_table(path)
    assert found.select(["text", "label"]) == WANTED
    assert found.names_of_classes("label") == ("bad", "fair", "good")
    assert found.names_of_classes("text") is None
    assert re.search(r"row 1.*'tokens'.*list", told(path, ["tokens"]))


def test_arrow_that_is_not_read(tmp_path: Path) -> None:
    table = arrow_table()
    (tmp_path / "t.parquet").write_bytes(b"PAR1 no parquet")
    assert re.search(r"Parquet or Arrow", told(tmp_path / "t.parquet"))
    save_to_disk(tmp_path / "dict" / "train", table)
    (tmp_path / "dict" / "dataset_dict.json").write_bytes(b'{"splits": ["train"]}')
    assert re.search(r"splits train", told(tmp_path / "dict"))
    for name in ("train", "test"):
        write_parquet(tmp_path / "two" / f"{name}-00000-of-00001.parquet", table)
    assert re.search(r"test, train", told(tmp_path / "two"))
    save_to_disk(tmp_path / "ordered", table, _indices_files=[{"filename": "indices.arrow"}])
    assert "flatten_indices" in told(tmp_path / "ordered")
    save_to_disk(tmp_path / "outside", table)
    (tmp_path / "outside" / "state.json").write_bytes(as_json({"_data_files": [{"filename": "../t.arrow"}]}))
    with pytest.raises(UserError, match="same directory"):
        read_table(tmp_path / "outside")


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    assert "pip install 'optin-deploy[parquet]'" in told(tmp_path / "t.parquet")
