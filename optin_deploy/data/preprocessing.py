"""From pictures and texts to the tensors a network takes, by the model's own configuration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import timm.data
import torch
from PIL import Image, ImageOps
from torch import Tensor

from optin_deploy.errors import UserError

# As many as Pillow opens without a warning.
MOST_PIXELS = 89_478_485
_EDGES = ("shortest_edge", "longest_edge")
# Special tokens around a text or a pair.
_MOST_ADDED = 8
# What files of pictures are read as.
PICTURE_CHANNELS = 3


@dataclass(frozen=True)
class ImagePreprocessing:
    """Resize, crop and normalise, as timm does it for evaluation. Pictures are not turned by their EXIF orientation.

    Attributes:
        input_name: forward's argument.
        size: height and width in pixels.
        mean, std: of the colours red, green and blue from 0 to 1; one value each for a network of grey pictures.
        crop_pct: part of the resized picture that the crop takes; crop_mode "squash" resizes to ``size`` directly.
        assumed: whether this is a guess, because the network's files do not say how pictures are prepared.
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
                "for colours, or 1 for grey pictures; calibrate networks of other channels on tensors"
            )

    @property
    def channels(self) -> int:
        """How many channels the network's pictures have: 3 for colours, 1 for grey."""
        return len(self.mean)

    @property
    def fixed(self) -> bool:
        """Whether all pictures come out in ``size``."""
        return True

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """What a picture of ``width`` times ``height`` pixels is resized to, before it is cropped; about."""
        target_height, target_width = (math.floor(n / self.crop_pct) for n in self.size)
        if self.crop_mode == "squash":
            return target_width, target_height
        scales = target_width / width, target_height / height
        # Borders are added where the whole picture is kept.
        scale = min(scales) if self.crop_mode == "border" else max(scales)
        return round(width * scale), round(height * scale)

    def shown(self, pixels: Tensor) -> Tensor:
        """Colours ``(height, width, 3)`` from 0 to 1 of one prepared picture ``(channels, height, width)``."""
        mean, std = (torch.tensor(values)[:, None, None] for values in (self.mean, self.std))
        return (pixels * std + mean).clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0)

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """A batch ``(images, channels, height, width)`` by input name."""
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
    """An image processor of transformers, used as transformers' own pipelines do: one picture after the other, turned
    by its EXIF orientation, in RGB.

    Attributes:
        processor: a ``BaseImageProcessor``.
        input_name: forward's argument, by which the processor calls its pictures too.
        channels: of the pictures that the processor makes.
        size: their height and width in pixels; where these depend on the picture, those of the sample inputs.
        fixed: whether all pictures come out in ``size``.
        masks: other tensors of the processor's that the network takes. Pictures for which these are not 1 everywhere
            are refused, since the network gets none and takes that for 1.
    """

    processor: Any
    input_name: str
    channels: int
    size: tuple[int, int]
    fixed: bool
    masks: tuple[str, ...] = ()

    def resized(self, width: int, height: int) -> tuple[int, int]:
        """What a picture of ``width`` times ``height`` pixels is resized to, before it is cropped; about."""
        size = self.processor.to_dict().get("size")
        shortest, longest = (size.get(key) if isinstance(size, dict) else None for key in _EDGES)
        if not getattr(self.processor, "do_resize", True) or not shortest or longest:
            return self.size[1], self.size[0]
        scale = shortest / min(width, height)
        return round(width * scale), round(height * scale)

    def shape_of(self, width: int, height: int) -> tuple[int, int]:
        """Height and width of what a picture of ``width`` times ``height`` pixels comes out as."""
        prepared = self._prepared(Image.new("RGB", (width, height)))
        return prepared.shape[-2], prepared.shape[-1]

    def shown(self, pixels: Tensor) -> Tensor:
        """Colours ``(height, width, 3)`` from 0 to 1 of one prepared picture ``(channels, height, width)``."""
        matrix, black = self._colours
        return ((pixels - black[:, None, None]).permute(1, 2, 0) @ matrix.T).clamp(0, 1)

    @cached_property
    def _colours(self) -> tuple[Tensor, Tensor]:
        """From a pixel as it is prepared, less what black is prepared to, to its colour: ``(3, channels)``; and black.

        Rescaling, normalising and the order of channels are linear, so that four pictures of one colour tell them.
        """
        colours = ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255))
        prepared = [self._prepared(Image.new("RGB", (256, 256), colour))[0] for colour in colours]
        black, *others = (each[:, each.shape[1] // 2, each.shape[2] // 2] for each in prepared)
        return torch.linalg.pinv(torch.stack([each - black for each in others], dim=1)), black

    def __call__(self, images: Sequence[Image.Image]) -> dict[str, Tensor]:
        """A batch ``(images, channels, height, width)`` by input name; UserError where shapes differ."""
        prepared = [self._prepared(image) for image in images]
        for image, each in zip(images, prepared, strict=True):
            if each.shape != prepared[0].shape:
                raise UserError(different_shapes(prepared[0].shape[-2:], each.shape[-2:], f"of {image.size} pixels"))
        return {self.input_name: torch.cat(prepared)}

    def _prepared(self, image: Image.Image) -> Tensor:
        """One picture ``(1, channels, height, width)``; UserError where the processor does not make that of it."""
        kind = type(self.processor).__name__
        upright = ImageOps.exif_transpose(image).convert("RGB")
        told = f"{kind}, on a picture of {upright.width} x {upright.height} pixels"
        try:
            given = self.processor(images=upright, return_tensors="pt")
            pixels = torch.as_tensor(given[self.input_name]).float()
        except Exception as error:  # of any type: processors of many kinds, each with its own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"{told}, fails: {reason}") from error
        if pixels.dim() != 4 or len(pixels) != 1 or pixels.shape[1] != self.channels:
            raise UserError(
                f"{told}, gives {self.input_name} of shape {tuple(pixels.shape)}: (1, {self.channels}, height, width) "
                "is needed; calibrate on tensors"
            )
        for name in self.masks:
            if not (torch.as_tensor(given[name]) == 1).all():
                raise UserError(
                    f"{told}, pads, and tells by {name} where: the network is pruned without {name}; set the processor "
                    "to a size that needs no padding"
                )
        return pixels


def different_shapes(one: Sequence[int], other: Sequence[int], which: str) -> str:
    """What is told of a picture whose prepared shape is not that of the others."""
    first, second = (" x ".join(map(str, shape)) for shape in (one, other))
    return (
        f"pictures come out of the image processor in different shapes, {first} and {second} (height x width) for one "
        f"{which}: give pictures of one size, or set the processor to a fixed size in preprocessor_config.json"
    )


Text = str | tuple[str, str]
"""One input of a text network: a text, or a pair of texts that it takes as one sequence."""


@dataclass(frozen=True)
class TextPreprocessing:
    """A transformers tokenizer.

    Attributes:
        tokenizer: a ``PreTrainedTokenizerBase``.
        input_names: which of the tokenizer's tensors the network takes.
        max_length: longer texts are cut to this many tokens; of a pair, the longer text is cut first.
        decoder_start: for encoder-decoders the token that the decoder's input begins with; the text follows, as in
            training on repeating it.
        prompt: put in front of every text.
        lower_case: texts are lower-cased first.
    """

    tokenizer: Any
    input_names: tuple[str, ...]
    max_length: int
    decoder_start: int | None = None
    prompt: str = ""
    lower_case: bool = False

    def without_tokens(self, texts: Sequence[Text]) -> list[Text]:
        """Those of ``texts`` that the tokenizer makes nothing of; none where it adds special tokens."""
        if self.tokenizer("")["input_ids"]:
            return []
        found = self.tokenizer(*self._columns(texts), truncation=True, max_length=self.max_length)["input_ids"]
        return [text for text, ids in zip(texts, found, strict=True) if not ids]

    def cut(self, texts: Sequence[Text]) -> int:
        """How many of ``texts`` are longer than ``max_length`` tokens."""
        # No tokenizer makes many more tokens than there are bytes: what is shorter need not be counted.
        long = [
            t for t in texts if len("".join(t).encode()) + len(self.prompt.encode()) + _MOST_ADDED > self.max_length
        ]
        if not long:
            return 0
        found = self.tokenizer(*self._columns(long), truncation=False, verbose=False)["input_ids"]
        return sum(len(ids) > self.max_length for ids in found)

    def __call__(self, texts: Sequence[Text]) -> dict[str, Tensor]:
        """Token tensors ``(texts, longest text)`` by input name, padded. All are texts, or all pairs."""
        encoded = self.tokenizer(
            *self._columns(texts),
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

    def _columns(self, texts: Sequence[Text]) -> list[list[str]]:
        """What the tokenizer takes: the texts, or the first and the second texts of pairs."""
        pairs = [text if isinstance(text, tuple) else (text,) for text in texts]
        columns = [list(column) for column in zip(*pairs, strict=True)]
        columns[0] = [self.prompt + text for text in columns[0]]
        return [[text.lower() for text in column] for column in columns] if self.lower_case else columns


PicturePreprocessing = ImagePreprocessing | ProcessorPreprocessing
Preprocessing = PicturePreprocessing | TextPreprocessing
