"""From pictures and texts to the tensors a network takes, by the model's own configuration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import timm.data
import torch
from PIL import Image
from torch import Tensor

# As many as Pillow opens without a warning.
MOST_PIXELS = 89_478_485
# What files of pictures are read as.
PICTURE_CHANNELS = 3


@dataclass(frozen=True)
class ImagePreprocessing:
    """Resize, crop and normalise, as timm does it for evaluation.

    Attributes:
        input_name: forward's argument.
        size: height and width in pixels.
        crop_pct: part of the resized picture that the crop takes; crop_mode "squash" resizes to ``size`` directly.
    """

    input_name: str
    size: tuple[int, int]
    mean: tuple[float, ...] = timm.data.IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = timm.data.IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """What a picture of ``width`` times ``height`` pixels is resized to, before it is cropped; about."""
        target_height, target_width = (math.floor(n / self.crop_pct) for n in self.size)
        if self.crop_mode == "squash":
            return target_width, target_height
        scales = target_width / width, target_height / height
        # Borders are added where the whole picture is kept.
        scale = min(scales) if self.crop_mode == "border" else max(scales)
        return round(width * scale), round(height * scale)

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """A batch ``(images, 3, height, width)`` by input name."""
        transform = timm.data.create_transform(
            input_size=(3, *self.size),
            is_training=False,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        return {self.input_name: torch.stack([transform(image.convert("RGB")) for image in images])}


@dataclass(frozen=True)
class TextPreprocessing:
    """A transformers tokenizer.

    Attributes:
        tokenizer: a ``PreTrainedTokenizerBase``.
        input_names: which of the tokenizer's tensors the network takes.
        max_length: longer texts are cut to this many tokens.
        decoder_start: for encoder-decoders the token that the decoder's input begins with; the text follows, as in
            training on repeating it.
    """

    tokenizer: Any
    input_names: tuple[str, ...]
    max_length: int
    decoder_start: int | None = None

    def without_tokens(self, texts: Sequence[str]) -> list[str]:
        """Those of ``texts`` that the tokenizer makes nothing of; none where it adds special tokens."""
        if self.tokenizer("")["input_ids"]:
            return []
        found = self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]
        return [text for text, ids in zip(texts, found, strict=True) if not ids]

    def __call__(self, texts: Sequence[str]) -> dict[str, Tensor]:
        """Token tensors ``(texts, longest text)`` by input name, padded."""
        encoded = self.tokenizer(
            list(texts),
            padding=True,
            # Masks of decoders, and positions counted from the start, are for padding behind the text.
            padding_side="right",
            truncation=True,
            max_length=self.max_length,
            return_tensors="pt",
        )
        batch = {name: encoded[name] for name in self.input_names}
        if self.decoder_start is not None:
            ids = encoded["input_ids"]
            start = torch.full_like(ids[:, :1], self.decoder_start)
            batch["decoder_input_ids"] = torch.cat([start, ids[:, :-1]], dim=1)
        return batch


Preprocessing = ImagePreprocessing | TextPreprocessing
