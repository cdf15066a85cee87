"""Labels beside calibration data, for the criteria that need them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from calibrations import check_split, refusal, rows
from PIL import Image
from tiny_models import classifier, own_network, save_bert, save_images, save_lines, texts, vision_network

from optin_deploy.data import labels as labels_module
from optin_deploy.data import texts as texts_module
from optin_deploy.data.calibration import Calibration, from_batches, load_calibration
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


def labelled_rows(count: int) -> dict[str, int]:
    """Texts of `texts`, and classes that tell which text it is: its first word, by number, modulo three."""
    return {text: int(text.split()[0].removeprefix("w")) % 3 for text in texts(count)}


def check_labels(calibration: Calibration, of_row: Callable[[tuple[float, ...]], int]) -> None:
    """Every sample has the label of its own row."""
    assert calibration.labels is not None
    (name, *_) = calibration.batches[0]
    assert [len(c) for c in calibration.labels] == [len(b[name]) for b in calibration.batches]
    found = torch.cat(calibration.labels)
    assert found.dtype == torch.int64
    assert found.tolist() == [of_row(row) for row in rows(calibration.batches, name)]
    assert len(set(found.tolist())) > 1


@pytest.mark.parametrize(
    ("header", "column", "labels", "spelt"),
    [
        ("text,class", "text", "class", str),
        ("text,class", "text", " class", ["bad", "fair", "good"].__getitem__),
        ("text,class", "text", "class", [" bad ", "1", "good"].__getitem__),
        ("", "1", "2", str),
    ],
)
def test_labels_of_a_table(
    tmp_path: Path, text: Network, header: str, column: str, labels: str, spelt: Callable[[int], str]
) -> None:
    lines = [f" {t},{spelt(c)}" for t, c in labelled_rows(90).items()]
    path = save_lines(tmp_path / "t.csv", [*([header] if header else []), *lines, *lines[:5], " ,9" if header else ""])
    calibration = load_calibration(text, path, column=column, labels=labels, samples=50)
    check_split(calibration, "input_ids", 50, 32)
    # Behind [CLS] stands the first word; words come behind four special tokens.
    check_labels(calibration, lambda row: (int(row[1]) - 4) % 3)


def test_labels_change_no_sample(tmp_path: Path, text: Network) -> None:
    path = save_lines(tmp_path / "t.csv", ["text,class", *(f"{t},{c}" for t, c in labelled_rows(90).items())])
    plain = load_calibration(text, path, column="text", samples=40)
    given = load_calibration(text, path, column="text", labels="class", samples=40)
    assert plain.labels is None
    for one, other in zip(plain.batches, given.batches, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_other_labels_are_other_data(tmp_path: Path, text: Network) -> None:
    lines = labelled_rows(90)
    digests = set()
    for shift in (0, 1):
        path = save_lines(tmp_path / "t.csv", ["text,class", *(f"{t},{(c + shift) % 3}" for t, c in lines.items())])
        digests.add(load_calibration(text, path, column="text", labels="class").digest)
    digests.add(load_calibration(text, path, column="text").digest)
    assert len(digests) == 3


def test_the_classes_of_a_table_are_counted_once(
    tmp_path: Path, text: Network, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_lines(tmp_path / "t.csv", ["text,class", *(f"{t},{c}" for t, c in labelled_rows(90).items())])
    calls: list[int] = []
    count = labels_module.class_count
    monkeypatch.setattr(texts_module, "class_count", lambda network: calls.append(1) or count(network))
    load_calibration(text, path, column="text", labels="class")
    assert calls == [1]


def brightness(row: tuple[float, ...]) -> int:
    return int(sum(row) > 0)


@pytest.mark.parametrize("folders", [("0", "1"), ("3", "7"), ("3", "7/deeper")])
def test_labels_of_class_folders(tmp_path: Path, folders: tuple[str, str]) -> None:
    network = classifier(10)
    for folder, value in zip(folders, (0, 255), strict=True):
        (tmp_path / folder).mkdir(parents=True)
        for i in range(25):
            Image.new("RGB", (40, 40), (value, i, value)).save(tmp_path / folder / f"{i}.png")
    # What stands in no folder has no class.
    save_images(tmp_path, 2)
    calibration = load_calibration(network, tmp_path, labels="folders", samples=18)
    assert calibration.samples == 18
    numbers = [int(Path(folder).parts[0]) for folder in folders]
    check_labels(calibration, lambda row: numbers[brightness(row)])


def test_folders_for_every_class_are_numbered_by_name(tmp_path: Path) -> None:
    network = classifier(2)
    for folder, value in (("dog", 255), ("cat", 0)):
        (tmp_path / folder).mkdir()
        for i in range(25):
            Image.new("RGB", (40, 40), (value, i, value)).save(tmp_path / folder / f"{i}.png")
    check_labels(load_calibration(network, tmp_path, labels="folders", samples=18), brightness)


def test_bad_labels_of_tables(tmp_path: Path, text: Network) -> None:
    path = save_lines(tmp_path / "t.csv", ["text,class,other", *(f"{t},{c},best" for t, c in labelled_rows(9).items())])
    for options, expected in [
        ({"column": "text", "labels": "other"}, "'best' is no class number from 0 to 2"),
        ({"column": "text", "labels": "kind"}, "no column 'kind'"),
        ({"column": "text", "labels": "3"}, "no column '3'"),
    ]:
        assert expected in refusal(text, path, **options)
    for options in ({"labels": "class"}, {"column": "text,other", "labels": "class"}):
        with pytest.raises(UserError, match=r"--calibration-labels class.*text column") as caught:
            load_calibration(text, path, **options)
        assert "\n" not in str(caught.value)
    high = save_lines(tmp_path / "high.csv", [f"{t},{c + 1}" for t, c in labelled_rows(9).items()])
    assert "label '3' is no class number" in refusal(text, high, column="1", labels="2")


def test_labels_of_what_has_none(tmp_path: Path, text: Network, vision: Network, own: Network) -> None:
    lines = save_lines(tmp_path / "t.txt", texts(4))
    np.savez(tmp_path / "t.npz", features=np.zeros((4, 5, 8)))
    save_images(tmp_path / "flat", 4)
    save_images(tmp_path / "classes" / "unknown", 4)
    save_bert(tmp_path / "encoder", head=False)
    encoder = load_network(str(tmp_path / "encoder"))
    for network, path, given, expected in [
        (text, None, "class", "table of texts"),
        (text, lines, "class", "table of texts"),
        (own, tmp_path / "t.npz", "features", "table of texts"),
        (vision, None, "folders", "table of texts"),
        (vision, tmp_path / "classes", "class", "say `folders`"),
        (vision, tmp_path / "flat", "folders", "has no class folders"),
        (vision, tmp_path / "classes", "folders", "1 class folders, .* 1000 classes"),
        (encoder, lines, "class", "the network has no class logits"),
    ]:
        with pytest.raises(UserError, match=expected) as caught:
            load_calibration(network, path, labels=given)
        assert "\n" not in str(caught.value)


def test_batches_of_the_callers_own_may_have_labels() -> None:
    own = [{"x": torch.full((2, 3), float(i))} for i in range(3)]
    labels = [torch.tensor([i, i]) for i in range(3)]
    given = from_batches(own, labels)
    assert given.labels is not None
    assert [t.tolist() for t in given.labels] == [[0, 0], [1, 1]]
    assert given.digest != from_batches(own).digest
    with pytest.raises(UserError, match=r"2 batches.*3 batches"):
        from_batches(own, labels[:2])
