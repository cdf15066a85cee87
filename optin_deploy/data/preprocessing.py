"""Preprocessing: from images and texts to a network's input tensors, by the model's own configuration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import timm.data
import torch
from PIL import Image, ImageOps
from torch import Tensor

from optin_deploy.errors import UserError, one_line

# The most that Pillow opens without a warning.
MOST_PIXELS = 89_478_485
_EDGES = ("shortest_edge", "longest_edge")
# An upper bound on the special tokens around a text or a pair.
_MOST_ADDED = 8
# Image files are read as RGB.
IMAGE_CHANNELS = 3


@dataclass(frozen=True)
class ImagePreprocessing:
    """Resize, crop and normalise, as timm does for evaluation. The EXIF orientation of images is ignored.

    Attributes:
        input_name: argument of the network's forward.
        size: height and width in pixels.
        mean, std: per color channel (red, green, blue), for values from 0 to 1; one value each for grey images.
        crop_pct: fraction of the resized image that the crop keeps; crop_mode "squash" resizes to ``size`` directly.
        assumed: whether this is a guess, because the network's files do not describe its preprocessing.
    """

    input_name: str
    size: tuple[int, int]
    mean: tuple[float, ...] = timm.data.IMAGENET_DEFAULT_MEAN
    std: tuple[float, ...] = timm.data.IMAGENET_DEFAULT_STD
    interpolation: str = "bicubic"
    crop_pct: float = 0.875
    crop_mode: str = "center"
    assumed: bool = False

    def __post_init__(self) -> None:
        if len(self.mean) not in (1, 3) or len(self.std) != len(self.mean):
            raise UserError(
                f"ImagePreprocessing has {len(self.mean)} values in mean and {len(self.std)} in std: give 3 of each "
                "for colors, or 1 for grey images; calibrate networks with other channels on tensors"
            )

    @property
    def channels(self) -> int:
        """Number of image channels: 3 for colors, 1 for grey."""
        return len(self.mean)

    @property
    def fixed(self) -> bool:
        """Whether every prepared image has the same ``size``."""
        return True

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """Return roughly the width and height to which an image is resized before the crop."""
        target_height, target_width = (math.floor(n / self.crop_pct) for n in self.size)
        if self.crop_mode == "squash":
            return target_width, target_height
        scales = target_width / width, target_height / height
        # "border" keeps the whole image and pads it.
        scale = min(scales) if self.crop_mode == "border" else max(scales)
        return round(width * scale), round(height * scale)

    def to_colors(self, pixels: Tensor) -> Tensor:
        """Return the colors ``(height, width, 3)``, 0 to 1, of one prepared image ``(channels, height, width)``."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels * std + mean).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0)

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Return a batch ``(images, channels, height, width)`` by input name."""
        transform = timm.data.create_transform(
            input_size=(self.channels, *self.size),
            is_training=False,
            mean=self.mean,
            std=self.std,
            interpolation=self.interpolation,
            crop_pct=self.crop_pct,
            crop_mode=self.crop_mode,
        )
        mode = "RGB" if self.channels == 3 else "L"
        return {self.input_name: torch.stack([transform(image.convert(mode)) for image in images])}


@dataclass(frozen=True)
class ProcessorPreprocessing:
    """An image processor of transformers, used as in its pipelines: one image at a time, upright by EXIF, in RGB.

    Attributes:
        processor: a ``BaseImageProcessor``.
        input_name: argument of the network's forward; the processor uses the same name.
        channels: of the prepared images.
        size: height and width of prepared images in pixels; those of the sample inputs if they depend on the image.
        fixed: whether every prepared image has the same ``size``.
        masks: other tensors of the processor that the network accepts. The network is run without them and then
            assumes 1 everywhere, so images with another mask are refused.
    """

    processor: Any
    input_name: str
    channels: int
    size: tuple[int, int]
    fixed: bool
    masks: tuple[str, ...] = ()

    def resized_size(self, width: int, height: int) -> tuple[int, int]:
        """Return roughly the width and height to which an image is resized before the crop."""
        size = self.processor.to_dict().get("size")
        shortest, longest = (size.get(key) if isinstance(size, dict) else None for key in _EDGES)
        if not getattr(self.processor, "do_resize", True) or not shortest or longest:
            return self.size[1], self.size[0]
        scale = shortest / min(width, height)
        return round(width * scale), round(height * scale)

    def shape_of(self, width: int, height: int) -> tuple[int, int]:
        """Return the height and width of a prepared image that was ``width`` x ``height`` pixels."""
        prepared = self._process(Image.new("RGB", (width, height)))
        return prepared.shape[-2], prepared.shape[-1]

    def to_colors(self, pixels: Tensor) -> Tensor:
        """Return the colors ``(height, width, 3)``, 0 to 1, of one prepared image ``(channels, height, width)``."""
        matrix, black = self._color_map
        return ((pixels - black[:, None, None]).permute(1, 2, 0) @ matrix.T).clamp(0, 1)

    @cached_property
    def _color_map(self) -> tuple[Tensor, Tensor]:
        """A matrix ``(3, channels)`` from prepared pixels minus black to colors, and the prepared black.

        Rescaling, normalising and reordering channels are affine, so four images of one color determine the map.
        """
        colors = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))
        images = [self._process(Image.new("RGB", (256, 256), color))[0] for color in colors]
        black, *primaries = (image[:, image.shape[1] // 2, image.shape[2] // 2] for image in images)
        return torch.linalg.pinv(torch.stack([color - black for color in primaries], dim=1)), black

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """Return a batch ``(images, channels, height, width)`` by input name.

        Raises:
            UserError: the processor fails, or the prepared images have different shapes.
        """
        prepared = [self._process(image) for image in images]
        for image, pixels in zip(images, prepared, strict=True):
            if pixels.shape != prepared[0].shape:
                raise UserError(shape_mismatch(prepared[0].shape[-2:], pixels.shape[-2:], f"of {image.size} pixels"))
        return {self.input_name: torch.cat(prepared)}

    def _process(self, image: Image.Image) -> Tensor:
        """Return one prepared image ``(1, channels, height, width)``; UserError if the processor cannot make that."""
        upright = ImageOps.exif_transpose(image).convert("RGB")
        context = f"{type(self.processor).__name__}, on an image of {upright.width} x {upright.height} pixels"
        try:
            features = self.processor(images=upright, return_tensors="pt")
            pixels = torch.as_tensor(features[self.input_name]).float()
        except Exception as error:  # processors of many kinds raise errors of any type
            raise UserError(f"{context}, fails: {one_line(error)}") from error
        if pixels.dim() != 4 or len(pixels) != 1 or pixels.shape[1] != self.channels:
            raise UserError(
                f"{context}, returns {self.input_name} of shape {tuple(pixels.shape)}: (1, {self.channels}, height, "
                "width) is needed; calibrate on tensors"
            )
        for name in self.masks:
            if not (torch.as_tensor(features[name]) == 1).all():
                raise UserError(
                    f"{context}, pads and marks the padding in {name}: the network is pruned without {name}; set the "
                    "processor to a size that needs no padding"
                )
        return pixels


def shape_mismatch(one: Sequence[int], other: Sequence[int], which: str) -> str:
    """Return the error message for two prepared images of different shapes; ``which`` describes the second."""
    first, second = (" x ".join(map(str, shape)) for shape in (one, other))
    return (
        f"the image processor makes different shapes, {first} and {second} (height x width) for one {which}: give "
        "images of one size, or set a fixed size in preprocessor_config.json"
    )


Text = str | tuple[str, str]
"""One input of a text network: a text, or a pair of texts that are joined to one sequence."""


@dataclass(frozen=True)
class TextPreprocessing:
    """A transformers tokenizer.

    Attributes:
        tokenizer: a ``PreTrainedTokenizerBase``.
        input_names: the tokenizer's tensors that the network takes.
        max_length: texts are truncated to this many tokens; in a pair, the longer text is truncated first.
        decoder_start: for encoder-decoders, the first token of the decoder's input; the text follows, as in training
            to repeat it.
        prompt: put in front of every text.
        lower_case: whether texts are lower-cased first.
    """

    tokenizer: Any
    input_names: tuple[str, ...]
    max_length: int
    decoder_start: int | None = None
    prompt: str = ""
    lower_case: bool = False

    def without_tokens(self, texts: Sequence[Text]) -> list[Text]:
        """Return the texts that have no tokens; empty if the tokenizer adds special tokens."""
        if self.tokenizer("")["input_ids"]:
            return []
        tokens = self.tokenizer(*self._columns(texts), truncation=True, max_length=self.max_length)["input_ids"]
        return [text for text, ids in zip(texts, tokens, strict=True) if not ids]

    def count_truncated(self, texts: Sequence[Text]) -> int:
        """Return how many of ``texts`` are longer than ``max_length`` tokens."""
        # A text has at most as many tokens as bytes, plus special tokens: shorter ones need not be tokenized.
        long = [
            t for t in texts if len("".join(t).encode()) + len(self.prompt.encode()) + _MOST_ADDED > self.max_length
        ]
        if not long:
            return 0
        tokens = self.tokenizer(*self._columns(long), truncation=False, verbose=False)["input_ids"]
        return sum(len(ids) > self.max_length for ids in tokens)

    def __call__(self, texts: Sequence[Text]) -> dict[str, Tensor]:
        """Return padded token tensors ``(texts, longest text)`` by input name, for texts only or pairs only."""
        encoded = self.tokenizer(
            *self._columns(texts),
            padding=True,
            # Decoder masks and position ids assume padding after the text.
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

    def _columns(self, texts: Sequence[Text]) -> list[list[str]]:
        """Return the tokenizer's arguments: the texts, or the first and the second texts of pairs."""
        pairs = [text if isinstance(text, tuple) else (text,) for text in texts]
        columns = [list(column) for column in zip(*pairs, strict=True)]
        columns[0] = [self.prompt + text for text in columns[0]]
        return [[text.lower() for text in column] for column in columns] if self.lower_case else columns


VisionPreprocessing = ImagePreprocessing | ProcessorPreprocessing
