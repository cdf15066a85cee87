"""How long texts are, apart from the length that is measured."""

import json
import logging
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import transformers
from text_models import SIZES, add_modules, save_encoder, save_pair_classifier, save_pair_tokenizer
from tiny_models import WORDS, save_lines, texts

import optin_deploy
from optin_deploy.data.calibration import load_calibration
from optin_deploy.errors import UserError
from optin_deploy.evaluation.load import load_dataset
from optin_deploy.models import checkpoint
from optin_deploy.models.load import load_network
from optin_deploy.structure.plan import Plan

LONG = [" ".join(WORDS[(i * 7 + j * j) % 40] for j in range(24)) for i in range(30)]


def test_evaluation_reads_texts_to_their_end(tmp_path: Path) -> None:
    module = save_pair_classifier(tmp_path / "m")
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    tokenizer = network.preprocessing.tokenizer
    with torch.inference_mode():
        wanted = [int(module(**tokenizer(t, return_tensors="pt")).logits.argmax()) for t in LONG]
        cut = [
            int(module(**tokenizer(t, truncation=True, max_length=8, return_tensors="pt")).logits.argmax())
            for t in LONG
        ]
    assert wanted != cut
    path = save_lines(tmp_path / "t.tsv", [f"{t}\t{w}" for t, w in zip(LONG, wanted, strict=True)])
    assert load_dataset(network, path).measure(network.module) == 100
    # The sample is as long as asked for, and ends as a text does.
    assert network.inputs["input_ids"].shape == (2, 8)
    assert network.inputs["input_ids"][:, -1].tolist() == [3, 3]
    checkpoint.save(network, Plan({}), tmp_path / "saved")
    again = load_network(str(tmp_path / "saved"))
    assert load_dataset(again, path).measure(again.module) == 100
    assert again.inputs["input_ids"].shape == (2, 8)


def test_calibration_takes_whole_texts_and_short_ones_are_as_before(tmp_path: Path) -> None:
    save_encoder(tmp_path / "m")
    found = [load_network(str(tmp_path / "m"), sequence_length=n) for n in (8, 32)]
    for lines in (LONG, texts(40)):
        path = save_lines(tmp_path / "t.txt", lines)
        one, other = (load_calibration(network, path, samples=20) for network in found)
        assert one.digest == other.digest
    assert max(b["input_ids"].shape[1] for b in load_calibration(found[0], save_lines(path, LONG)).batches) == 26


def test_what_is_cut_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_pair_classifier(tmp_path / "m")
    network = load_network(str(tmp_path / "m"), max_text_length=12)
    lines = save_lines(tmp_path / "t.txt", [*LONG[:7], *texts(20)])
    with caplog.at_level(logging.WARNING):
        calibration = load_calibration(network, lines)
    assert caplog.messages == [f"{lines}: 7 of 27 texts are longer than 12 tokens and are truncated"]
    assert max(b["input_ids"].shape[1] for b in calibration.batches) == 12
    caplog.clear()
    rows = save_lines(tmp_path / "t.tsv", [*(f"w1\t{t}\t0" for t in LONG[:3]), *(f"{t}\tw2\t0" for t in texts(5)[:4])])
    with caplog.at_level(logging.WARNING):
        load_dataset(network, rows)
    assert caplog.messages == [f"{rows}: 3 of 7 texts are longer than 12 tokens and are truncated"]
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        load_calibration(load_network(str(tmp_path / "m")), lines)
    assert not caplog.messages


@pytest.mark.parametrize("kind", ["bert", "roberta", "mpnet", "distilbert"])
def test_positions_are_the_limit_where_the_tokenizer_has_none(tmp_path: Path, kind: str) -> None:
    save_encoder(
        tmp_path / "m", kind, limit=int(1e30), positions=20, **({} if kind != "mpnet" else {"pad_token_id": 1})
    )
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    # RoBERTa's first position is behind that of padding, token 0; MPNet's padding is always 1.
    assert network.preprocessing.max_length == {"roberta": 19, "mpnet": 18}.get(kind, 20)
    batch = network.preprocessing([LONG[0] + " " + LONG[1]])
    with torch.inference_mode():
        assert network.forward(batch)["last_hidden_state"].shape[1] == network.preprocessing.max_length


def save_t5(path: Path, limit: int) -> None:
    config = transformers.T5Config(
        vocab_size=SIZES["vocab_size"], d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, decoder_start_token_id=0
    )
    torch.manual_seed(0)
    transformers.T5EncoderModel(config).eval().save_pretrained(path)
    save_pair_tokenizer(path, token_types=False, limit=limit)


@pytest.mark.slow
def test_no_limit_at_all_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_t5(tmp_path / "m", int(1e30))
    with caplog.at_level(logging.WARNING):
        network = load_network(str(tmp_path / "m"), sequence_length=16)
    assert "--max-text-length" in caplog.text
    assert "512 tokens" in caplog.text
    assert network.preprocessing.max_length == 512
    caplog.clear()
    assert load_network(str(tmp_path / "m"), max_text_length=700).preprocessing.max_length == 700
    # The sample text is as long as is asked for.
    assert load_network(str(tmp_path / "m"), sequence_length=2000).inputs["input_ids"].shape == (2, 2000)
    assert "--max-text-length" in caplog.text


def test_t5_of_sentence_transformers(tmp_path: Path) -> None:
    save_t5(tmp_path / "m", 64)
    text = json.loads((tmp_path / "m" / "config.json").read_text())
    (tmp_path / "m" / "config.json").write_text(json.dumps({**text, "architectures": ["T5ForConditionalGeneration"]}))
    add_modules(tmp_path / "m", {"pooling_mode_mean_tokens": True}, config={"max_seq_length": 40})
    network = load_network(str(tmp_path / "m"), sequence_length=16)
    assert network.source.name == "T5EncoderModel"
    assert network.preprocessing.max_length == 40


@pytest.mark.parametrize(("given", "limit"), [(256, 32), (9, 9)])
def test_sentence_transformers_own_length_and_positions(tmp_path: Path, given: int, limit: int) -> None:
    save_encoder(tmp_path / "m", positions=32, limit=16)
    add_modules(tmp_path / "m", {"pooling_mode_mean_tokens": True}, config={"max_seq_length": given})
    assert load_network(str(tmp_path / "m")).preprocessing.max_length == limit


def test_refusals(tmp_path: Path) -> None:
    save_encoder(tmp_path / "m")
    with pytest.raises(UserError, match=r"--max-text-length 40: .* 32 tokens"):
        load_network(str(tmp_path / "m"), max_text_length=40)
    checkpoint.save(load_network(str(tmp_path / "m"), max_text_length=10), Plan({}), tmp_path / "saved")
    assert load_network(str(tmp_path / "saved")).preprocessing.max_length == 10
    assert load_network(str(tmp_path / "saved"), max_text_length=32).preprocessing.max_length == 32
    with pytest.raises(UserError, match=r"--max-text-length 40: .*BertModel.* 32 tokens"):
        load_network(str(tmp_path / "saved"), max_text_length=40)
    with pytest.raises(UserError, match=r"--max-text-length 40: .*no texts"):
        load_network("test_vit", weights="random", image_size=32, max_text_length=40)


def test_checkpoints_of_before_load(tmp_path: Path) -> None:
    save_encoder(tmp_path / "m")
    network = load_network(str(tmp_path / "m"), max_text_length=10)
    checkpoint.save(network, Plan({}), tmp_path / "saved")
    path = tmp_path / "saved" / "optin.json"
    told = json.loads(path.read_text())
    del told["sentences"], told["text"]["prompt"], told["text"]["lower_case"]
    path.write_text(json.dumps(told))
    again = load_network(str(tmp_path / "saved"))
    assert (again.sentences, again.preprocessing.max_length, again.preprocessing.prompt) == (None, 10, "")


def test_long_texts_come_in_smaller_batches(tmp_path: Path) -> None:
    save_encoder(tmp_path / "m", positions=600, limit=600)
    network = load_network(str(tmp_path / "m"), sequence_length=8)
    lines = [" ".join([LONG[i % 30], *(WORDS[(i + j) % 40] for j in range(20 * i))]) for i in range(28)]
    path = save_lines(tmp_path / "t.txt", lines)
    calibration = load_calibration(network, path, samples=24)
    sizes = [tuple(b["input_ids"].shape) for b in calibration.batches]
    assert sum(rows for rows, _ in sizes) == 24
    assert all(rows * length <= 4096 or rows == 1 for rows, length in sizes)
    assert max(length for _, length in sizes) > 512
    rows = save_lines(tmp_path / "t.tsv", [f"{a}\t{b}\t{i % 3}" for i, (a, b) in enumerate(pairwise(lines))])
    dataset = load_dataset(network, rows)
    dataset.measure(network.module)


@pytest.mark.slow
def test_a_run_on_long_texts(tmp_path: Path) -> None:
    save_pair_classifier(tmp_path / "m")
    rows = [f"{t}\t{i % 3}" for i, t in enumerate(LONG)]
    path = save_lines(tmp_path / "t.tsv", rows)
    recipe = optin_deploy.Recipe(
        model=str(tmp_path / "m"), flops=0.7, align=8, sequence_length=8, calibration=path, calibration_column="1",
        evaluate=path, max_text_length=20, runtimes=("ort-cpu",), batch_sizes=(1,), profile_seconds=0.1, threads=1,
    )  # fmt: skip
    result = optin_deploy.prune_export(recipe, output=tmp_path / "run", quiet=True)
    assert result.report.model.inputs["input_ids"] == ["batch", "sequence"]
    assert load_network(str(tmp_path / "run" / "checkpoint")).preprocessing.max_length == 20
