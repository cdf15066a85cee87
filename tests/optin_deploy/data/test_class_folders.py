"""Which class a folder of pictures is of."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from timm.data import ImageNetInfo
from tiny_models import classifier
from torch import Tensor, nn

from optin_deploy.data.labels import class_number, classes_of_folders
from optin_deploy.errors import UserError
from optin_deploy.models import transformers_models as library
from optin_deploy.models.custom import custom_network
from optin_deploy.network import Network, Source

NATURAL = sorted(map(str, range(12)), key=int)


def named(names: Sequence[str] | None, classes: int = 0, by_name: Mapping[str, Any] | None = None) -> Network:
    """A network of transformers that calls its classes so; by placeholders where there are no ``names``."""
    count = classes or len(names or ())
    config = hf.ViTConfig(
        image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
    )
    config.id2label = dict(enumerate(names)) if names else {i: f"LABEL_{i}" for i in range(count)}
    config.label2id = dict(by_name) if by_name else {name: i for i, name in config.id2label.items()}
    module = library.prepare_module(hf.ViTForImageClassification(config))
    source = Source("transformers", type(module).__name__, module.config.to_dict())
    return library.network_of(module, source, "random", None, 7)


class Own(nn.Module):
    def __init__(self, classes: int) -> None:
        super().__init__()
        self.head = nn.Linear(3, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x.mean((2, 3)))


def own(classes: int) -> Network:
    return custom_network(Own(classes), {"x": torch.randn(2, 3, 8, 8)}, logits="output")


def refusal(network: Network, path: Path, folders: Sequence[str]) -> str:
    with pytest.raises(UserError) as caught:
        classes_of_folders(network, path, sorted(folders))
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("names", "folders"),
    [
        (["emu", "dog", "cat"], ["emu", "dog", "cat"]),
        (["normal", "benign", "malignant"], ["normal", "benign", "malignant"]),
        (["Hot Dog", "ice-cream"], ["hot_dog", "Ice cream"]),
        (["hot dog", "HOT DOG"], ["hot dog", "HOT DOG"]),
        (["café", "bar"], ["cafe\u0301", "BAR"]),
        (["tench, Tinca tinca", "goldfish, Carassius auratus"], ["Tinca_tinca", "goldfish"]),
        (["tench, Tinca tinca", "goldfish, Carassius auratus"], ["tench, Tinca tinca", "goldfish, Carassius auratus"]),
        # Whoever trains on folders named by numbers gets names in plain order.
        (sorted(NATURAL), sorted(NATURAL)),
        (["3", "1", "2"], ["3", "1", "2"]),
        (["cat", "dog", "emu"], ["0", "1", "2"]),
        (["cat", "dog", "emu"], ["0", "dog", "02"]),
        (None, ["LABEL_0", "LABEL_1"]),
        (None, ["ant", "bee"]),
        (None, [f"{i:02}" for i in range(12)]),
        (None, ["1", "2", "3"]),
    ],
)
def test_folders_of_a_network_of_transformers(tmp_path: Path, names: list[str] | None, folders: list[str]) -> None:
    found = classes_of_folders(named(names, len(folders)), tmp_path, sorted(folders))
    assert found == {folder: number for number, folder in enumerate(folders)}


def test_some_of_the_classes_by_name(tmp_path: Path) -> None:
    network = named(["emu", "dog", "cat", "ant"])
    assert classes_of_folders(network, tmp_path, ["CAT", "emu"]) == {"CAT": 2, "emu": 0}


def test_names_in_one_map_of_the_configuration_only(tmp_path: Path) -> None:
    network = named(None, 2, {"yes": 0, "no": 1})
    assert classes_of_folders(network, tmp_path, ["no", "yes"]) == {"yes": 0, "no": 1}


@pytest.mark.parametrize(
    ("names", "folders", "expected"),
    [
        (["cat", "dog"], ["ants", "bees"], "calls none 'ants', 'bees' but 'cat', 'dog'; in the order of names 'ants'"),
        (["cat", "dog", "emu"], ["cat", "dog", "emus"], "calls none 'emus'"),
        (["1", "2", "3"], ["0", "1", "2"], "calls none '0' but '1', '2', '3'"),
        (["cat", "dog"], ["cat", "Cat"], "'Cat' and 'cat' are both of class 0"),
        (["cat", "dog"], ["0", "00"], "'0' and '00' are both of class 0"),
        (["cat", "dog"], ["cat", "0"], "are both of class 0"),
        (["crane, bird", "crane, machine", "cat"], ["cat", "crane"], "'crane' is the name of classes 0, 1"),
        (["cat", "dog"], ["train", "val"], "splits of a data set"),
        (None, ["train", "test"], "splits of a data set"),
        (None, NATURAL, "class 2 is '2' in natural order .* and '10' in plain order"),
        (None, [f"class {i}" for i in range(12)], "class 2 is 'class 2' in natural order .* and 'class 10' in plain"),
        (None, ["apple", "Bear"], "class 0 is 'apple' in natural order .* and 'Bear' in plain order"),
    ],
)
def test_folders_that_can_be_read_in_two_ways(
    tmp_path: Path, names: list[str] | None, folders: list[str], expected: str
) -> None:
    assert re.search(expected, refusal(named(names, len(folders)), tmp_path, folders))


def test_maps_that_contradict_each_other(tmp_path: Path) -> None:
    network = named(["cat", "dog"], 2, {"cat": 1, "dog": 0})
    assert re.search(r"'cat' .*0, 1", refusal(network, tmp_path, ["cat", "dog"]))
    with pytest.raises(ValueError, match=r"'cat'.* 0 and 1"):
        class_number(network, "cat", 2)


def test_labels_of_tables_may_differ_in_case() -> None:
    network = named(["NEGATIVE", "POSITIVE"])
    assert [class_number(network, label, 2) for label in ("positive", "Negative", "1")] == [1, 0, 1]


def test_timm_sorts_in_natural_order(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = classifier(12)
    with caplog.at_level(logging.WARNING, logger="optin_deploy"):
        assert classes_of_folders(network, tmp_path, sorted(NATURAL)) == {name: int(name) for name in NATURAL}
        (record,) = caplog.records
        assert re.search(r"class 2 .*'2'.*order", record.message)
        assert "'10' in plain order" in record.message
        caplog.clear()
        padded = [f"{i:02}" for i in range(12)]
        assert classes_of_folders(network, tmp_path, padded) == {name: int(name) for name in padded}
        assert not caplog.records
        mixed = ["Zebra", "apple", *(f"x{i}" for i in range(10))]
        assert classes_of_folders(network, tmp_path, sorted(mixed))["Zebra"] == 11
        assert "'apple' in natural order" in caplog.text


def test_names_in_a_file_of_timm_come_first(tmp_path: Path) -> None:
    network = replace(classifier(3), class_names=(("emu",), ("n1", "dog"), ("cat",)))
    assert classes_of_folders(network, tmp_path, ["cat", "dog", "emu"]) == {"emu": 0, "dog": 1, "cat": 2}
    assert "calls none 'ant'" in refusal(network, tmp_path, ["ant", "bee", "cow"])


def test_own_modules_are_sorted_as_torchvision_does(tmp_path: Path) -> None:
    assert classes_of_folders(own(3), tmp_path, ["a", "b", "c"]) == {"a": 0, "b": 1, "c": 2}
    assert "'10' in plain order" in refusal(own(12), tmp_path, NATURAL)


SYNSETS = {"n01440764": 0, "n01443537": 1, "n15075141": 999}


def test_folders_named_as_imagenets_classes(tmp_path: Path) -> None:
    for network in (classifier(1000), own(1000), named(None, 1000)):
        assert classes_of_folders(network, tmp_path, list(SYNSETS)) == SYNSETS
        assert classes_of_folders(network, tmp_path, ["goldfish", "toilet tissue", "Tinca tinca"]) == {
            "goldfish": 1,
            "toilet tissue": 999,
            "Tinca tinca": 0,
        }
        assert re.search(r"'crane' .*134, 517", refusal(network, tmp_path, ["crane", "tench"]))


def imagenet() -> list[str]:
    return list(ImageNetInfo().label_descriptions())


@pytest.mark.parametrize("before", [[], ["background"]])
def test_synsets_for_a_network_with_words(tmp_path: Path, before: list[str]) -> None:
    network = named([*before, *imagenet()])
    expected = {synset: number + len(before) for synset, number in SYNSETS.items()}
    assert classes_of_folders(network, tmp_path, list(SYNSETS)) == expected


def test_synsets_say_nothing_of_other_classes(tmp_path: Path) -> None:
    network = named([f"product {i}" for i in range(1000)])
    assert "calls none 'n01440764'" in refusal(network, tmp_path, list(SYNSETS))


def test_a_thousand_classes_of_which_some_are_named_as_imagenets(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    few = sorted(["goldfish", *(f"product {i:03}" for i in range(999))])
    assert classes_of_folders(classifier(1000), tmp_path, few) == {name: number for number, name in enumerate(few)}
    words = dict.fromkeys(name.split(",")[0] for name in imagenet()[300:])
    some = [*words, *(f"my {i}" for i in range(1000 - len(words)))]
    assert "ImageNet" in refusal(classifier(1000), tmp_path, some)


def test_what_gives_no_class(tmp_path: Path) -> None:
    class Map(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x[:, :2]

    network = custom_network(Map(), {"x": torch.randn(2, 3, 8, 8)}, logits="output")
    assert "an answer for every token or pixel" in refusal(network, tmp_path, ["a", "b"])
    assert "numbers, not classes" in refusal(replace(own(2), head="regression"), tmp_path, ["a", "b"])
    assert "2 answers of yes or no for each sample" in refusal(replace(own(2), head="binary"), tmp_path, ["a", "b"])


def test_one_logit_is_two_classes(tmp_path: Path) -> None:
    assert classes_of_folders(own(1), tmp_path, ["no", "yes"]) == {"no": 0, "yes": 1}
