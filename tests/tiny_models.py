"""Networks of a few thousand random weights, and files for them: what the tests of the user-facing half run on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import Block
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from optin_deploy.models import checkpoint, timm_models
from optin_deploy.models.custom import custom_network
from optin_deploy.models.load import load_network
from optin_deploy.network import Network, Source
from optin_deploy.structure.plan import Plan

VISION = {"model": "test_vit", "weights": "random", "image_size": 32}
POSITIONS = 24
WORDS = [f"w{i}" for i in range(40)]
_SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def vision_network(seed: int = 0) -> Network:
    """timm's test_vit at 32 pixels: 6 blocks of 2 heads and 192 neurons, 1000 classes."""
    return load_network(**VISION, seed=seed)


def resnet_network(seed: int = 0) -> Network:
    """timm's test_resnet at 32 pixels: three basic blocks and a bottleneck, 1000 classes."""
    return load_network("test_resnet", weights="random", image_size=32, seed=seed)


def classifier(classes: int, **arguments: object) -> Network:
    """The same with few classes, or other arguments of timm's."""
    source = Source("timm", "test_vit", {"img_size": 32, "num_classes": classes, **arguments})
    torch.manual_seed(0)
    return timm_models.network_of(timm_models.build(source), source, "random")


def save_shallow(path: Path) -> None:
    """A checkpoint of ours, nothing pruned, of one block: what takes long in a run is the export of each block."""
    checkpoint.save(classifier(10, depth=1), Plan({}), path)


def bert_config(**changes: object) -> BertConfig:
    """Two layers of four heads and 64 neurons."""
    options = {
        "vocab_size": len(WORDS) + len(_SPECIAL),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "intermediate_size": 64,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 0,
        "id2label": {0: "bad", 1: "fair", 2: "good"},
        "label2id": {"bad": 0, "fair": 1, "good": 2},
    }
    return BertConfig(**options | changes)


def save_tokenizer(path: Path) -> None:
    """One token a word of `WORDS`, between [CLS] and [SEP]."""
    vocabulary = {word: i for i, word in enumerate(_SPECIAL + WORDS)}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)])
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        model_max_length=POSITIONS,
        model_input_names=["input_ids", "attention_mask"],
    ).save_pretrained(path)


def save_bert(
    path: Path, *, head: bool = True, tokenizer: bool = True, dtype: torch.dtype = torch.float32, **changes: object
) -> nn.Module:
    """Write a transformers directory, of a three-class classifier or of the plain encoder; the module written."""
    torch.manual_seed(0)
    module = (BertForSequenceClassification if head else BertModel)(bert_config(**changes)).to(dtype).eval()
    # Weights as small as BERT's initial ones would make all outputs alike.
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() > 1:
                parameter.mul_(8)
    module.save_pretrained(path)
    if tokenizer:
        save_tokenizer(path)
    return module


class TinyModule(nn.Module):
    """A user's own network: timm blocks behind a batch norm, which has a buffer without dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(5)
        self.embed = nn.Linear(8, 32)
        self.blocks = nn.ModuleList([Block(32, 4)])
        self.head = nn.Linear(32, 3)

    def forward(self, features: Tensor) -> Tensor:
        x = self.embed(self.norm(features))
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(1))


def own_network(seed: int = 0) -> Network:
    """`TinyModule` with sample inputs ``features`` of shape (2, 5, 8)."""
    torch.manual_seed(seed)
    return custom_network(TinyModule(), {"features": torch.randn(2, 5, 8)}, logits="output")


def own_batches(count: int = 3, rows: int = 8) -> list[dict[str, Tensor]]:
    """Calibration batches for it."""
    generator = torch.Generator().manual_seed(1)
    return [{"features": torch.randn(rows, 5, 8, generator=generator)} for _ in range(count)]


def texts(count: int) -> list[str]:
    """Distinct texts of two to nine words."""
    rng = np.random.default_rng(0)
    return [" ".join([WORDS[i % 40], WORDS[i // 40], *rng.choice(WORDS, i % 8)]) for i in range(count)]


def save_images(folder: Path, count: int, seed: int = 0) -> list[Path]:
    """Pictures of coloured noise in ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    files = [folder / f"{i:03}.png" for i in range(count)]
    for file in files:
        small = Image.fromarray(rng.integers(0, 256, (6, 8, 3), dtype=np.uint8))
        small.resize((48, 40)).save(file)
    return files


def save_lines(path: Path, lines: Sequence[str]) -> Path:
    """A text file of these lines."""
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path
