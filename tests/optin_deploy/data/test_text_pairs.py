"""Pairs of texts as one input: calibrated and evaluated as the model's own pipeline takes them."""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr
from text_models import save_encoder, save_pair_classifier
from tiny_models import save_lines, texts
from torch import Tensor, nn

import optin_deploy
from optin_deploy.data.calibration import Calibration, load_calibration
from optin_deploy.errors import UserError
from optin_deploy.evaluation.load import load_dataset
from optin_deploy.models.load import load_network
from optin_deploy.network import Network
from optin_deploy.nn.task_head import HeadKind
from optin_deploy.run.prepare import prepare

pytestmark = pytest.mark.slow


FIRST, SECOND = texts(60)[:30], texts(60)[30:]


def logits(network: Network, module: nn.Module, first: str, second: str) -> Tensor:
    """What the model gives for one pair, by its own tokenizer."""
    encoded = network.preprocessing.tokenizer(first, second, truncation=True, max_length=32, return_tensors="pt")
    with torch.inference_mode():
        return module(**encoded).logits[0]


def figure(network: Network, path: Path, columns: str | None = None) -> tuple[str, float]:
    dataset = load_dataset(network, path, columns)
    return dataset.metric, dataset.measure(network.module)


def refusal(network: Network, path: Path, columns: str | None = None) -> str:
    with pytest.raises(UserError) as caught:
        load_dataset(network, path, columns)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", ["bert", "roberta"])
@pytest.mark.parametrize("columns", [None, "a,b,label", "a+b,label", "label"])
def test_classifier_of_pairs(tmp_path: Path, kind: str, columns: str | None) -> None:
    module = save_pair_classifier(tmp_path / "m", kind)
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    wanted = [int(logits(network, module, a, b).argmax()) for a, b in zip(FIRST, SECOND, strict=True)]
    assert len(set(wanted)) > 1
    wanted = [(w + (i % 5 == 0)) % 3 for i, w in enumerate(wanted)]
    header = [] if columns is None else ["a,b,label"]
    rows = [f"{a},{b},{w}" for a, b, w in zip(FIRST, SECOND, wanted, strict=True)]
    path = save_lines(tmp_path / "t.csv", [*header, *rows])
    if columns == "label":
        assert re.search(r"1 columns.*text,label", refusal(network, path, columns))
    else:
        assert figure(network, path, columns) == ("accuracy", pytest.approx(80))


def test_types_of_tokens_and_order_count(tmp_path: Path) -> None:
    save_pair_classifier(tmp_path / "m")
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    batch = network.preprocessing([("w1 w2", "w3"), ("w1", "w2 w3 w4")])
    assert batch["token_type_ids"].tolist() == [[0, 0, 0, 0, 1, 1, 0], [0, 0, 0, 1, 1, 1, 1]]
    assert batch["attention_mask"].sum(1).tolist() == [6, 7]
    save_pair_classifier(tmp_path / "r", "roberta")
    roberta = load_network(str(tmp_path / "r"), sequence_length=8)
    assert set(roberta.preprocessing([("w1", "w2")])) == {"input_ids", "attention_mask"}


def test_the_longer_text_of_a_pair_is_cut_first(tmp_path: Path) -> None:
    module = save_pair_classifier(tmp_path / "m")
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    long = " ".join(f"w{i}" for i in range(40))
    batch = network.preprocessing([("w1 w2", long)])
    assert batch["input_ids"].shape == (1, 32)
    assert int(batch["token_type_ids"].sum()) == 32 - 4
    with torch.inference_mode():
        given = network.forward(batch)["logits"][0]
    torch.testing.assert_close(given, logits(network, module, "w1 w2", long))


def head(tmp_path: Path, kind: HeadKind) -> tuple[nn.Module, Network]:
    module = save_pair_classifier(tmp_path / "m", labels=1)
    return module, replace(load_network(str(tmp_path / "m"), sequence_length=8), head=kind)


@pytest.mark.parametrize("kind", ["binary", "regression"])
def test_one_number_for_a_pair_is_ranked(tmp_path: Path, kind: HeadKind) -> None:
    module, network = head(tmp_path, kind)
    given = [float(logits(network, module, a, b)) for a, b in zip(FIRST, SECOND, strict=True)]
    rows = [f"{a}\t{b}\t{g:.6f}" for a, b, g in zip(FIRST, SECOND, given, strict=True)]
    assert figure(network, save_lines(tmp_path / "t.tsv", rows)) == ("Spearman × 100", pytest.approx(100, abs=0.1))
    scores = [(i * 7 % 11) / 2 for i in range(30)]
    rows = [f"{a}\t{b}\t{s}" for a, b, s in zip(FIRST, SECOND, scores, strict=True)]
    wanted = 100 * spearmanr(given, scores).statistic
    assert figure(network, save_lines(tmp_path / "t.tsv", rows))[1] == pytest.approx(wanted, abs=0.5)


@pytest.mark.parametrize("spelling", [("0", "1"), ("0.0", "1.0"), ("False", "True")])
def test_yes_or_no_for_a_pair(tmp_path: Path, spelling: tuple[str, str]) -> None:
    module, network = head(tmp_path, "binary")
    given = [float(logits(network, module, a, b)) > 0 for a, b in zip(FIRST, SECOND, strict=True)]
    given = [g != (i % 3 == 0) for i, g in enumerate(given)]
    rows = [f"{a}\t{b}\t{spelling[g]}" for a, b, g in zip(FIRST, SECOND, given, strict=True)]
    assert figure(network, save_lines(tmp_path / "t.tsv", rows)) == ("accuracy", pytest.approx(100 * 20 / 30))


def test_a_score_for_a_text(tmp_path: Path) -> None:
    _, network = head(tmp_path, "regression")
    with torch.inference_mode():
        given = [float(network.forward(network.preprocessing([t]))["logits"]) for t in FIRST]
    rows = [f"{t}\t{g:.6f}" for t, g in zip(FIRST, given, strict=True)]
    assert figure(network, save_lines(tmp_path / "t.tsv", rows)) == ("Spearman × 100", pytest.approx(100, abs=0.1))


def test_heads_that_a_label_says_nothing_of(tmp_path: Path) -> None:
    save_pair_classifier(tmp_path / "m")
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    path = save_lines(tmp_path / "t.tsv", ["w1\t0", "w2\t1"])
    assert "3 answers for each text" in refusal(replace(network, head="binary"), path)
    assert "3 answers for each text" in refusal(replace(network, head="regression"), path)
    wrong = save_lines(tmp_path / "u.tsv", ["w1\tw2\tgood", "w2\tw1\t0"])
    assert re.search(r"'good' .*0 to 2", refusal(network, wrong))
    assert "four" not in refusal(network, save_lines(tmp_path / "v.csv", ["a,b,c,d"]), "a+b+c,d")


# Calibration


def rows_of(calibration: Calibration, name: str) -> set[tuple[int, ...]]:
    batches = [*calibration.batches, *calibration.held_out]
    masks = [batch["attention_mask"].bool() for batch in batches]
    return {
        tuple(r[m].tolist()) for b, mask in zip(batches, masks, strict=True) for r, m in zip(b[name], mask, strict=True)
    }


@pytest.mark.parametrize("kind", ["bert", "roberta"])
def test_calibration_on_pairs(tmp_path: Path, kind: str) -> None:
    save_pair_classifier(tmp_path / "m", kind)
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    path = save_lines(tmp_path / "t.csv", ["a,b,c", *(f"{a},{b},x" for a, b in zip(FIRST, SECOND, strict=True))])
    calibration = load_calibration(network, path, column="a+b")
    encoded = network.preprocessing.tokenizer(FIRST, SECOND)
    for name in network.inputs:
        assert rows_of(calibration, name) == {tuple(row) for row in encoded[name]}
    assert calibration.samples + sum(len(b["input_ids"]) for b in calibration.held_out) == 30


def test_two_pairs_add_up_and_texts_stay_texts(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_pair_classifier(tmp_path / "m")
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    path = save_lines(tmp_path / "t.csv", ["a,b", *(f"{a},{b}" for a, b in zip(FIRST, SECOND, strict=True))])
    both = load_calibration(network, path, column="a+b,b+a")
    assert both.samples + sum(len(b["input_ids"]) for b in both.held_out) == 60
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        single = load_calibration(network, path, column="a,b")
    assert rows_of(single, "input_ids") == {
        tuple(row) for row in network.preprocessing.tokenizer(FIRST + SECOND)["input_ids"]
    }
    assert re.search(r"one input.*a\+b", caplog.text)


@pytest.mark.parametrize(
    ("column", "expected"), [("a+b,c", "not both"), ("a+b+c", "two columns"), ("a+d", "no column 'd'")]
)
def test_columns_that_are_no_pairs(tmp_path: Path, column: str, expected: str) -> None:
    save_pair_classifier(tmp_path / "m")
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    with pytest.raises(UserError, match=expected):
        load_calibration(network, save_lines(tmp_path / "t.csv", ["a,b,c", "1,2,3", "4,5,6"]), column=column)


def test_labelled_pairs(tmp_path: Path) -> None:
    module = save_pair_classifier(tmp_path / "m")
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    # The second text says which class it is.
    rows = [f"{a},w{i % 3},{i % 3}.0" for i, a in enumerate(FIRST)]
    path = save_lines(tmp_path / "t.csv", ["a,b,label", *rows, " , ,9"])
    calibration = load_calibration(network, path, column="a+b", labels="label")
    assert calibration.labels is not None
    for batch, labels in zip(calibration.batches, calibration.labels, strict=True):
        lengths = batch["attention_mask"].sum(1)
        second = [int(ids[n - 2]) - 4 for ids, n in zip(batch["input_ids"], lengths, strict=True)]
        assert second == labels.tolist()
    assert module is not None


def test_a_run_on_pairs(tmp_path: Path) -> None:
    save_pair_classifier(tmp_path / "m")
    rows = [f"{a}\t{b}\t{i % 3}" for i, (a, b) in enumerate(zip(FIRST, SECOND, strict=True))]
    path = save_lines(tmp_path / "t.tsv", rows)
    recipe = optin_deploy.Recipe(
        model=str(tmp_path / "m"), flops=0.7, align=8, sequence_length=8, calibration=path, calibration_column="1+2",
        evaluate=path, runtimes=("ort-cpu",), batch_sizes=(1,), profile_seconds=0.1, threads=1,
    )  # fmt: skip
    result = optin_deploy.prune_export(recipe, output=tmp_path / "run", quiet=True)
    small = load_network(str(tmp_path / "run" / "checkpoint"))
    wanted = sum(
        int(small.forward(small.preprocessing([(a, b)]))["logits"].argmax()) == i % 3
        for i, (a, b) in enumerate(zip(FIRST, SECOND, strict=True))
    )
    assert result.report.evaluation is not None
    assert result.report.evaluation.pruned == pytest.approx(100 * wanted / 30)


# What labels are called


def test_labels_as_floats_and_names_of_a_data_set(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    names = {0: "contradiction", 1: "entailment", 2: "neutral"}
    module = save_pair_classifier(tmp_path / "m", id2label=names, label2id={n: i for i, n in names.items()})
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    wanted = [int(logits(network, module, a, b).argmax()) for a, b in zip(FIRST, SECOND, strict=True)]
    path = save_lines(tmp_path / "t.tsv", [f"{a}\t{b}\t{w}.0" for a, b, w in zip(FIRST, SECOND, wanted, strict=True)])
    assert figure(network, path) == ("accuracy", 100)
    # The data set numbers its classes otherwise than the network: names say which is which.
    for order, agrees in ((["Entailment", "neutral", "contradiction"], True), (["no", "yes", "maybe"], False)):
        own = {n.casefold(): i for i, n in enumerate(order)}
        numbers = [own[names[w]] if agrees else w for w in wanted]
        features = {"label": {"names": order, "_type": "ClassLabel"}}
        table = pyarrow.table({"a": FIRST, "b": SECOND, "label": numbers}).replace_schema_metadata(
            {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
        )
        parquet.write_table(table, tmp_path / "t.parquet")
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert figure(network, tmp_path / "t.parquet") == ("accuracy", 100)
        assert ("they are matched by number" in caplog.text) is not agrees


def test_encoders_take_no_pairs_for_accuracy(tmp_path: Path) -> None:
    save_encoder(tmp_path / "m")
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    assert "no class logits" in refusal(network, save_lines(tmp_path / "t.tsv", ["w1\t0", "w2\t1"]))


def test_numbers_of_rows_are_no_texts(tmp_path: Path) -> None:
    module = save_pair_classifier(tmp_path / "m")
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    with torch.inference_mode():
        wanted = [int(module(**network.preprocessing.tokenizer(t, return_tensors="pt")).logits.argmax()) for t in FIRST]
    rows = [{"idx": i, "sentence": t, "label": w} for i, (t, w) in enumerate(zip(FIRST, wanted, strict=True))]
    path = save_lines(tmp_path / "t.jsonl", [json.dumps(row) for row in rows])
    assert re.search(r"column 1 .*numbers", refusal(network, path))
    assert figure(network, path, "sentence,label") == ("accuracy", 100)


def test_pairs_to_evaluate_and_single_texts_to_calibrate_on_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_pair_classifier(tmp_path / "m")
    path = save_lines(tmp_path / "t.tsv", [f"{a}\t{b}\t0" for a, b in zip(FIRST, SECOND, strict=True)])
    for column, told in (("1", True), ("1+2", False)):
        recipe = optin_deploy.Recipe(
            model=str(tmp_path / "m"), flops=0.7, sequence_length=8, evaluate=path,
            calibration=path, calibration_column=column, runtimes=("ort-cpu",), threads=1,
        )  # fmt: skip
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            prepare(recipe)
        assert ("--calibration-column" in caplog.text) is told
