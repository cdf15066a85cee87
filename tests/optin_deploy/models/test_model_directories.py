"""Directories of every kind given as a model: what is loaded, and what is said of the others."""

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import save_bert

from optin_deploy.errors import UserError
from optin_deploy.models import pickles
from optin_deploy.models.load import load_network

pytestmark = pytest.mark.slow


POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"


@pytest.fixture
def bert(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory named ``bert`` in the working directory."""
    monkeypatch.chdir(tmp_path)
    save_bert(Path("bert"))
    return Path("bert")


def refusal(model: Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        load_network(str(model), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def state_of(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "model.safetensors")


def run(told: str) -> None:
    """The command at the end of a message."""
    command = told[told.index("python -c ") :].replace("python", shlex.quote(sys.executable), 1)
    env = {**os.environ, "PYTHONPATH": str(Path(pickles.__file__).parents[2])}
    done = subprocess.run(command, shell=True, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def split(directory: Path, file: Callable[[int], str], index: str) -> list[Path]:
    state = state_of(directory)
    names = sorted(state)
    files = [directory / file(i) for i in (1, 2)]
    for path, part in zip(files, (names[:9], names[9:]), strict=True):
        save_file({name: state[name] for name in part}, path, {"format": "pt"})
    where = {name: files[i >= 9].name for i, name in enumerate(names)}
    (directory / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": where}))
    (directory / "model.safetensors").unlink()
    return files


# Weights


@pytest.mark.parametrize("variant", ["fp16", "ema"])
def test_a_variant_is_loaded_where_it_is_the_only_one(variant: str, bert: Path) -> None:
    state = {name: t.half() for name, t in state_of(bert).items()}
    (bert / "model.safetensors").unlink()
    save_file(state, bert / f"model.{variant}.safetensors", {"format": "pt"})
    own = load_network(str(bert)).module.state_dict()
    assert all(torch.equal(own[name], t.float()) for name, t in state.items())
    save_file(state, bert / "model.bf16.safetensors", {"format": "pt"})
    choices = f"choose --weights bert/model.bf16.safetensors or --weights bert/model.{variant}.safetensors"
    assert choices in refusal(bert)
    load_network(str(bert), weights=f"bert/model.{variant}.safetensors")


def test_several_files_of_a_variant(bert: Path) -> None:
    state = state_of(bert)
    split(bert, lambda i: f"model.fp16-0000{i}-of-00002.safetensors", "model.safetensors.index.fp16.json")
    own = load_network(str(bert)).module.state_dict()
    assert all(torch.equal(own[name], t) for name, t in state.items())


def test_a_file_of_several_that_is_missing(bert: Path) -> None:
    files = split(bert, lambda i: f"model-0000{i}-of-00002.safetensors", "model.safetensors.index.json")
    load_network(str(bert))
    files[1].write_text(POINTER)
    assert re.search(r"model-00002-of-00002\.safetensors .*git-lfs", refusal(bert))
    files[1].unlink()
    assert "names model-00002-of-00002.safetensors, which does not exist (1 of 2 files" in refusal(bert)
    (bert / "model.safetensors.index.json").unlink()
    assert "without the index model.safetensors.index.json" in refusal(bert)


def test_a_pickle_alone_is_converted_by_what_is_printed(bert: Path) -> None:
    state = state_of(bert)
    (bert / "model.safetensors").unlink()
    torch.save(state, bert / "pytorch_model.bin")
    torch.save({}, bert / "training_args.bin")
    told = refusal(bert)
    assert re.search(r"bert .*pytorch_model\.bin", told)
    run(told)
    own = load_network(str(bert)).module.state_dict()
    assert all(torch.equal(own[name], t) for name, t in state.items())


def test_several_pickles_are_converted_by_what_is_printed(bert: Path) -> None:
    state = state_of(bert)
    (bert / "model.safetensors").unlink()
    names = sorted(state)
    for i, part in enumerate((names[:9], names[9:])):
        torch.save({name: state[name] for name in part}, bert / f"pytorch_model-0000{i}-of-00002.bin")
    where = {name: f"pytorch_model-0000{int(i >= 9)}-of-00002.bin" for i, name in enumerate(names)}
    (bert / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    run(refusal(bert))
    own = load_network(str(bert)).module.state_dict()
    assert all(torch.equal(own[name], t) for name, t in state.items())


def test_weights_by_another_name(bert: Path) -> None:
    (bert / "model.safetensors").rename(bert / "mine.safetensors")
    assert re.search(r"mine\.safetensors.*--weights bert/mine\.safetensors", refusal(bert))
    load_network(str(bert), weights="bert/mine.safetensors")


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
def test_pointers(name: str, bert: Path) -> None:
    (bert / name).write_text(POINTER)
    assert re.search(rf"bert/{name} .*git lfs pull", refusal(bert))


def test_pointers_to_what_is_not_needed(bert: Path) -> None:
    (bert / "pytorch_model.bin").write_text(POINTER)
    load_network(str(bert))
    (bert / "model.safetensors").write_text(POINTER)
    load_network(str(bert), weights="random")
    (bert / "model.safetensors").unlink()
    assert re.search(r"pytorch_model\.bin .*git-lfs", refusal(bert))


def test_weights_of_more_layers_are_not_dropped(bert: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = bert / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"num_hidden_layers": 1}))
    assert re.search(r"weights .*bert\.encoder\.layer\.1\.", refusal(bert))
    path.write_text(json.dumps(config | {"architectures": None, "num_hidden_layers": 1}))
    assert re.search(r"weights .*bert\.encoder\.layer\.1\.", refusal(bert))
    path.write_text(json.dumps(config | {"architectures": None}))
    assert load_network(str(bert)).source.name == "BertModel"
    assert "the weights of classifier.bias (1 more)" in caplog.text


# What is no network


def _file(name: str, content: str = "{}") -> Callable[[Path], object]:
    def make(directory: Path) -> None:
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_text(content)

    return make


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda _: None, "is an empty directory, without config.json"),
        (_file("model_index.json"), "a pipeline of diffusers"),
        (_file("config.json", '{"_class_name": "UNet2DConditionModel"}'), "holds a UNet2DConditionModel of diffusers"),
        (_file("model.onnx"), "an exported ONNX graph"),
        (_file("x.gguf"), "quantized weights for llama.cpp"),
        (_file("yolo.pt"), "holds yolo.pt and no config.json.* --weights .*yolo.pt"),
        (_file("model.safetensors"), "holds model.safetensors and no config.json"),
        (_file("checkpoint-500/config.json"), "has no config.json, .*checkpoint-500 has: give that"),
        (_file("open_clip_config.json"), "a network of open_clip"),
    ],
)
def test_directories_of_others(make: Callable[[Path], object], told: str, tmp_path: Path) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=told):
        load_network(str(tmp_path))


@pytest.mark.parametrize(
    ("name", "told"),
    [("x.onnx", "an exported ONNX graph"), ("x.gguf", "quantized weights"), ("x.pt", "is a file: name")],
)
def test_files_given_as_a_model(name: str, told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformers.utils.hub, "is_offline_mode", lambda: True)
    (tmp_path / name).write_bytes(b"x")
    assert told in refusal(tmp_path / name)


# Adapters


def _adapted(task: str | None, labels: int) -> Any:
    torch.manual_seed(1)
    config = peft.LoraConfig(task_type=task, r=2, target_modules=["query"], modules_to_save=["classifier"])
    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        "bert", num_labels=labels, ignore_mismatched_sizes=True
    )
    adapted = peft.get_peft_model(base, config)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.3)
    return adapted.eval()


def test_an_adapter_is_merged_by_what_is_printed(bert: Path) -> None:
    adapted = _adapted("SEQ_CLS", 5)
    adapted.save_pretrained("adapter")
    told = refusal(Path("adapter"))
    assert re.search(r"adapter .*LORA.*bert.*adapter-merged: python -c ", told)
    run(told)
    network = load_network("adapter-merged", sequence_length=8)
    with torch.no_grad():
        expected = adapted(**network.inputs).logits
    torch.testing.assert_close(network.forward(network.inputs)["logits"], expected, rtol=1e-5, atol=1e-5)


def test_tokens_that_cannot_be_merged(tmp_path: Path) -> None:
    told = {"peft_type": "PROMPT_TUNING", "base_model_name_or_path": "bert", "task_type": "SEQ_CLS"}
    (tmp_path / "adapter_config.json").write_text(json.dumps(told))
    assert re.search(r"adds tokens.*bert", refusal(tmp_path))
