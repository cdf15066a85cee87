"""Files given as --weights."""

import json
import struct
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny_models import vision_network
from torch import Tensor

from bad_input.common import LONG, Material, Row, endless, pipe, pruning, save_pickle

FILE = Path("w.safetensors")
COMMAND = pruning("test_vit", "--image-size", "32", "--weights", str(FILE))
State = dict[str, Tensor]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 3\n"


def _good() -> State:
    return {name: tensor.clone() for name, tensor in vision_network().module.state_dict().items()}


def _bytes(content: Callable[[bytes], bytes]) -> Callable[[Material], Sequence[str]]:
    def make(_: Material) -> Sequence[str]:
        save_file(_good(), FILE)
        FILE.write_bytes(content(FILE.read_bytes()))
        return COMMAND

    return make


def _tensors(change: Callable[[State], object]) -> Callable[[Material], Sequence[str]]:
    def make(_: Material) -> Sequence[str]:
        state = _good()
        change(state)
        save_file(state, FILE)
        return COMMAND

    return make


def _filled(name: str, value: float) -> Callable[[State], object]:
    return lambda state: state[name].view(-1)[0].fill_(value)


def _headed(header: object, body: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def _pickle(_: Material) -> Sequence[str]:
    save_pickle(FILE)
    return COMMAND


def _pickle_by_name(_: Material) -> Sequence[str]:
    save_pickle(Path("w.pth"))
    return [*COMMAND[:-1], "w.pth"]


def _larger(_: Material) -> Sequence[str]:
    save_file(_good(), FILE)
    return pruning("test_vit", "--image-size", "64", "--weights", str(FILE))


def _directory(_: Material) -> Sequence[str]:
    FILE.mkdir()
    return COMMAND


def _loop(_: Material) -> Sequence[str]:
    FILE.symlink_to(FILE)
    return COMMAND


def _at(make: Callable[[Path], object]) -> Callable[[Material], Sequence[str]]:
    def made(_: Material) -> Sequence[str]:
        make(FILE)
        return COMMAND

    return made


def _part(name: str) -> Callable[[Material], Sequence[str]]:
    def make(_: Material) -> Sequence[str]:
        save_file(_good(), FILE)
        return [*COMMAND[:-1], f"{FILE}#{name}"]

    return make


def _backbone(state: State) -> None:
    named = {f"backbone.{name}": tensor for name, tensor in state.items() if not name.startswith("head.")}
    state.clear()
    state.update(named | {"fc.weight": torch.ones(3, 64)})


def _index(_: Material) -> Sequence[str]:
    index = Path("w.safetensors.index.json")
    index.write_text(json.dumps({"weight_map": {"head.bias": "w-00001.safetensors"}}), encoding="utf-8")
    return [*COMMAND[:-1], str(index)]


def _of_bert(material: Material) -> Sequence[str]:
    save_file(load_file(material.folder / "bert" / "model.safetensors"), FILE)
    return COMMAND


def _zeroed(material: Material) -> Sequence[str]:
    """Layers that give the same for everything, so that their outputs have no variance; and in the output directory
    what a run leaves that is killed in its first moment."""
    material.copy("shallow")
    Path("out").mkdir()
    Path("out", ".run.json.abc.partial").write_text('{"fing', encoding="utf-8")
    path = Path("shallow", "model.safetensors")
    state = load_file(path)
    for name, tensor in state.items():
        if "mlp.fc1" in name:
            tensor.zero_()
    save_file(state, path)
    return pruning("shallow")


UNREADABLE, UNFIT = (
    r"weights file w\.safetensors cannot be read: ",
    r"weights file w\.safetensors does not fit",
)
ROWS = (
    Row("weights-empty", _bytes(lambda _: b""), UNREADABLE),
    Row("weights-truncated", _bytes(lambda whole: whole[: len(whole) // 2]), UNREADABLE),
    Row("weights-header-cut", _bytes(lambda whole: whole[:40]), UNREADABLE),
    Row("weights-header-of-a-tebibyte", _bytes(lambda _: struct.pack("<Q", 1 << 40) + b"{}"), UNREADABLE),
    Row("weights-header-no-json", _bytes(lambda _: struct.pack("<Q", 8) + b"no json!"), UNREADABLE),
    Row("weights-header-nested", _bytes(lambda _: struct.pack("<Q", 100_000) + b"[" * 100_000), UNREADABLE),
    Row(
        "weights-offsets-outside",
        _bytes(lambda _: _headed({"a": {"dtype": "F32", "shape": [1 << 40], "data_offsets": [0, 1 << 42]}})),
        UNREADABLE,
    ),
    Row(
        "weights-offsets-overlap",
        _bytes(lambda _: _headed({n: {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]} for n in "ab"}, b"1234")),
        UNREADABLE,
    ),
    Row(
        "weights-unknown-dtype",
        _bytes(lambda _: _headed({"a": {"dtype": "F7", "shape": [1], "data_offsets": [0, 1]}}, b"1")),
        UNREADABLE,
    ),
    Row("weights-pickle-renamed", _pickle, UNREADABLE, runs_code=True),
    Row(
        "weights-pickle",
        _pickle_by_name,
        r"never loaded\); convert it: python -c \".*convert\('w\.pth', 'w\.safetensors'\)\"",
        runs_code=True,
    ),
    Row(
        "weights-twice",
        _tensors(lambda state: state.update({f"model_ema.{name}": tensor + 1 for name, tensor in _good().items()})),
        r"w\.safetensors .* 2 .*--weights w\.safetensors#plain or .*#model_ema",
    ),
    Row(
        "weights-of-no-part",
        _part("student"),
        r"#student does not name one part of the file: give --weights w\.safetensors#plain",
    ),
    Row(
        "weights-and-another-head",
        _tensors(_backbone),
        r"holds fc\.weight .* the network's backbone\.: give --weights w\.safetensors#backbone",
    ),
    Row("weights-registers", _tensors(lambda state: state.update(reg_token=torch.ones(1, 4, 64))), "no reg_token"),
    Row(
        "weights-quantized",
        _tensors(lambda state: state.update({"head.qweight": state.pop("head.weight").to(torch.int32)})),
        UNFIT + r".*head\.qweight, of quantized weights",
    ),
    Row(
        "weights-of-eight-bits",
        _tensors(lambda state: state.update({"head.bias": state["head.bias"].to(torch.float8_e4m3fn)})),
        r"head\.bias .*float8_e4m3fn.*float32.*not quantized",
    ),
    Row("weights-adapters", _tensors(lambda state: state.update({"head.lora_A.weight": torch.ones(2)})), "merge them"),
    Row("weights-pointer", _at(lambda path: path.write_text(POINTER)), UNREADABLE + "it is a pointer of git-lfs"),
    Row("weights-web-page", _at(lambda path: path.write_text("<!DOCTYPE html>")), UNREADABLE + "it is a web page"),
    Row("weights-graph", lambda _: [*COMMAND[:-1], "w.onnx"], r"--weights w\.onnx is an exported ONNX graph"),
    Row("weights-index-of-nothing", _index, r"names w-00001\.safetensors, .*0 of 1 files"),
    Row("weights-directory", _directory, UNREADABLE),
    Row("weights-symlink-to-itself", _loop, UNREADABLE),
    Row("weights-pipe", _at(pipe), UNREADABLE + ".*no regular file"),
    Row("weights-endless", _at(endless), UNREADABLE + ".*no regular file"),
    Row(
        "weights-long-name",
        lambda _: [*COMMAND[:-1], f"{LONG}.safetensors"],
        LONG + r"\.safetensors cannot be read: .*too long",
    ),
    Row("weights-of-another-network", _of_bert, UNFIT),
    Row(
        "weights-of-another-image-size",
        _larger,
        UNFIT + r".*: pos_embed has shape \(1, \d+, 64\), the model takes \(1, \d+, 64\); give the --image-size",
    ),
    Row("weights-missing", _tensors(lambda state: state.pop("head.bias")), UNFIT + ".*head.bias"),
    Row(
        "weights-shape",
        _tensors(lambda state: state.update({"head.bias": torch.zeros(3)})),
        UNFIT + ".*head.bias",
    ),
    Row(
        "weights-integers",
        _tensors(lambda state: state.update({"head.bias": state["head.bias"].to(torch.int8)})),
        r"w\.safetensors: head\.bias .*int8.*float32",
    ),
    Row("weights-nan", _tensors(_filled("blocks.0.mlp.fc1.weight", float("nan"))), r"w\.safetensors.* NaN .*mlp\.fc1"),
    Row("weights-inf", _tensors(_filled("head.weight", float("inf"))), r"w\.safetensors.*NaN or infinity .*head"),
    Row("weights-overflow", _tensors(_filled("head.weight", 3e38)), "NaN or infinity .*logits .*built-in"),
)
ODD = (Row("layers without variance, in a directory of a run killed at once", _zeroed),)
