"""Directories given as --model that transformers wrote, or somebody else."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tiny_models import save_lines, texts
from transformers import ViTImageProcessor, ViTMAEConfig, ViTMAEForPreTraining

from bad_input.common import MARK, Material, Row, endless, pipe, pruning, pruning_text, save_pickle
from bad_input.weights import POINTER

BERT = Path("bert")
CODE = f"from pathlib import Path\n\nPath({MARK!r}).touch()\n\nclass Evil:\n    pass\n"
WEIGHTS = BERT / "model.safetensors"
_STATES = {"output_hidden_states": True, "output_attentions": True}


def _made(change: Callable[[], object]) -> Callable[[Material], Sequence[str]]:
    def make(material: Material) -> Sequence[str]:
        material.copy("bert")
        change()
        return pruning_text()

    return make


def _edited(name: str, **changes: Any) -> Callable[[], object]:
    def change() -> None:
        path = BERT / name
        data = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps(data | changes), encoding="utf-8")

    return change


def _coded(name: str, **changes: Any) -> Callable[[], object]:
    def change() -> None:
        (BERT / "evil.py").write_text(CODE, encoding="utf-8")
        _edited(name, **changes)()

    return change


def _written(name: str, content: Callable[[bytes], bytes]) -> Callable[[], object]:
    return lambda: (BERT / name).write_bytes(content((BERT / name).read_bytes()))


def _in_pickle() -> None:
    WEIGHTS.unlink()
    save_pickle(BERT / "pytorch_model.bin")


def _elsewhere() -> None:
    state = load_file(WEIGHTS)
    WEIGHTS.unlink()
    save_file(state, Path("outside.safetensors"), {"format": "pt"})
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(state, "../outside.safetensors")}
    (BERT / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _index(content: str) -> Callable[[], object]:
    def change() -> None:
        WEIGHTS.unlink()
        (BERT / "model.safetensors.index.json").write_text(content, encoding="utf-8")

    return change


def _nan() -> None:
    state = load_file(WEIGHTS)
    state["bert.embeddings.word_embeddings.weight"][0, 0] = float("nan")
    save_file(state, WEIGHTS, {"format": "pt"})


def _adapter() -> None:
    adapter = {"peft_type": "LORA", "base_model_name_or_path": "evil/model", "r": 2, "task_type": "SEQ_CLS"}
    (BERT / "adapter_config.json").write_text(json.dumps(adapter), encoding="utf-8")
    save_pickle(BERT / "adapter_model.bin")


def _odd_texts(material: Material) -> Sequence[str]:
    material.copy("bert")
    _edited("config.json", attn_implementation="evil/kernel")()
    _coded("tokenizer_config.json", auto_map=AUTO, tokenizer_class="Evil", vocab_size="x")()
    save_lines(Path("t.txt"), [f"{text}\0 \ufffd\u202e" for text in texts(16)])
    return pruning_text("--calibration", "t.txt")


def _without(change: Callable[[], object] = lambda: None) -> Callable[[], object]:
    def made() -> None:
        WEIGHTS.unlink()
        change()

    return made


def _shards() -> None:
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (BERT / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    save_file({"a": load_file(WEIGHTS)["classifier.bias"]}, BERT / "model-00001-of-00002.safetensors")
    WEIGHTS.unlink()


def _emptied() -> None:
    for path in BERT.iterdir():
        path.unlink()


AUTO = {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
CONFIG = r"bert/config\.json cannot be used: "


def _random(material: Material) -> Sequence[str]:
    """An autoencoder that hides patches at random, in eval mode too."""
    widths = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    decoder = {f"decoder_{name}": value for name, value in widths.items()}
    module = ViTMAEForPreTraining(ViTMAEConfig(image_size=32, patch_size=8, **widths, **decoder))
    module.save_pretrained("mae")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained("mae")
    material.copy("images")
    return pruning("mae", "--calibration", "images")


ROWS = (
    Row("random-network", _random, "logits .*random numbers"),
    Row("config-pipe", _made(lambda: pipe(BERT / "config.json")), r"bert/config\.json .*no regular file"),
    Row("card-pipe", _made(lambda: pipe(BERT / "README.md")), r"bert/README\.md .*no regular file"),
    Row("card-endless", _made(lambda: endless(BERT / "README.md")), r"bert/README\.md .*no regular file"),
    Row("tokenizer-pipe", _made(lambda: pipe(BERT / "tokenizer.json")), r"bert/tokenizer\.json .*no regular file"),
    Row("transformers-weights-pipe", _made(lambda: pipe(WEIGHTS)), r"bert/model\.safetensors .*no regular file"),
    Row("config-truncated", _made(_written("config.json", lambda t: t[: len(t) // 2])), CONFIG),
    Row("config-empty", _made(_written("config.json", lambda _: b"")), CONFIG),
    Row("config-list", _made(_written("config.json", lambda _: b"[]")), CONFIG),
    Row("config-not-utf8", _made(_written("config.json", lambda t: t.replace(b"bert", b"\xff\xfe"))), CONFIG),
    Row("config-nested", _made(_written("config.json", lambda _: b'{"a":' * 100_000)), CONFIG),
    Row("config-code", _made(_coded("config.json", model_type="evil", auto_map=AUTO)), CONFIG, runs_code=True),
    Row(
        "config-code-of-an-unknown-class",
        _made(_coded("config.json", auto_map=AUTO, architectures=["Evil"], vocab_size=7)),
        "bert",
        runs_code=True,
    ),
    Row("config-unknown-model", _made(_edited("config.json", model_type="no-such")), CONFIG + ".*no-such"),
    Row("config-heads", _made(_edited("config.json", num_attention_heads=5)), "bert"),
    Row("config-negative-layers", _made(_edited("config.json", num_hidden_layers=-1)), "bert"),
    Row("config-text-for-a-number", _made(_edited("config.json", hidden_size="many")), "bert"),
    Row("config-other-width", _made(_edited("config.json", intermediate_size=128)), "bert: .*configuration"),
    Row("config-more-layers", _made(_edited("config.json", num_hidden_layers=3)), "bert .*no weights for"),
    Row(
        "config-endless-layers", _made(_edited("config.json", num_hidden_layers=10**9)), "num_hidden_layers 1000000000"
    ),
    *(
        Row(
            f"config-architectures-{name}",
            _made(_edited("config.json", architectures=value)),
            "architectures in config",
        )
        for name, value in {"number": [3], "null": [None], "mapping": {"a": 1}, "word": "BertModel"}.items()
    ),
    Row("config-quantized", _made(_edited("config.json", quantization_config={"quant_method": "awq"})), "bert"),
    Row("directory-empty", _made(_emptied), r"bert .*empty directory.*config\.json"),
    Row("config-of-diffusers", _made(_edited("config.json", _class_name="UNet", model_type=None)), CONFIG),
    Row("config-pointer", _made(lambda: (BERT / "config.json").write_text(POINTER)), r"bert/config\.json is a pointer"),
    Row("directory-weights-pointer", _made(lambda: WEIGHTS.write_text(POINTER)), r"safetensors is a pointer"),
    Row("tokenizer-pointer", _made(lambda: (BERT / "tokenizer.json").write_text(POINTER)), "json is a pointer"),
    Row("weights-shard-missing", _made(_shards), r"names model-00002-of-00002\.safetensors, which does not exist"),
    Row("weights-none", _made(_without()), r"the weights of bert cannot be found: it has no model\.safetensors"),
    Row(
        "weights-by-another-name",
        _made(lambda: WEIGHTS.rename(BERT / "mine.safetensors")),
        r"bert .*mine\.safetensors.*--weights bert/mine\.safetensors",
    ),
    Row("config-fewer-layers", _made(_edited("config.json", num_hidden_layers=1)), r"bert has weights for .*layer\.1"),
    Row("weights-in-a-pickle", _made(_in_pickle), "the weights of bert", runs_code=True),
    Row("weights-outside-the-directory", _made(_elsewhere), r"index\.json names \.\./outside\.safetensors"),
    Row("weights-index-no-json", _made(_index("{")), r"index\.json .*index"),
    Row("weights-index-list", _made(_index('{"weight_map": [1]}')), r"index\.json cannot be read as an index"),
    Row("transformers-weights-truncated", _made(_written("model.safetensors", lambda t: t[:-99])), "bert"),
    Row("transformers-weights-nan", _made(_nan), r"NaN or infinity .*bert\.embeddings\.word_embeddings"),
    Row(
        "adapter-of-a-model-elsewhere",
        _made(_adapter),
        "peft adapter .* of evil/model",
        runs_code=True,
    ),
    Row(
        "tokenizer-of-no-tokens",
        _made(_edited("tokenizer_config.json", model_max_length=0)),
        "the tokenizer of bert .* no tokens: correct model_max_length 0",
    ),
    Row("tokenizer-truncated", _made(_written("tokenizer.json", lambda t: t[:99])), "the tokenizer of bert"),
    Row(
        "tokenizer-missing",
        _made(lambda: (BERT / "tokenizer.json").unlink()),
        "tokenizer of bert cannot be read|bert has no tokenizer",
    ),
)
# What this names is never fetched or run: the tokenizer's file and torch's attention are used.
ODD = (
    Row("an attention to be fetched, a tokenizer with code, texts with NUL bytes", _odd_texts, runs_code=True),
    Row(
        "a configuration that asks for all hidden states and attentions",
        _made(_edited("config.json", **_STATES)),
    ),
)
