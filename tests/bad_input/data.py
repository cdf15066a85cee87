"""Files given as --calibration and --evaluate."""

import json
import os
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_models import save_bert, save_images, save_lines, texts

from bad_input.common import LONG, Marking, Material, Row, endless, pipe, pruning, pruning_text


def _pictures(spoil: Callable[[Path], object]) -> Callable[[Material], Sequence[str]]:
    """Pictures to calibrate on, of which one is spoiled."""

    def make(material: Material) -> Sequence[str]:
        material.copy("shallow")
        spoil(save_images(Path("pictures"), 4)[2])
        return pruning("shallow", "--calibration", "pictures")

    return make


def _written(content: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda file: file.write_bytes(content(file.read_bytes()))


def _in_place(make: Callable[[Path], object]) -> Callable[[Path], object]:
    def spoil(file: Path) -> None:
        file.unlink()
        make(file)

    return spoil


def _png(width: int, height: int) -> bytes:
    """A picture by its header, of as many pixels as that says."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    whole = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + whole


def _not_utf8(file: Path) -> None:
    file.unlink()
    Path(os.fsdecode(b"pictures/\xff\xfe.png")).write_bytes(b"no picture")


def _vision(name: str, write: Callable[[Path], object], *more: str) -> Callable[[Material], Sequence[str]]:
    """Calibration on the file (or folder) ``name``, which ``write`` makes."""

    def make(material: Material) -> Sequence[str]:
        material.copy("shallow")
        write(Path(name))
        return pruning("shallow", "--calibration", name, *more)

    return make


def _text(name: str, content: str | bytes, *more: str) -> Callable[[Material], Sequence[str]]:
    def make(material: Material) -> Sequence[str]:
        material.copy("bert")
        Path(name).write_bytes(content.encode() if isinstance(content, str) else content)
        return pruning_text("--calibration", name, *more)

    return make


def _text_at(name: str, make: Callable[[Path], object]) -> Callable[[Material], Sequence[str]]:
    def made(material: Material) -> Sequence[str]:
        material.copy("bert")
        make(Path(name))
        return pruning_text("--calibration", name, *(["--calibration-column", "text"] if name.endswith("csv") else []))

    return made


def _scored_at(name: str, make: Callable[[Path], object]) -> Callable[[Material], Sequence[str]]:
    def made(material: Material) -> Sequence[str]:
        material.copy("bert")
        make(Path(name))
        return pruning_text("--evaluate", name)

    return made


def _table(content: str | bytes, name: str = "t.csv") -> Callable[[Material], Sequence[str]]:
    return _text(name, content, "--calibration-column", "text")


def _npz(**arrays: Any) -> Callable[[Path], object]:
    return lambda path: np.savez(path, **arrays)


def _pickled(path: Path) -> None:
    np.savez(path, x=np.array([Marking()], dtype=object), allow_pickle=True)


def _npy_of(shape: tuple[int, ...]) -> Callable[[Path], object]:
    """An array whose header says that it has this shape, and nothing in it."""

    def write(path: Path) -> None:
        header = repr({"descr": "<f4", "fortran_order": False, "shape": shape}).encode().ljust(117) + b"\n"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("x.npy", b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header)

    return write


def _tensors(**tensors: torch.Tensor) -> Callable[[Path], object]:
    return lambda path: save_file(tensors, path)


def _cut(write: Callable[[Path], object]) -> Callable[[Path], object]:
    def cut(path: Path) -> None:
        write(path)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


def _ids(*values: int) -> Callable[[Material], Sequence[str]]:
    def make(material: Material) -> Sequence[str]:
        material.copy("bert")
        ids = torch.tensor(values).repeat(8, 1)
        save_file({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, "t.safetensors")
        return pruning_text("--calibration", "t.safetensors")

    return make


def _scored(content: str | bytes, *more: str) -> Callable[[Material], Sequence[str]]:
    """Evaluation on a table."""

    def make(material: Material) -> Sequence[str]:
        material.copy("bert")
        Path("dev.tsv").write_bytes(content.encode() if isinstance(content, str) else content)
        return pruning_text("--evaluate", "dev.tsv", *more)

    return make


def _scored_pairs(content: str) -> Callable[[Material], Sequence[str]]:
    """Evaluation of an encoder on pairs of sentences."""

    def make(_: Material) -> Sequence[str]:
        save_bert(Path("bert"), head=False)
        Path("dev.tsv").write_text(content, encoding="utf-8")
        return pruning_text("--evaluate", "dev.tsv")

    return make


def _masked(material: Material) -> Sequence[str]:
    """A sample that is padding alone."""
    material.copy("bert")
    ids = torch.full((8, 4), 5)
    mask = torch.ones_like(ids)
    mask[3] = 0
    save_file({"input_ids": ids, "attention_mask": mask}, "t.safetensors")
    return pruning_text("--calibration", "t.safetensors")


def _without_special_tokens(make: Callable[[Material], Sequence[str]]) -> Callable[[Material], Sequence[str]]:
    """The same with a tokenizer that gives no tokens for an empty text."""

    def changed(material: Material) -> Sequence[str]:
        command = make(material)
        path = Path("bert", "tokenizer.json")
        path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {"post_processor": None}))
        return command

    return changed


def _labelled(number: Any, *more: str) -> Callable[[Material], Sequence[str]]:
    """Texts of a class whose number in config.json is another."""

    def make(material: Material) -> Sequence[str]:
        material.copy("bert")
        path = Path("bert", "config.json")
        config = json.loads(path.read_text(encoding="utf-8"))
        config["label2id"]["bad"] = number
        path.write_text(json.dumps(config).replace('"infinite"', "1e999"), encoding="utf-8")
        save_lines(Path("dev.csv"), ["text,label", *(f"{text},bad" for text in texts(12))])
        return pruning_text(*(more or FISHER))

    return make


def _resized(pictures: int, option: str, *size: int) -> Callable[[Material], Sequence[str]]:
    """A picture in ``pictures`` class folders as long as that."""

    def make(material: Material) -> Sequence[str]:
        material.copy("shallow")
        for number in range(pictures):
            save_images(Path("classes", f"c{number}"), 1, number)
        Image.new("L", size).save("classes/c0/000.png")
        return pruning("shallow", option, "classes")

    return make


def _class_without_images(material: Material) -> Sequence[str]:
    command = _class_folders(9)(material)
    Path("classes", "c9").mkdir()
    return command


def _left_by_tools(material: Material) -> Sequence[str]:
    """What editors and archivers leave between class folders, and in them."""
    command = _class_folders(10)(material)
    for name in (".ipynb_checkpoints", "__MACOSX"):
        save_images(Path("classes", name), 1)
    Path("classes", "c0", "._000.png").write_bytes(b"no picture")
    return command


def _class_folders(count: int, spoil: Callable[[Path], object] = lambda _: None) -> Callable[[Material], Sequence[str]]:
    def make(material: Material) -> Sequence[str]:
        material.copy("shallow")
        files = [save_images(Path("classes", f"c{number}"), 1, number)[0] for number in range(count)]
        spoil(files[1])
        return pruning("shallow", "--evaluate", "classes")

    return make


def _named_folders(*names: str) -> Callable[[Material], Sequence[str]]:
    def make(material: Material) -> Sequence[str]:
        material.copy("shallow")
        for name in names:
            save_images(Path("classes", name), 1)
        return pruning("shallow", "--evaluate", "classes")

    return make


def _in_folders(name: bytes) -> Callable[[Path], object]:
    return lambda file: file.parent.rename(os.fsdecode(b"classes/" + name))


def _odd_pictures(material: Material) -> Sequence[str]:
    """Two pictures, of which one is left to calibrate on; their names and that of their folder are not UTF-8, and they
    and the network are found through links."""
    material.copy("shallow")
    folder = Path(os.fsdecode(b"pictures/\xe9t\xe9"))
    for number, file in enumerate(save_images(folder, 2)):
        file.rename(folder / os.fsdecode(b"\xe9" + bytes([0x30 + number]) + b".png"))
    Path("link").symlink_to(Path("pictures").resolve())
    Path("model").symlink_to("shallow")
    return pruning("model", "--calibration", "link")


FISHER = (
    *("--calibration", "dev.csv", "--calibration-column", "text", "--calibration-labels", "label"),
    *("--criterion", "fisher"),
)
SCORED = ("--evaluate", "dev.csv", "--evaluate-columns", "text,label")
RANDOM = torch.rand(8, 3, 32, 32)
PICTURE, TENSORS = r"image pictures/002\.png cannot be read", r"calibration tensors t\.{} cannot be read"
NO_FILE = ".*no regular file"
ROWS = (
    Row("texts-pipe", _text_at("t.txt", pipe), r"t\.txt .*" + NO_FILE),
    Row("texts-endless", _text_at("t.txt", endless), r"t\.txt .*" + NO_FILE),
    Row("texts-device", lambda m: [*_text("t.txt", "")(m), "--calibration", "/dev/zero"], "/dev/zero .*" + NO_FILE),
    Row("table-pipe", _text_at("t.csv", pipe), r"t\.csv .*" + NO_FILE),
    Row("table-endless", _text_at("t.csv", endless), r"t\.csv .*" + NO_FILE),
    Row("npz-pipe", _vision("t.npz", pipe), r"t\.npz .*" + NO_FILE),
    Row("npz-endless", _vision("t.npz", endless), r"t\.npz .*" + NO_FILE),
    Row("tensors-pipe", _vision("t.safetensors", pipe), r"t\.safetensors .*" + NO_FILE),
    Row("evaluation-pipe", _scored_at("dev.tsv", pipe), r"dev\.tsv .*" + NO_FILE),
    Row("evaluation-endless", _scored_at("dev.tsv", endless), r"dev\.tsv .*" + NO_FILE),
    Row("evaluation-device", lambda m: [*_scored("")(m)[:-1], "/dev/zero"], "/dev/zero .*" + NO_FILE),
    Row("calibration-long-name", lambda _: pruning("test_vit", "--calibration", LONG), LONG + ".*too long"),
    Row("evaluation-long-name", lambda _: pruning("test_vit", "--evaluate", LONG), LONG + ".*too long"),
    Row(
        "table-column-of-5000-digits",
        _text("t.csv", "w1\nw2\n", "--calibration-column", "9" * 5000),
        "--calibration-column 9{80}…: .*at most 1000",
    ),
    Row("images-none", _vision("pictures", Path.mkdir), "pictures .*no images"),
    Row("images-of-a-file", _vision("p.png", lambda p: p.touch()), r"p\.png is not a folder"),
    Row("images-not-one", _pictures(_written(lambda _: b"no picture")), PICTURE),
    Row("images-empty-file", _pictures(_written(lambda _: b"")), PICTURE),
    Row("images-truncated", _pictures(_written(lambda whole: whole[: len(whole) // 2])), PICTURE),
    Row("images-bomb", _pictures(_written(lambda _: _png(60_000, 60_000))), PICTURE + ".*pixels"),
    Row("images-without-pixels", _pictures(_written(lambda _: _png(0, 0))), PICTURE),
    Row("images-link-to-itself", _pictures(_in_place(lambda file: file.symlink_to(file.name))), PICTURE),
    Row("images-link-to-nothing", _pictures(_in_place(lambda file: file.symlink_to("gone.png"))), PICTURE),
    Row(
        "images-of-16-bits",
        _pictures(_in_place(lambda file: Image.fromarray(np.ones((9, 9), np.uint16)).save(file))),
        r"image pictures/002\.png .*16 bits",
    ),
    Row(
        "images-of-numbers",
        _vision(
            "p",
            lambda p: (p.mkdir(), Image.fromarray(np.ones((9, 9), np.float32)).save(p / "a.tif"), save_images(p, 3)),
        ),
        r"image p/a\.tif .*floating-point",
    ),
    Row(
        "images-of-unread-formats",
        _vision("p", lambda p: (p.mkdir(), (p / "a.heic").touch())),
        "p .*no images.*heic",
    ),
    Row("images-pipe", _pictures(_in_place(os.mkfifo)), PICTURE),
    Row(
        "images-elongated", _resized(2, "--calibration", 1, 1_000_000), r"c0/000\.png is too elongated: its 1 x 1000000"
    ),
    Row("images-very-elongated", _resized(2, "--calibration", 80_000_000, 1), r"c0/000\.png is too elongated"),
    Row("images-name-not-utf8", _pictures(_not_utf8), "image pictures/.*cannot be read"),
    Row("images-one", _vision("one", lambda p: save_images(p, 1)), "one holds 1 sample: at least 2"),
    Row("text-for-a-vision-network", _vision("t.txt", lambda p: save_lines(p, texts(4))), r"t\.txt is not a folder"),
    Row("texts-not-utf8", _text("t.txt", b"caf\xe9 au lait\nw1\n"), r"t\.txt cannot be read as text"),
    Row("texts-utf16", _text("t.txt", "w1 w2\nw3\n".encode("utf-16")), r"t\.txt cannot be read as text"),
    Row("texts-empty", _text("t.txt", "\n \n"), r"t\.txt .*no texts"),
    Row("texts-one", _text("t.txt", "w1 w2\n"), r"t\.txt .*1 sample"),
    Row("table-quote-never-closed", _table('text,label\n"w1,1\nw2,1\nw3,1\n'), r"t\.csv cannot be read as a table"),
    Row("table-text-behind-a-quote", _table('text,label\n"w1"w2,1\nw3,1\n'), r"t\.csv cannot be read as a table"),
    Row("table-not-utf8", _table(b"text,label\nw\xe9,1\n"), r"t\.csv cannot be read as a table"),
    Row("table-field-of-megabytes", _table(f"text,label\n{'w' * (4 << 20)},1\n"), r"t\.csv cannot be read as a table"),
    Row("table-no-such-column", _table("texts,label\nw1,1\n"), r"t\.csv .*no column 'text'"),
    Row("table-ragged", _table("label,text\n1,w1\n2\n"), r"t\.csv, row 3: .*columns"),
    Row("table-header-only", _table("text,label\n"), r"t\.csv .*header.*no rows"),
    Row("table-empty", _table(""), r"t\.csv .*no rows"),
    Row("npz-pickled", _vision("t.npz", _pickled), TENSORS.format("npz") + ".*pickle", runs_code=True),
    Row("npz-truncated", _vision("t.npz", _cut(_npz(x=RANDOM.numpy()))), TENSORS.format("npz")),
    Row("npz-no-zip", _vision("t.npz", lambda p: p.write_bytes(b"PK\3\4")), TENSORS.format("npz")),
    Row("npz-array-of-petabytes", _vision("t.npz", _npy_of((1 << 50,))), TENSORS.format("npz")),
    Row("npz-negative-shape", _vision("t.npz", _npy_of((-3, 4))), TENSORS.format("npz")),
    Row("npz-no-array", _vision("t.npz", lambda p: zipfile.ZipFile(p, "w").writestr("x", "no")), r"t\.npz"),
    Row("npz-other-name", _vision("t.npz", _npz(y=RANDOM.numpy())), r"t\.npz .*no tensor 'x'"),
    Row("npz-other-shape", _vision("t.npz", _npz(x=RANDOM.numpy()[:, :1])), r"t\.npz: x has shape \(8, 1, 32, 32\)"),
    Row("npz-nan", _vision("t.npz", _npz(x=np.full((8, 3, 32, 32), np.nan))), r"t\.npz: x holds NaN"),
    Row("npz-text", _vision("t.npz", _npz(x=np.array(["a", "b"]))), TENSORS.format("npz")),
    Row("tensors-truncated", _vision("t.safetensors", _cut(_tensors(x=RANDOM))), TENSORS.format("safetensors")),
    Row("tensors-nan", _vision("t.safetensors", _tensors(x=RANDOM / 0 * 0)), r"t\.safetensors: x holds NaN"),
    Row("tensors-none", _vision("t.safetensors", _tensors(x=RANDOM[:0])), r"t\.safetensors: .*at least one"),
    Row(
        "tensors-that-overflow",
        _vision("t.safetensors", _tensors(x=torch.cat([RANDOM, torch.full((1, 3, 32, 32), 3e38)]))),
        r"NaN or infinity .*t\.safetensors",
    ),
    Row(
        "tensors-float8",
        _vision("t.safetensors", _tensors(x=RANDOM.to(torch.float8_e4m3fn))),
        r"t\.safetensors: x .*float8_e4m3fn.* float32",
    ),
    Row(
        "tensors-complex",
        _vision("t.safetensors", _tensors(x=RANDOM.to(torch.complex64))),
        r"t\.safetensors: x .*complex64.* float32",
    ),
    Row("tokens-none", _ids(), r"t\.safetensors: input_ids has shape \(8, 0\): .*at least one"),
    Row("tokens-all-masked", _masked, r"t\.safetensors: attention_mask is 0 everywhere in 1 of its .*number 3"),
    Row("tokens-out-of-range", _ids(2, 99, 3), "input_ids .* to 99"),
    Row("tokens-negative", _ids(2, -1, 3), "input_ids .* from -1"),
    Row("labels-out-of-range", _scored("w1\t0\nw2\t3\n"), r"dev\.tsv: .*'3' .*0 to 2"),
    Row("labels-unknown", _scored("w1\tbad\nw2\tgreat\n"), r"dev\.tsv: .*'great' .*class number"),
    *(
        Row(f"labels-numbered-{name}", _labelled(number), r"dev\.csv: label 'bad' .* in the model's config\.json")
        for name, number in {
            "99": 99,
            "-1": -1,
            "-100": -100,
            "1.7": 1.7,
            "infinite": "infinite",
            "null": None,
            "mapping": {"a": 1},
            "word": "x",
        }.items()
    ),
    Row(
        "labels-evaluated-as-99", _labelled(99, *SCORED), r"dev\.csv: label 'bad' .* 99 .*from 0 to 2: correct label2id"
    ),
    Row(
        "labels-told-what-to-do", _scored("w1\tgreat\n"), r"or name the classes by id2label in the model's config\.json"
    ),
    Row(
        "evaluation-without-tokens",
        _without_special_tokens(_scored("\t0\n" * 70 + "w1 w2\t1\n")),
        r"dev\.tsv: 70 of 71 texts .* no tokens, the first of them ''",
    ),
    Row(
        "labels-without-texts",
        _text("t.csv", "text,label\n,1\n ,0\n", "--calibration-column", "text", *FISHER[4:]),
        r"t\.csv .*no texts .*text",
    ),
    Row("labels-of-pairs", _scored("w1\tw2\t0\nw2\tw1\tmuch\n"), r"dev\.tsv: .*'much' .*class number"),
    Row("evaluation-numbers-of-rows", _scored("1\tw2\t0\n2\tw1\t1\n"), r"dev\.tsv: column 1 .*numbers"),
    Row(
        "evaluation-unknown-suffix", _scored_at("d.xlsx", lambda p: p.write_bytes(b"PK")), r"d\.xlsx: \.xlsx is unknown"
    ),
    Row(
        "evaluation-packed", _scored_at("d.csv.xz", lambda p: p.write_bytes(b"x")), r"d\.csv\.xz: \.xz files are packed"
    ),
    Row("evaluation-cut-gzip", _scored_at("d.csv.gz", lambda p: p.write_bytes(b"\x1f\x8b")), r"d\.csv\.gz cannot be"),
    Row("evaluation-folder", _scored_at("d", Path.mkdir), "d .*folder without tables"),
    Row("table-json-damaged", _table('[{"text": "w1"}', "t.json"), r"t\.json cannot be read as JSON"),
    Row("table-json-ragged", _table('{"text": ["a"], "b": []}', "t.json"), r"t\.json: its columns have lengths"),
    Row(
        "table-jsonl-null",
        _table('{"text": "w1"}\n{"text": null}\n', "t.jsonl"),
        r"t\.jsonl, row 2: .*'text' ",
    ),
    Row("table-jsonl-damaged", _table('{"text": "w1"}\n{"te\n', "t.jsonl"), r"t\.jsonl cannot be read as JSON: line 2"),
    Row("table-jsonl-deep", _table("[" * 100_000, "t.jsonl"), r"t\.jsonl cannot be read as JSON"),
    Row("table-semicolons", _table("text;label\nw1;1\n"), r"t\.csv .*'text' .*';'"),
    Row("table-parquet-damaged", _table("PAR1", "t.parquet"), r"t\.parquet.*(pyarrow|cannot be read as Parquet)"),
    Row(
        "table-header-of-numbers",
        _text("t.csv", "0,1\nw1,1\n", "--calibration-column", "1"),
        r"t\.csv: its first line is",
    ),
    Row("table-three-in-a-pair", _text("t.csv", "a,b,c\n", "--calibration-column", "a+b+c"), "two columns"),
    Row("texts-unknown-suffix", _text("t.pdf", "w1\nw2\n"), r"t\.pdf: \.pdf .*unknown"),
    Row("texts-binary", _text("t.txt", b"\x7fELF\0\0\0\0\0"), r"t\.txt cannot be read as text .*zero bytes"),
    Row(
        "texts-longer-than-the-network",
        lambda m: [*_text("t.txt", "w1\nw2\n")(m), "--max-text-length", "99"],
        "--max-text-length 99: bert .* 24 tokens",
    ),
    Row(
        "texts-length-of-pictures",
        _vision("p", lambda p: save_images(p, 2), "--max-text-length", "9"),
        "--max-text-length 9: .*no texts",
    ),
    Row(
        "pooling-of-a-classifier",
        lambda m: [*_text("t.txt", "w1\nw2\n")(m), "--pooling-in-graph"],
        "logits, no token features",
    ),
    Row("labels-negative", _scored("w1\t0\nw2\t-1\n"), r"dev\.tsv: label '-1'"),
    Row("labels-of-10000-digits", _scored(f"w1\t{'1' * 10_000}\n"), r"dev\.tsv: "),
    Row("scores-no-numbers", _scored_pairs("w1\tw2\t1\nw1\tw3\tmuch\n"), r"dev\.tsv: the last column .*much"),
    Row("scores-nan", _scored_pairs("w1\tw2\t1\nw1\tw3\tnan\n"), r"dev\.tsv: .*finite scores"),
    Row("scores-all-alike", _scored_pairs("w1\tw2\t1\nw1\tw3\t1\n"), r"dev\.tsv: .*two different"),
    Row("evaluation-ragged", _scored("w1\t0\nw2\n"), r"dev\.tsv has no column 2"),
    Row("evaluation-four-columns", _scored("a\tb\tc\td\n"), r"dev\.tsv: 4 columns"),
    Row("evaluation-not-utf8", _scored(b"caf\xe9\t0\n"), r"dev\.tsv cannot be read as a table"),
    Row(
        "evaluation-parts-of-a-set",
        _named_folders("train", "val"),
        "classes holds .*splits of a data set",
    ),
    Row("evaluation-one-class-twice", _named_folders("1", "01"), "'01' and '1' .*class 1"),
    Row("evaluation-class-folders", _class_folders(3), "classes .*3 class folders, .* 10 classes"),
    Row("evaluation-class-without-images", _class_without_images, "classes .*9 class folders, .*'c9' without images"),
    Row("evaluation-elongated", _resized(10, "--evaluate", 1, 1_000_000), r"c0/000\.png is too elongated"),
    Row("evaluation-folder-not-utf8", _class_folders(3, _in_folders(b"\xff")), "classes .*3 class folders"),
    Row(
        "evaluation-image",
        _class_folders(10, _written(lambda _: b"no picture")),
        r"image classes/c1/000\.png cannot be read",
    ),
    Row(
        "evaluation-image-truncated",
        _class_folders(10, _written(lambda whole: whole[: len(whole) // 2])),
        r"image classes/c1/000\.png cannot be read.*truncated",
    ),
    Row(
        "evaluation-bomb",
        _class_folders(10, _written(lambda _: _png(60_000, 60_000))),
        r"image classes/c1/000\.png cannot be read.*pixels",
    ),
)
ODD = (
    Row("two pictures behind links, their names not UTF-8", _odd_pictures),
    Row("pictures that tools have left beside class folders", _left_by_tools),
)
