import copy
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from scipy.stats import spearmanr
from tiny_models import classifier, own_network, save_bert, save_images, save_lines, texts, vision_network
from torch import nn

from optin_deploy.errors import UserError
from optin_deploy.evaluation.agreement import agreement
from optin_deploy.evaluation.dataset import Dataset
from optin_deploy.evaluation.images import load_dataset
from optin_deploy.evaluation.texts import spearman
from optin_deploy.models.custom import custom_network
from optin_deploy.models.load import load_network
from optin_deploy.network import Network


@pytest.fixture(scope="module")
def labels_network(tmp_path_factory: pytest.TempPathFactory) -> Network:
    path = tmp_path_factory.mktemp("classifier")
    save_bert(path)
    return load_network(str(path), sequence_length=16)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Network:
    path = tmp_path_factory.mktemp("encoder")
    save_bert(path, head=False)
    return load_network(str(path), sequence_length=16)


def measured(dataset: Dataset, network: Network) -> float:
    return dataset.measure(network.module)


def noisy(module: nn.Module, scale: float = 0.05) -> nn.Module:
    torch.manual_seed(7)
    other = copy.deepcopy(module)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=scale)
    return other


def refusal(network: Network, path: Path, columns: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_dataset(network, path, columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Spearman


@given(st.lists(st.tuples(st.integers(0, 6), st.floats(-1, 1).map(lambda x: round(x, 1))), min_size=3, max_size=30))
def test_spearman_is_scipys(pairs: list[tuple[int, float]]) -> None:
    a, b = (torch.tensor(values, dtype=torch.float64) for values in zip(*pairs, strict=True))
    if len(a.unique()) > 1 and len(b.unique()) > 1:
        assert spearman(a, b) == pytest.approx(spearmanr(a, b).statistic, abs=1e-12)


# Accuracy on texts


def predictions(network: Network, lines: list[str]) -> list[int]:
    with torch.inference_mode():
        return [int(network.forward(network.preprocessing([line]))["logits"].argmax()) for line in lines]


def off_by_one(predicted: list[int], right: Callable[[int], bool], classes: int) -> list[int]:
    return [p if right(i) else (p + 1) % classes for i, p in enumerate(predicted)]


@pytest.mark.parametrize("named", [False, True])
def test_accuracy_by_hand(tmp_path: Path, labels_network: Network, named: bool) -> None:
    lines = texts(90)
    wanted = off_by_one(predictions(labels_network, lines), lambda i: i % 3 > 0, 3)
    written = [["bad", "fair", "good"][w] if named else str(w) for w in wanted]
    path = save_lines(tmp_path / "t.tsv", [f"{line}\t{w}" for line, w in zip(lines, written, strict=True)])
    dataset = load_dataset(labels_network, path)
    assert (dataset.metric, dataset.samples) == ("accuracy", 90)
    assert measured(dataset, labels_network) == pytest.approx(100 * 60 / 90)


def test_columns_by_name(tmp_path: Path, labels_network: Network) -> None:
    (predicted,) = predictions(labels_network, ["w1 w2"])
    path = save_lines(tmp_path / "t.csv", ["id,label,text", f"1,{predicted},w1 w2", f"2,{(predicted + 1) % 3},w1 w2"])
    assert measured(load_dataset(labels_network, path, "text,label"), labels_network) == 50


def test_label_names_come_before_numbers(tmp_path: Path) -> None:
    save_bert(tmp_path / "model", id2label={0: "1", 1: "2", 2: "3"}, label2id={"1": 0, "2": 1, "3": 2})
    network = load_network(str(tmp_path / "model"), sequence_length=16)
    lines = texts(6)
    rows = [f"{line},{p + 1}" for line, p in zip(lines, predictions(network, lines), strict=True)]
    assert measured(load_dataset(network, save_lines(tmp_path / "t.csv", rows)), network) == 100


def test_classes_may_be_named_in_one_map_of_the_configuration_only(tmp_path: Path) -> None:
    names = ["bad", "fair", "good"]
    save_bert(tmp_path / "model", id2label=dict(enumerate(names)), label2id={f"LABEL_{i}": i for i in range(3)})
    network = load_network(str(tmp_path / "model"), sequence_length=16)
    lines = texts(6)
    rows = [f"{line},{names[p]}" for line, p in zip(lines, predictions(network, lines), strict=True)]
    assert measured(load_dataset(network, save_lines(tmp_path / "t.csv", rows)), network) == 100


# Sentence pairs


def test_pairs_by_hand(tmp_path: Path, encoder: Network) -> None:
    lines = texts(40)
    pairs = list(zip(lines[:30], lines[10:], strict=True))
    scores = [round(i * 7 % 11 / 2, 1) for i in range(30)]
    path = save_lines(tmp_path / "t.tsv", [f"{a}\t{b}\t{s}" for (a, b), s in zip(pairs, scores, strict=True)])

    def embedding(text: str) -> torch.Tensor:
        with torch.inference_mode():
            return encoder.forward(encoder.preprocessing([text]))["last_hidden_state"][0].double().mean(0)

    cosines = [float(torch.cosine_similarity(embedding(a), embedding(b), dim=0)) for a, b in pairs]
    dataset = load_dataset(encoder, path)
    assert (dataset.metric, dataset.samples) == ("Spearman × 100", 30)
    assert measured(dataset, encoder) == pytest.approx(100 * spearmanr(cosines, scores).statistic, abs=0.1)


# Images


def test_top1_by_hand(tmp_path: Path) -> None:
    network = classifier(3)
    files = save_images(tmp_path / "all", 24)
    with torch.inference_mode():
        predicted = [int(network.forward(network.preprocessing([Image.open(f)]))["logits"].argmax()) for f in files]
    for file, wanted in zip(files, off_by_one(predicted, lambda i: i % 4 > 0, 3), strict=True):
        folder = tmp_path / "set" / ("ant", "bee", "cow")[wanted] / "deeper"
        folder.mkdir(parents=True, exist_ok=True)
        file.rename(folder / file.name)
    dataset = load_dataset(network, tmp_path / "set")
    assert (dataset.metric, dataset.samples) == ("top-1", 24)
    assert measured(dataset, network) == pytest.approx(75)


def test_some_of_many_classes_are_named_by_number(tmp_path: Path) -> None:
    network = vision_network()
    (file,) = save_images(tmp_path / "all", 1)
    with torch.inference_mode():
        predicted = int(network.forward(network.preprocessing([Image.open(file)]))["logits"].argmax())
    for number in (predicted, (predicted + 1) % 1000):
        folder = tmp_path / "set" / f"{number:04}"
        folder.mkdir(parents=True)
        Image.open(file).save(folder / "a.png")
    assert measured(load_dataset(network, tmp_path / "set"), network) == 50
    (tmp_path / "set" / f"{predicted:04}").rename(tmp_path / "set" / "cat")
    assert re.search(r"2 class folders.*1000 classes", refusal(network, tmp_path / "set"))


# Bad inputs


def test_missing_data(tmp_path: Path, labels_network: Network) -> None:
    assert "does not exist" in refusal(labels_network, tmp_path / "none.csv")
    assert "is a folder" in refusal(labels_network, tmp_path)


def test_unsuitable_networks(tmp_path: Path, encoder: Network, labels_network: Network) -> None:
    two = save_lines(tmp_path / "two.csv", ["w1,0", "w2,1"])
    assert "no class logits" in refusal(encoder, two)
    assert "without preprocessing" in refusal(own_network(), two)


@pytest.mark.parametrize(
    ("lines", "columns", "expected"),
    [
        (["w1", "w2"], None, "1 columns; name two"),
        (["a,b,c,d"], None, "4 columns"),
        (["w1,0,x,y"], "1,2,3,4", "4 columns"),
        (["text,label", "w1,0"], "text,mark", "no column 'mark'"),
        (["w1,0", "w2,ugly"], None, "label 'ugly' is no class number from 0 to 2 and none of bad, fair, good"),
        (["w1,0", "w2,3"], None, "label '3'"),
        (["w1,0", "w2,-1"], None, "label '-1'"),
        (["w1,0", "w2,"], None, "label ''"),
        ([], None, "holds no rows"),
    ],
)
def test_bad_tables(
    tmp_path: Path, labels_network: Network, lines: list[str], columns: str | None, expected: str
) -> None:
    path = save_lines(tmp_path / "t.csv", lines)
    message = refusal(labels_network, path, columns)
    assert expected in message
    assert str(path) in message


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["w1,w2,high", "w1,w3,2"], "last column must be a number"),
        (["w1,w2,nan", "w1,w3,2"], "finite scores"),
        (["w1,w2,3", "w1,w3,3"], "two different"),
    ],
)
def test_bad_pairs(tmp_path: Path, encoder: Network, lines: list[str], expected: str) -> None:
    assert expected in refusal(encoder, save_lines(tmp_path / "t.csv", lines))


def test_bad_class_folders(tmp_path: Path) -> None:
    network = classifier(2)
    save_images(tmp_path, 2)
    assert "no class folders" in refusal(network, tmp_path)
    for name in "abc":
        save_images(tmp_path / name, 1)
    assert re.search(r"3 class folders.* 2", refusal(network, tmp_path))
    (tmp_path / "empty").mkdir()
    assert "holds no images" in refusal(network, tmp_path / "empty")
    assert "not a folder" in refusal(network, save_lines(tmp_path / "t.csv", ["a,b"]))


# Agreement


@pytest.mark.parametrize("head", [True, False])
def test_agreement_by_hand(labels_network: Network, encoder: Network, head: bool) -> None:
    network = labels_network if head else encoder
    name, other = next(iter(network.outputs)), noisy(network.module)
    batches = [network.preprocessing(texts(20)[:9]), network.preprocessing(texts(20)[9:])]
    cosines, errors, norms, equal = [], 0.0, 0.0, []
    for batch in batches:
        with torch.inference_mode():
            dense, small = network.forward(batch)[name], network.forward(batch, other)[name]
        for a, b, mask in zip(dense, small, batch["attention_mask"].bool(), strict=True):
            a, b = (a, b) if head else (a[mask], b[mask])
            cosines.append(float(torch.cosine_similarity(a.flatten(), b.flatten(), dim=0)))
            errors += float((a - b).square().sum())
            norms += float(a.square().sum())
            equal.append(float(a.argmax() == b.argmax()))
    (row,) = agreement(network, other, batches)
    assert (row.output, row.samples) == (name, 20)
    assert row.cosine == pytest.approx(sum(cosines) / 20, abs=1e-5)
    assert row.relative_error == pytest.approx((errors / norms) ** 0.5, rel=1e-4)
    assert row.top1_agreement == (pytest.approx(sum(equal) / 20) if head else None)
    assert 0 < row.relative_error < 2


def test_agreement_with_itself(labels_network: Network) -> None:
    (row,) = agreement(labels_network, labels_network.module, [labels_network.preprocessing(texts(5))])
    assert (row.cosine, row.relative_error, row.top1_agreement) == (pytest.approx(1), 0, 1)


def test_as_many_tokens_as_classes_are_no_padding(labels_network: Network) -> None:
    batch = {"input_ids": torch.tensor([[2, 5, 3], [2, 3, 0]]), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    other = noisy(labels_network.module, 0.3)
    with torch.inference_mode():
        a, b = (labels_network.forward(batch, m)["logits"] for m in (labels_network.module, other))
    (row,) = agreement(labels_network, other, [batch])
    assert row.relative_error == pytest.approx(float((a - b).norm() / a.norm()), rel=1e-5)


class TokenClasses(nn.Module):
    """Two logits a token, of which one sign of the weight turns the order."""

    def __init__(self, weights: list[float]) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor(weights))

    def forward(self, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        logits = self.weights[ids]
        return torch.stack([logits, -logits], dim=-1)


def test_padding_does_not_count_as_agreement() -> None:
    batch = {"ids": torch.tensor([[0, 1, 2, 2]]), "mask": torch.tensor([[1, 1, 0, 0]])}
    network = custom_network(TokenClasses([1.0, 1.0, 1.0]), batch, logits="output")
    network = Network(**{**vars(network), "token_mask": "mask", "sequence_inputs": ("ids", "mask")})
    (row,) = agreement(network, TokenClasses([1.0, -1.0, 1.0]), [batch])
    assert row.top1_agreement == 0.5
    assert row.cosine == pytest.approx(0)
