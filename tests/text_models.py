"""Tiny encoders with random weights as directories: of sentence-transformers in each of its layouts, and of pairs."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import save_file
from tiny_models import WORDS
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import nn

SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
SIZES: dict[str, Any] = {
    "vocab_size": len(SPECIAL) + 2 * len(WORDS),
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
}
# The class, and where positions begin; RoBERTa and MPNet count them from behind padding.
ENCODERS = {
    "bert": ("BertModel", transformers.BertConfig, 0),
    "roberta": ("RobertaModel", transformers.RobertaConfig, 0),
    "mpnet": ("MPNetModel", transformers.MPNetConfig, 0),
    "distilbert": ("DistilBertModel", transformers.DistilBertConfig, 0),
}


def save_pair_tokenizer(path: Path, *, token_types: bool, limit: int = 32) -> None:
    """One token a word, in lower and in upper case; two texts are divided by [SEP], and the second has type 1."""
    words = SPECIAL + WORDS + [word.upper() for word in WORDS]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", 2), ("[SEP]", 3)],
    )
    names = ["input_ids", "token_type_ids", "attention_mask"] if token_types else ["input_ids", "attention_mask"]
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=limit,
        model_input_names=names,
    ).save_pretrained(path)


def save_encoder(
    path: Path, kind: str = "bert", *, limit: int = 32, positions: int = 40, **changes: object
) -> nn.Module:
    """A plain encoder with its tokenizer in ``path``."""
    torch.manual_seed(0)
    name, config_class, padding = ENCODERS[kind]
    config = config_class(**{**SIZES, "max_position_embeddings": positions, "pad_token_id": padding, **changes})
    module = _with_large_weights(getattr(transformers, name)(config))
    path.mkdir(parents=True, exist_ok=True)
    module.save_pretrained(path)
    save_pair_tokenizer(path, token_types=kind == "bert", limit=limit)
    return module


def save_pair_classifier(path: Path, kind: str = "bert", *, labels: int = 3, **changes: object) -> nn.Module:
    """A classifier of pairs with its tokenizer in ``path``."""
    name = {"bert": "BertForSequenceClassification", "roberta": "RobertaForSequenceClassification"}[kind]
    torch.manual_seed(0)
    _, config_class, padding = ENCODERS[kind]
    options = {**SIZES, "max_position_embeddings": 40, "pad_token_id": padding, "num_labels": labels, **changes}
    module = _with_large_weights(getattr(transformers, name)(config_class(**options)))
    head = module.classifier if kind == "bert" else module.classifier.out_proj
    with torch.no_grad():
        # Every class is the answer for some texts.
        found = module(torch.randint(4, SIZES["vocab_size"], (64, 12))).logits
        head.bias -= found.mean(0)
        head.weight /= found.std(0)[:, None]
        head.bias /= found.std(0)
    module.save_pretrained(path)
    save_pair_tokenizer(path, token_types=kind == "bert")
    return module


def _with_large_weights(module: nn.Module) -> nn.Module:
    # Weights as small as the initial ones would make all outputs alike.
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module.eval()


def write_json(path: Path, value: object) -> None:
    """``value`` at ``path``, in a folder that may be new."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def add_modules(
    path: Path,
    pooling: Mapping[str, object],
    layers: Sequence[tuple[str, Mapping[str, object] | None, Mapping[str, torch.Tensor]]] = (),
    *,
    folder: str = "",
    config: Mapping[str, object] | None = None,
    whole: Mapping[str, object] | None = None,
    package: str = "sentence_transformers.models",
) -> None:
    """The files of sentence-transformers around an encoder, which is in ``folder``.

    Args:
        pooling: the configuration of 1_Pooling.
        layers: class, configuration and weights of what follows.
        config: sentence_bert_config.json.
        whole: config_sentence_transformers.json.
    """
    modules = [("Transformer", folder), ("Pooling", "1_Pooling")]
    write_json(path / "1_Pooling" / "config.json", pooling)
    for number, (name, own, weights) in enumerate(layers, 2):
        modules.append((name, f"{number}_{name}"))
        (path / f"{number}_{name}").mkdir()
        if own is not None:
            write_json(path / f"{number}_{name}" / "config.json", own)
        if weights:
            save_file(dict(weights), path / f"{number}_{name}" / "model.safetensors")
    write_json(
        path / "modules.json",
        [{"idx": i, "name": str(i), "path": p, "type": f"{package}.{n}"} for i, (n, p) in enumerate(modules)],
    )
    if config is not None:
        write_json(path / folder / "sentence_bert_config.json", config)
    if whole is not None:
        write_json(path / "config_sentence_transformers.json", whole)
