"""Tiny models with random weights, each with sample inputs and its dynamic axes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import timm
import torch
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification

from exporters import DynamicAxes, onnx_from_program, trace

VOCABULARY = 100
POSITIONS = 32


class BertLogits(nn.Module):
    """What the pipeline does with every ModelOutput class: the tensors only."""

    def __init__(self) -> None:
        super().__init__()
        self.bert = BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=64,
                max_position_embeddings=POSITIONS,
                num_labels=3,
            )
        )

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> tuple[Tensor, ...]:
        return (self.bert(input_ids=input_ids, attention_mask=attention_mask).logits,)


@dataclass(frozen=True)
class Case:
    module: nn.Module
    inputs: dict[str, Tensor]
    dynamic_axes: DynamicAxes
    batches: tuple[dict[str, Tensor], ...]
    outputs: tuple[str, ...]

    def export(self, path: Path, opset: int = 20) -> Path:
        program = trace(self.module, self.inputs, self.dynamic_axes)
        onnx_from_program(program, path, output_names=self.outputs, dynamic_axes=self.dynamic_axes, opset=opset)
        return path


def tokens(batch: int, length: int, padded: int = 0) -> dict[str, Tensor]:
    """Token ids, and a mask in which every sequence but the first ends in `padded` padding tokens."""
    generator = torch.Generator().manual_seed(batch * 100 + length)
    mask = torch.ones(batch, length, dtype=torch.int64)
    mask[1:, length - padded :] = 0
    return {
        "input_ids": torch.randint(0, VOCABULARY, (batch, length), generator=generator),
        "attention_mask": mask,
    }


def images(batch: int) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(batch))}


@pytest.fixture(scope="session")
def bert() -> Case:
    torch.manual_seed(0)
    axes = {0: "batch", 1: "sequence"}
    return Case(
        BertLogits(),
        tokens(2, 16),
        {"input_ids": axes, "attention_mask": axes},
        (tokens(1, 16), tokens(3, 7, padded=3), tokens(5, POSITIONS, padded=20)),
        ("logits",),
    )


@pytest.fixture(scope="session")
def vit() -> Case:
    torch.manual_seed(0)
    module = timm.create_model(
        "deit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=24, depth=2, num_classes=5, pretrained=False
    )
    # One image: tracing has to double it, since torch.export fixes sizes of 1.
    return Case(module, images(1), {"x": {0: "batch"}}, (images(1), images(3), images(8)), ("logits",))


@pytest.fixture(scope="session")
def bert_onnx(bert: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return bert.export(tmp_path_factory.mktemp("bert") / "bert.onnx")


@pytest.fixture(scope="session")
def vit_onnx(vit: Case, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return vit.export(tmp_path_factory.mktemp("vit") / "vit.onnx")
