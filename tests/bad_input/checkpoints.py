"""Directories given as --model that are checkpoints of ours."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from bad_input.common import LONG, Material, Row, endless, pipe, pruning, save_pickle

DESCRIPTION, WEIGHTS = "optin.json", "model.safetensors"
Json = dict[str, Any]


def _described(change: Callable[[Json], object], model: str = "shallow") -> Callable[[Material], Sequence[str]]:
    def make(material: Material) -> Sequence[str]:
        material.copy(model)
        path = Path(model, DESCRIPTION)
        data = json.loads(path.read_text(encoding="utf-8"))
        change(data)
        path.write_text(json.dumps(data), encoding="utf-8")
        return pruning(model)

    return make


def _put(*place: str, value: Any) -> Callable[[Json], object]:
    def change(data: Json) -> None:
        for name in place[:-1]:
            data = data[name]
        data[place[-1]] = value

    return change


def _file(
    name: str, content: Callable[[bytes], bytes | None], model: str = "shallow"
) -> Callable[[Material], Sequence[str]]:
    """With another content in one of its files, or without that file."""

    def make(material: Material) -> Sequence[str]:
        material.copy(model)
        path = Path(model, name)
        changed = content(path.read_bytes())
        path.unlink() if changed is None else path.write_bytes(changed)
        return pruning(model)

    return make


def _at(name: str, make: Callable[[Path], object]) -> Callable[[Material], Sequence[str]]:
    def made(material: Material) -> Sequence[str]:
        material.copy("shallow")
        make(Path("shallow", name))
        return pruning("shallow")

    return made


def _weights(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Material], Sequence[str]]:
    def make(material: Material) -> Sequence[str]:
        material.copy("shallow")
        state = load_file(Path("shallow", WEIGHTS))
        change(state)
        save_file(state, Path("shallow", WEIGHTS))
        return pruning("shallow")

    return make


def _pickle_in_arguments(material: Material) -> Sequence[str]:
    save_pickle(Path("evil.pth"))
    return _described(_put("source", "arguments", "checkpoint_path", value="evil.pth"))(material)


def _swapped(material: Material) -> Sequence[str]:
    material.copy("shallow")
    state = load_file(material.folder / "bert" / WEIGHTS)
    save_file(state, Path("shallow", WEIGHTS))
    return pruning("shallow")


NEURONS = "blocks.0.mlp"
DAMAGED = r"shallow/optin\.json is damaged or of another version: "
ROWS = (
    Row("checkpoint-truncated", _file(DESCRIPTION, lambda whole: whole[: len(whole) // 2]), DAMAGED),
    Row("checkpoint-empty", _file(DESCRIPTION, lambda _: b""), DAMAGED),
    Row("checkpoint-list", _file(DESCRIPTION, lambda _: b"[]"), DAMAGED),
    Row("checkpoint-nested", _file(DESCRIPTION, lambda _: b"[" * 100_000), DAMAGED),
    Row("checkpoint-not-utf8", _file(DESCRIPTION, lambda whole: whole[:-1] + b"\xff}"), r"optin\.json"),
    Row("checkpoint-unknown-key", _described(_put("kepd", value={})), DAMAGED + "kepd"),
    Row("checkpoint-other-format", _described(_put("format", value=2)), DAMAGED + "format"),
    Row("checkpoint-other-library", _described(_put("source", "library", value="pickle")), DAMAGED + "source.library"),
    Row("checkpoint-units-out-of-range", _described(_put("kept", NEURONS, value=[0, 1 << 20])), NEURONS),
    Row("checkpoint-units-twice", _described(_put("kept", NEURONS, value=[0, 0, 1])), NEURONS),
    Row("checkpoint-units-negative", _described(_put("kept", NEURONS, value=[-1, 0])), NEURONS),
    Row("checkpoint-units-no-integers", _described(_put("kept", NEURONS, value=[0.5])), DAMAGED + "kept"),
    Row("checkpoint-unknown-group", _described(_put("kept", "blocks.9.mlp", value=[0])), r"blocks\.9\.mlp"),
    Row("checkpoint-fewer-units-than-weights", _described(_put("kept", NEURONS, value=[0, 1])), WEIGHTS),
    Row("checkpoint-tokens", _described(_put("tokens", value=[3, 99])), "shallow"),
    Row("checkpoint-huge-input", _described(_put("inputs", "x", "shape", value=[1 << 20] * 4)), DAMAGED + "inputs"),
    Row("checkpoint-negative-input", _described(_put("inputs", "x", "shape", value=[2, -3])), DAMAGED + "inputs"),
    Row("checkpoint-input-without-axes", _described(_put("inputs", "x", "shape", value=[])), DAMAGED + "inputs"),
    Row("checkpoint-other-input", _described(_put("inputs", "x", "shape", value=[2, 1, 8, 8])), "shallow"),
    Row("checkpoint-no-inputs", _described(_put("inputs", value={})), DAMAGED),
    Row("checkpoint-other-outputs", _described(_put("outputs", value={"logits": "no such"})), "no such"),
    Row("checkpoint-other-logits", _described(_put("logits", value="no such")), "no such"),
    Row("checkpoint-other-head", _described(_put("head", value="softmax")), DAMAGED + "head"),
    Row("checkpoint-picture-size", _described(_put("image", "size", value=[-1, 1 << 30])), DAMAGED + r"image\.size"),
    Row("checkpoint-picture-std", _described(_put("image", "std", value=[0, 0, 0])), DAMAGED + r"image\.std"),
    Row("checkpoint-path-as-name", _described(_put("source", "name", value="../../etc/passwd")), r"\.\./\.\./etc"),
    Row("checkpoint-hub-as-name", _described(_put("source", "name", value="hf-hub:a/b")), "hf-hub:a/b"),
    Row("checkpoint-pickle-in-arguments", _pickle_in_arguments, "checkpoint_path", runs_code=True),
    Row("checkpoint-argument-type", _described(_put("source", "arguments", "depth", value="many")), "test_vit"),
    Row("checkpoint-argument-zero", _described(_put("source", "arguments", "num_heads", value=0)), "test_vit"),
    Row("checkpoint-argument-huge", _described(_put("source", "arguments", "img_size", value=1 << 24)), "test_vit"),
    Row("checkpoint-pipe", _at(DESCRIPTION, pipe), r"shallow/optin\.json .*no regular file"),
    Row("checkpoint-weights-pipe", _at(WEIGHTS, pipe), r"shallow/model\.safetensors .*no regular file"),
    Row("checkpoint-weights-endless", _at(WEIGHTS, endless), r"shallow/model\.safetensors .*no regular file"),
    Row("model-long-name", lambda _: pruning(LONG), LONG + ".*too long"),
    Row("checkpoint-no-weights", _file(WEIGHTS, lambda _: None), r"shallow/model\.safetensors is damaged"),
    Row(
        "checkpoint-weights-truncated",
        _file(WEIGHTS, lambda whole: whole[:-9]),
        r"shallow/model\.safetensors is damaged",
    ),
    Row("checkpoint-weights-of-another", _swapped, r"shallow/model\.safetensors .*damaged"),
    Row("checkpoint-weights-nan", _weights(lambda s: s["norm.weight"].fill_(float("nan"))), "NaN or infinity .*norm"),
    Row(
        "checkpoint-weights-integers",
        _weights(lambda s: s.update({"norm.weight": s["norm.weight"].long()})),
        r"norm\.weight .*int64",
    ),
    Row(
        "checkpoint-no-tokenizer",
        _file("tokenizer.json", lambda _: None, "small-bert"),
        "tokenizer of small-bert cannot be read|small-bert has no tokenizer",
    ),
    Row("checkpoint-tokenizer-cut", _file("tokenizer.json", lambda t: t[:99], "small-bert"), "tokenizer of small-bert"),
    Row(
        "checkpoint-fetched-attention",
        _described(_put("source", "arguments", "attn_implementation", value="evil/kernel"), "small-bert"),
        "evil/kernel",
    ),
    Row(
        "checkpoint-other-class",
        _described(_put("source", "name", value="os.system"), "small-bert"),
        r"no model class 'os\.system'",
    ),
    Row(
        "checkpoint-vocabulary",
        _described(_put("source", "arguments", "vocab_size", value=-5), "small-bert"),
        "small-bert",
    ),
)
