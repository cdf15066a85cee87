import pickle
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import timm.data
import torch
from calibrations import check_split, refusal, rows
from PIL import Image
from safetensors.torch import save_file
from tiny_models import (
    WORDS,
    own_batches,
    own_network,
    save_bert,
    save_images,
    save_lines,
    texts,
    vision_network,
)

from optin_deploy.data.builtin import builtin_images, builtin_texts
from optin_deploy.data.calibration import from_batches, load_calibration
from optin_deploy.data.image_files import image_files
from optin_deploy.data.preprocessing import ImagePreprocessing
from optin_deploy.data.texts import read_texts
from optin_deploy.errors import UserError
from optin_deploy.models.load import load_network
from optin_deploy.network import Network


@pytest.fixture(scope="module")
def vision() -> Network:
    return vision_network()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Network:
    path = tmp_path_factory.mktemp("bert")
    save_bert(path)
    return load_network(str(path), sequence_length=16)


@pytest.fixture(scope="module")
def own() -> Network:
    return own_network()


# Sources


def test_image_folder(tmp_path: Path, vision: Network) -> None:
    save_images(tmp_path / "a", 30)
    save_images(tmp_path / "b" / "deeper", 20, seed=1)
    (tmp_path / "notes.txt").write_text("no image")
    calibration = load_calibration(vision, tmp_path, samples=10)
    assert calibration.source == str(tmp_path)
    assert not calibration.builtin
    assert calibration.batches[0]["x"].shape == (10, 3, 32, 32)
    check_split(calibration, "x", 10, 32)


def test_modes_and_suffixes_of_images(tmp_path: Path, vision: Network) -> None:
    for mode, name in [("L", "a.PNG"), ("RGBA", "b.png"), ("CMYK", "c.jpg"), ("P", "d.bmp"), ("1", "e.tiff")]:
        Image.new("RGB", (40, 30)).convert(mode).save(tmp_path / name)
    calibration = load_calibration(vision, tmp_path)
    assert calibration.samples + len(calibration.held_out[0]["x"]) == 5


def test_pictures_of_tools_are_left_out(tmp_path: Path, vision: Network) -> None:
    save_images(tmp_path / ".hidden" / "a", 5)
    files = save_images(tmp_path / ".hidden" / "a" / "kept", 5)
    save_images(tmp_path / ".hidden" / "a" / "__MACOSX", 3)
    save_images(tmp_path / ".hidden" / "a" / ".ipynb_checkpoints", 3)
    files[0].rename(files[0].with_name("._000.png"))
    # A hidden folder that is named is meant.
    assert len(image_files(tmp_path / ".hidden" / "a")) == 9


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(32, 32), (32, 48)])
def test_resized_is_what_timm_resizes_to(mode: str, size: tuple[int, int]) -> None:
    preprocessing = ImagePreprocessing("x", size, crop_mode=mode)
    transform = timm.data.create_transform((3, *size), crop_pct=preprocessing.crop_pct, crop_mode=mode)
    for given in [(90, 30), (30, 90), (1, 40), (64, 64)]:
        resized = transform.transforms[0](Image.new("RGB", given))
        assert preprocessing.resized_size(*given) == pytest.approx(resized.size, abs=1)


def test_builtin_images(vision: Network) -> None:
    calibration = load_calibration(vision, None, samples=5)
    assert calibration.builtin
    assert calibration.source == "built-in samples"
    check_split(calibration, "x", 5, 32)
    for one, other in zip(builtin_images(3, seed=1), builtin_images(3, seed=1), strict=True):
        assert np.array_equal(np.asarray(one), np.asarray(other))


def test_builtin_texts(text: Network) -> None:
    assert len(set(builtin_texts())) == 256
    calibration = load_calibration(text, None)
    assert calibration.builtin
    assert (calibration.samples, sum(len(b["input_ids"]) for b in calibration.held_out)) == (224, 32)


def test_text_file(tmp_path: Path, text: Network) -> None:
    path = save_lines(tmp_path / "texts.txt", ["", *texts(100), "  ", *(f" {t} " for t in texts(20))])
    calibration = load_calibration(text, path, samples=40)
    check_split(calibration, "input_ids", 40, 32)
    assert set(calibration.batches[0]) == {"input_ids", "attention_mask"}
    assert {int(t) for r in rows(calibration.batches, "input_ids") for t in r} <= set(range(len(WORDS) + 4))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_texts_end_at_ends_of_lines_only(tmp_path: Path, end: str) -> None:
    lines = [f"{word}\u2028a\x0cb\x1cc\x85d" for word in ("w1", "w2")]
    (tmp_path / "t.txt").write_bytes(end.join(lines).encode())
    assert read_texts(tmp_path / "t.txt", None) == lines


TABLES: dict[str, tuple[str, Callable[[str], str], str | None]] = {
    "header.csv": ("id,text", lambda t: f'7,"{t}"', "text"),
    "spaces.csv": ("id,text", lambda t: f'7,"{t}"', " text"),
    "header-with-spaces.csv": ("id, text ", lambda t: f"7,{t}", " text "),
    "UPPER.CSV": ("id,text", lambda t: f'7,"{t}"', "text"),
    "excel.csv": ("\ufefftext,id", lambda t: f"{t},7", "text"),
    "number.tsv": ("", lambda t: f"7\t{t}\tx", "2"),
    "quotes.tsv": ("text", lambda t: f'" {t}', "text"),
}


@pytest.mark.parametrize("name", TABLES)
def test_tables(tmp_path: Path, text: Network, name: str) -> None:
    header, line, column = TABLES[name]
    path = save_lines(tmp_path / name, [*([header] if header else []), *map(line, texts(50))])
    check_split(load_calibration(text, path, column=column, samples=18), "input_ids", 18, 32)


def test_several_columns_add_up(tmp_path: Path, text: Network) -> None:
    lines = texts(80)
    path = save_lines(
        tmp_path / "pairs.csv", ["a,b", *(f"{x},{y}" for x, y in zip(lines[:40], lines[40:], strict=True))]
    )
    calibration = load_calibration(text, path, column="a,b", samples=48)
    check_split(calibration, "input_ids", 48, 32)


@pytest.mark.parametrize("suffix", ["npz", "safetensors"])
def test_tensors(tmp_path: Path, own: Network, text: Network, suffix: str) -> None:
    def save(tensors: dict[str, torch.Tensor]) -> Path:
        path = tmp_path / f"{len(tensors)}.{suffix}"
        if suffix == "npz":
            np.savez(path, **{n: t.numpy() for n, t in tensors.items()})
        else:
            save_file(tensors, path)
        return path

    path = save({"features": torch.randn(50, 5, 8, dtype=torch.float64)})
    calibration = load_calibration(own, path, samples=12)
    assert calibration.batches[0]["features"].dtype == torch.float32
    check_split(calibration, "features", 12, 32)

    tokens = torch.randint(4, 44, (20, 9), dtype=torch.int32)
    path = save({"input_ids": tokens, "attention_mask": torch.ones(20, 9, dtype=torch.bool), "other": tokens.clone()})
    calibration = load_calibration(text, path)
    assert {n: t.dtype for n, t in calibration.batches[0].items()} == dict.fromkeys(text.inputs, torch.int64)
    check_split(calibration, "input_ids", 18, 2)


def test_batches_of_the_caller() -> None:
    batches = own_batches(3)
    calibration = from_batches(batches)
    assert (calibration.samples, len(calibration.batches), len(calibration.held_out)) == (16, 2, 1)
    assert torch.equal(calibration.held_out[0]["features"], batches[-1]["features"])
    assert calibration.digest == from_batches(own_batches(3)).digest != from_batches(own_batches(2)).digest
    with pytest.raises(UserError, match="at least 2"):
        from_batches(batches[:1])


# Drawing


@pytest.mark.parametrize(
    ("available", "samples", "used", "held"),
    [(2, None, 1, 1), (8, None, 7, 1), (40, 10, 10, 5), (100, 68, 68, 32), (100, 5, 5, 32), (100, 1000, 88, 12)],
)
def test_sample_counts(
    tmp_path: Path, text: Network, available: int, samples: int | None, used: int, held: int
) -> None:
    path = save_lines(tmp_path / "t.txt", texts(available))
    check_split(load_calibration(text, path, samples=samples), "input_ids", used, held)


def test_default_counts(tmp_path: Path, text: Network, vision: Network, own: Network) -> None:
    assert load_calibration(text, save_lines(tmp_path / "t.txt", texts(1200))).samples == 1024
    np.savez(tmp_path / "t.npz", features=np.zeros((1200, 5, 8)))
    assert load_calibration(own, tmp_path / "t.npz").samples == 1024
    save_images(tmp_path / "images", 160)
    assert load_calibration(vision, tmp_path / "images").samples == 128


def test_one_seed_makes_one_draw(tmp_path: Path, text: Network) -> None:
    path = save_lines(tmp_path / "t.txt", texts(80))
    first, same, other = (load_calibration(text, path, samples=8, seed=s) for s in (3, 3, 4))
    assert first.digest == same.digest != other.digest
    for one, again in zip(first.batches, same.batches, strict=True):
        assert all(torch.equal(one[n], again[n]) for n in one)


# Bad inputs


def test_missing_path(tmp_path: Path, vision: Network, text: Network) -> None:
    for network in (vision, text):
        assert "does not exist" in refusal(network, tmp_path / "none")


def test_wrong_sample_count(vision: Network) -> None:
    assert "--calibration-samples 0" in refusal(vision, None, samples=0)


def test_bad_image_folders(tmp_path: Path, vision: Network) -> None:
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refusal(vision, tmp_path / "empty")
    (file,) = save_images(tmp_path / "one", 1)
    assert "at least 2" in refusal(vision, tmp_path / "one")
    assert "not a folder" in refusal(vision, file)
    assert "not a folder" in refusal(vision, save_lines(tmp_path / "t.txt", texts(4)))


@pytest.mark.parametrize("damage", ["text", "truncated", "empty", "directory"])
def test_unreadable_image(tmp_path: Path, vision: Network, damage: str) -> None:
    files = save_images(tmp_path, 4)
    content = files[2].read_bytes()
    files[2].unlink()
    if damage == "directory":
        files[2].mkdir()
    else:
        files[2].write_bytes({"text": b"no image", "truncated": content[:-600], "empty": b""}[damage])
    message = refusal(vision, tmp_path)
    assert f"image {files[2]} cannot be read" in message


def test_bad_text_files(tmp_path: Path, text: Network) -> None:
    assert "holds no texts" in refusal(text, save_lines(tmp_path / "empty.txt", ["", "  "]))
    assert "at least 2" in refusal(text, save_lines(tmp_path / "one.txt", ["w1", "w1 "]))
    assert "is a folder" in refusal(text, tmp_path)
    for name, column in (("latin.txt", None), ("latin.csv", "1")):
        (tmp_path / name).write_bytes("caf\u00e9\nth\u00e9\n".encode("latin-1"))
        assert "UTF-8" in refusal(text, tmp_path / name, column=column)


@pytest.mark.parametrize(
    ("name", "lines", "column", "expected"),
    [
        ("a.csv", ["text,label", "w1,2", "w2,3"], None, "--calibration-column"),
        ("a.csv", ["text,label", "w1,2", "w2,3"], "sentence", "no column 'sentence' in its header (text, label)"),
        ("a.csv", ["w1,2", "w2,3"], "3", "no column 3: its rows have 2 columns"),
        ("a.csv", ["w1,2", "w2,3"], "0", "counted from 1"),
        ("a.csv", ["w1,2", "w2,3"], "", "no column ''"),
        ("a.csv", ["w1,2", "w2,3"], "²", "no column '²'"),
        ("a.csv", ["id,text", "1,w1", "2"], "text", "row 3: too few columns"),
        ("a.csv", ["text"], "text", "a header and no rows"),
        ("a.csv", [], "text", "holds no rows"),
        ("a.csv", ["text,id", ",1", " ,2"], "text", "holds no texts"),
    ],
)
def test_bad_tables(
    tmp_path: Path, text: Network, name: str, lines: list[str], column: str | None, expected: str
) -> None:
    assert expected in refusal(text, save_lines(tmp_path / name, lines), column=column)


def test_column_of_what_is_no_table(tmp_path: Path, text: Network, vision: Network) -> None:
    lines = save_lines(tmp_path / "t.txt", texts(4))
    for network, path in ((text, None), (text, lines), (vision, tmp_path)):
        with pytest.raises(UserError, match="--calibration-column text"):
            load_calibration(network, path, column="text")


def test_own_module_needs_tensors(tmp_path: Path, own: Network) -> None:
    assert "needs tensors" in refusal(own, None)
    with pytest.raises(UserError, match="tensors"):
        load_calibration(own, save_lines(tmp_path / "t.txt", texts(4)))


@pytest.mark.parametrize(
    ("arrays", "expected"),
    [
        ({"x": np.zeros((4, 5, 8))}, "has no tensor 'features'; it has x"),
        ({}, "it has none"),
        ({"features": np.zeros((4, 5, 9))}, "the network takes (samples, 5, 8)"),
        ({"features": np.zeros((4, 40))}, "the network takes (samples, 5, 8)"),
        ({"features": np.float64(3)}, "the network takes (samples, 5, 8)"),
        ({"features": np.zeros((0, 5, 8))}, "at least one long"),
        ({"features": np.zeros((1, 5, 8))}, "at least 2"),
        ({"features": np.zeros((4, 5, 8)), "x": np.zeros(3)}, "found lengths [3, 4]"),
        ({"features": np.full((4, 5, 8), np.nan)}, "features holds NaN or infinity"),
        ({"features": np.full((4, 5, 8), np.inf)}, "features holds NaN or infinity"),
        ({"features": np.full((4, 5, 8), "text")}, "cannot be read"),
        ({"features": np.full((4, 5, 8), None)}, "cannot be read"),
    ],
)
def test_wrong_tensors(tmp_path: Path, own: Network, arrays: dict[str, np.ndarray], expected: str) -> None:
    np.savez(tmp_path / "t.npz", **arrays)
    assert expected in refusal(own, tmp_path / "t.npz")


def test_damaged_tensor_files(tmp_path: Path, own: Network) -> None:
    np.savez(tmp_path / "cut.npz", features=np.zeros((9, 5, 8)))
    cut = (tmp_path / "cut.npz").read_bytes()
    np.save(tmp_path / "single.npy", np.zeros((9, 5, 8)))
    for name, content in [
        ("cut.npz", cut[: len(cut) // 2]),
        ("text.npz", b"no arrays"),
        ("empty.npz", b""),
        ("single.npz", (tmp_path / "single.npy").read_bytes()),
        ("text.safetensors", b"no tensors"),
        ("empty.safetensors", b""),
    ]:
        (tmp_path / name).write_bytes(content)
        assert "cannot be read" in refusal(own, tmp_path / name)


class Trap:
    """Unpickling it leaves a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (self.path,))


def test_pickles_are_never_loaded(tmp_path: Path, own: Network) -> None:
    trap = tmp_path / "sprung"
    (tmp_path / "plain.npz").write_bytes(pickle.dumps(Trap(trap)))
    np.savez(tmp_path / "object.npz", features=np.array([Trap(trap)] * 4, dtype=object))
    for name in ("plain.npz", "object.npz"):
        assert "cannot be read" in refusal(own, tmp_path / name)
    assert not trap.exists()


def test_wrong_token_tensors(tmp_path: Path, text: Network) -> None:
    ids, mask = np.ones((4, 9), dtype=np.int64), np.ones((4, 9), dtype=np.int64)
    path = tmp_path / "t.npz"
    for tensors, expected in [
        ({"input_ids": ids, "attention_mask": mask[:, :5]}, "different lengths"),
        ({"input_ids": ids, "attention_mask": mask[0]}, "the network takes (samples, sequence)"),
        ({"input_ids": ids + 0.5, "attention_mask": mask}, "takes integers"),
        ({"input_ids": ids * 44, "attention_mask": mask}, "from 44 to 44"),
        ({"input_ids": -ids, "attention_mask": mask}, "from -1 to -1"),
        ({"input_ids": ids.repeat(4, 1), "attention_mask": mask.repeat(4, 1)}, "of shape (1, 36)"),
    ]:
        np.savez(path, **tensors)
        assert expected in refusal(text, path)


def test_tokenizer_of_another_model(tmp_path: Path) -> None:
    save_bert(tmp_path, vocab_size=20)
    network = load_network(str(tmp_path))
    assert re.search(r"fails on input_ids", refusal(network, save_lines(tmp_path / "t.txt", texts(40))))
