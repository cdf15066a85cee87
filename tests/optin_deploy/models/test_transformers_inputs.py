"""Local directories of transformers of every kind: what they take, what they give, and what is left out of them."""

import json
from pathlib import Path

import families
import pytest
import torch
from tiny_models import save_tokenizer
from torch import nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    ViTConfig,
    ViTForImageClassification,
)
from transformers.pytorch_utils import Conv1D

from optin_deploy.data.calibration import load_calibration
from optin_deploy.errors import UserError
from optin_deploy.models import checkpoint
from optin_deploy.models.load import load_network
from optin_deploy.models.transformers_inputs import end_of_text
from optin_deploy.models.transformers_models import with_linear_layers
from optin_deploy.network import Network
from optin_deploy.structure.plan import Plan


def saved(name: str, path: Path, *, tokenizer: bool = False) -> nn.Module:
    torch.manual_seed(0)
    module = families.FAMILIES[name]().eval()
    module.save_pretrained(path)
    if tokenizer:
        save_tokenizer(path)
    return module


def loaded(name: str, path: Path, *, tokenizer: bool = False) -> Network:
    saved(name, path, tokenizer=tokenizer)
    return load_network(str(path), sequence_length=6)


@pytest.mark.parametrize(
    ("name", "inputs", "outputs"),
    [
        ("clip", {"pixel_values": (2, 3, 16, 16), "input_ids": (2, 6), "attention_mask": (2, 6)}, "embeds"),
        ("clip_vision", {"pixel_values": (2, 3, 16, 16)}, "image_embeds"),
        ("siglip_vision", {"pixel_values": (2, 3, 16, 16)}, "last_hidden_state pooler_output"),
        ("whisper_encoder", {"input_features": (2, 8, 24)}, "logits"),
        ("detr", {"pixel_values": (2, 3, 224, 224)}, "logits pred_boxes"),
    ],
)
def test_inputs_and_outputs(name: str, inputs: dict[str, tuple[int, ...]], outputs: str, tmp_path: Path) -> None:
    network = loaded(name, tmp_path)
    assert {n: tuple(t.shape) for n, t in network.inputs.items()} == inputs
    if name == "clip":
        # The logits compare the samples of a batch with each other.
        assert set(network.outputs) == {"text_embeds", "image_embeds"}
    else:
        assert " ".join(network.outputs) == outputs


def test_an_encoder_decoder_is_calibrated_on_texts_that_it_repeats(tmp_path: Path) -> None:
    dense = saved("t5", tmp_path / "dense", tokenizer=True)
    network = load_network(str(tmp_path / "dense"), sequence_length=6)
    assert list(network.inputs) == ["input_ids", "attention_mask", "decoder_input_ids"]
    assert list(network.outputs) == ["logits"]
    assert network.dynamic_axes["decoder_input_ids"] == {0: "batch", 1: "decoder_sequence"}
    texts = tmp_path / "texts.txt"
    texts.write_text("".join(f"w{i} w{i + 1} w{i + 2}\n" for i in range(36)), encoding="utf-8")
    batch = load_calibration(network, texts, samples=4).batches[0]
    start = torch.full_like(batch["input_ids"][:, :1], dense.config.decoder_start_token_id)
    assert torch.equal(batch["decoder_input_ids"], torch.cat([start, batch["input_ids"][:, :-1]], dim=1))
    with torch.no_grad():
        expected = dense(**batch, use_cache=False).logits
    torch.testing.assert_close(network.forward(batch)["logits"], expected)
    checkpoint.save(network, Plan({}), tmp_path / "small")
    again = checkpoint.load_network(tmp_path / "small")
    assert again.preprocessing.decoder_start == dense.config.decoder_start_token_id
    assert torch.equal(again.forward(batch)["logits"], network.forward(batch)["logits"])


def test_transposed_layers_become_linear(tmp_path: Path) -> None:
    dense = saved("gpt2", tmp_path, tokenizer=True)
    network = load_network(str(tmp_path), sequence_length=6)
    assert not any(isinstance(m, Conv1D) for m in network.module.modules())
    with torch.no_grad():
        expected = dense(**network.inputs, use_cache=False).logits
    torch.testing.assert_close(network.forward(network.inputs)["logits"], expected)
    by_file = load_network(str(tmp_path), weights=str(tmp_path / "model.safetensors"), sequence_length=6)
    given = by_file.forward(network.inputs)["logits"]
    torch.testing.assert_close(given, expected)


def test_an_end_of_text_outside_the_vocabulary_is_left_out() -> None:
    ids = torch.zeros(1, 3, dtype=torch.long)
    for config, last in (({"eos_token_id": 2}, 0), ({"eos_token_id": 2, "vocab_size": 3}, 2), ({"vocab_size": 3}, 0)):
        assert end_of_text(ids, config).tolist() == [[0, 0, last]]
        assert end_of_text(ids, {"text_config": config}).tolist() == [[0, 0, last]]


def test_linear_layers_share_what_was_shared() -> None:
    config = GPT2Config(vocab_size=9, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=1)
    module = with_linear_layers(GPT2LMHeadModel(config))
    assert module.lm_head.weight is module.transformer.wte.weight
    attention = module.transformer.h[0].attn
    assert isinstance(attention.c_attn, nn.Linear)
    assert attention.c_attn.weight.shape == (24, 8)


def test_a_decoder_without_a_padding_token_is_calibrated_with_another(tmp_path: Path) -> None:
    saved("llama", tmp_path, tokenizer=True)
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        file = tmp_path / name
        if file.is_file():
            told = {k: v for k, v in json.loads(file.read_text(encoding="utf-8")).items() if k != "pad_token"}
            file.write_text(json.dumps(told), encoding="utf-8")
    network = load_network(str(tmp_path), sequence_length=6)
    mask = network.preprocessing(["w1", "w1 w2 w3"])["attention_mask"]
    # Padding stands behind the text.
    assert mask.tolist() == [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]]
    assert "past_key_values" not in network.outputs
    assert not network.module.config.use_cache


def save_decoder(path: Path, *, padding: str | None, end: bool = True, **changes: object) -> nn.Module:
    """A classifier that reads the last token of a text; its tokenizer pads with ``padding``."""
    torch.manual_seed(0)
    sizes = {"vocab_size": 44, "n_positions": 24, "n_embd": 32, "n_layer": 2, "n_head": 4, "num_labels": 3}
    module = GPT2ForSequenceClassification(GPT2Config(**sizes, bos_token_id=2, eos_token_id=3, **changes)).eval()
    for parameter in module.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(8)
    module.save_pretrained(path)
    save_tokenizer(path)
    file = path / "tokenizer_config.json"
    told = json.loads(file.read_text(encoding="utf-8")) | {"pad_token": padding, "eos_token": "[SEP]"}
    file.write_text(json.dumps({name: value for name, value in told.items() if value is not None}), encoding="utf-8")
    if not end:
        file = path / "tokenizer.json"
        file.write_text(json.dumps(json.loads(file.read_text(encoding="utf-8")) | {"post_processor": None}))
    return module


@pytest.mark.parametrize("end", [True, False])
@pytest.mark.parametrize(("padding", "config"), [(None, {}), ("[PAD]", {}), ("[PAD]", {"pad_token_id": 1})])
def test_the_classifier_of_a_decoder_finds_the_end_of_each_text(
    padding: str | None, config: dict[str, int], end: bool, tmp_path: Path
) -> None:
    dense = save_decoder(tmp_path / "dense", padding=padding, end=end, **config)
    network = load_network(str(tmp_path / "dense"), sequence_length=6)
    texts = ["w1", "w1 w2 w3 w4", "w5 w6"]
    tokenizer = network.preprocessing.tokenizer
    expected = []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        # Of one text, which has no padding, the last token is read where no padding token is known.
        dense.config.pad_token_id = None
        with torch.no_grad():
            expected.append(dense(input_ids=ids).logits)
    batch = network.preprocessing(texts)
    torch.testing.assert_close(network.forward(batch)["logits"], torch.cat(expected), rtol=1e-5, atol=1e-5)
    assert network.source.arguments["pad_token_id"] == tokenizer.pad_token_id
    checkpoint.save(network, Plan({}), tmp_path / "small")
    again = checkpoint.load_network(tmp_path / "small")
    torch.testing.assert_close(again.forward(again.preprocessing(texts))["logits"], torch.cat(expected))


@pytest.mark.parametrize("channels", [1, 4])
def test_pictures_of_other_channels_are_calibrated_on_ready_tensors(channels: int, tmp_path: Path) -> None:
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = ViTConfig(**sizes, intermediate_size=64, num_labels=3, num_channels=channels)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    network = load_network(str(tmp_path))
    assert network.inputs["pixel_values"].shape == (2, channels, 16, 16)
    with pytest.raises(UserError, match=rf"{channels} channels.*\(samples, {channels}, 16, 16\)"):
        load_calibration(network, None)


def test_sounds_are_calibrated_on_ready_tensors(tmp_path: Path) -> None:
    saved("whisper_encoder", tmp_path)
    network = load_network(str(tmp_path))
    with pytest.raises(UserError, match="--calibration"):
        load_calibration(network, None)
