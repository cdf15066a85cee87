"""Image processors of transformers: read, and looked at by what they make of a few pictures."""

import importlib.util
import inspect
import logging
import math
from collections.abc import Mapping
from typing import Any

import transformers
from PIL import Image
from torch import nn

from optin_deploy.data.preprocessing import ImagePreprocessing, PicturePreprocessing, ProcessorPreprocessing
from optin_deploy.errors import UserError
from optin_deploy.models import transformers_inputs as inputs_of
from optin_deploy.models.hub import PROCESSOR_FILES, read_files

logger = logging.getLogger(__name__)

# Far more than any processor makes of a picture; without end, memory would be full before the first is made.
_MOST_PIXELS = 1 << 13
_LEAST_CROP = 0.05
_OF_PILLOW_ONLY = (Image.Resampling.BOX, Image.Resampling.HAMMING)
# Width and height of pictures that tell whether all come out in one size. The built-in pictures are as the first.
_PROBES = ((256, 256), (300, 300), (320, 200), (200, 330))


def read_image_preprocessing(name: str, module: nn.Module) -> PicturePreprocessing | None:
    """What prepares pictures for ``module``: the image processor beside its weights.

    None, with a warning, where the network takes pictures of other channels than the processor makes. Without a
    processor, pictures are prepared as for ImageNet, with a warning: that is a guess.

    Raises:
        UserError: the processor fails, or makes something else of a picture than one picture.
    """
    channels, height, width = inputs_of.image_size(module.config)
    try:
        processor = read_processor(name)
    except OSError:
        if read_files(name, PROCESSOR_FILES):
            raise
        logger.warning("%s has no image processor: how pictures are prepared is a guess, as for ImageNet", name)
        return _for_channels(_assumed((height, width)), channels, name)
    arguments = inspect.signature(module.forward).parameters
    return _for_channels(_looked_at(processor, arguments, (height, width)), channels, name)


def _assumed(size: tuple[int, int]) -> ImagePreprocessing:
    return ImagePreprocessing(inputs_of.IMAGE_INPUT, size, crop_pct=1.0, crop_mode="squash", assumed=True)


def read_processor(name: str) -> Any:
    """The image processor of a local directory or model id; OSError where there is none."""
    processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    told = processor.to_dict()
    _check_numbers(name, told)
    if told.get("resample") in _OF_PILLOW_ONLY:
        # By default, transformers resizes with torchvision, which ends with an error for these.
        processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **_with_pillow())
        logger.warning("%s resizes pictures in a way that only Pillow has: its processor runs on Pillow", name)
    return processor


def _with_pillow() -> dict[str, Any]:
    """How transformers is told to prepare pictures with Pillow and NumPy; later versions 5 have backends by name."""
    named = importlib.util.find_spec("transformers.image_processing_backends") is not None
    return {"backend": "pil"} if named else {"use_fast": False}


def _for_channels(preprocessing: PicturePreprocessing, channels: int, name: str) -> PicturePreprocessing | None:
    if preprocessing.channels == channels:
        return preprocessing
    logger.warning(
        "%s takes pictures of %d channels, its image processor makes %d: calibrate it on tensors (.npz, .safetensors)",
        *(name, channels, preprocessing.channels),
    )
    return None


def _check_numbers(name: str, told: Mapping[str, Any]) -> None:
    """Raise UserError where the processor would make pictures larger than any network takes."""
    for key, value in told.items():
        if isinstance(value, Mapping):
            _check_numbers(name, value)
        numbers = value if isinstance(value, list | tuple) else [value]
        numbers = [n for n in numbers if isinstance(n, int | float) and not isinstance(n, bool)]
        if key.endswith(("size", "edge", "height", "width", "multiple_of", "divisor", "crop_pct")):
            least = _LEAST_CROP if key == "crop_pct" else 0
            wrong = next((n for n in numbers if not math.isfinite(n) or not least <= n <= _MOST_PIXELS), None)
            if wrong is not None:
                raise UserError(
                    f"the image processor of {name} has {key} {str(wrong)[:40]}: from {least} to {_MOST_PIXELS} is "
                    "possible; correct it"
                )


def _looked_at(processor: Any, arguments: Mapping[str, Any], size: tuple[int, int]) -> ProcessorPreprocessing:
    """``processor`` with what it makes of a few pictures; ``size`` is what the network is configured for."""
    picture = Image.new("RGB", _PROBES[0])
    given = processor(images=picture, return_tensors="pt")
    kind = type(processor).__name__
    pixels = given.get(inputs_of.IMAGE_INPUT)
    if pixels is None or getattr(pixels, "ndim", 0) != 4 or len(pixels) != 1:
        shape = "nothing" if pixels is None else f"shape {tuple(getattr(pixels, 'shape', ()))}"
        raise UserError(
            f"{kind} gives {inputs_of.IMAGE_INPUT} of {shape} for a picture: (1, channels, height, width) is needed"
        )
    others = [n for n in given if n != inputs_of.IMAGE_INPUT and n in arguments]
    needed = [n for n in others if not n.endswith("mask") and arguments[n].default is inspect.Parameter.empty]
    if needed:
        raise UserError(
            f"{kind} gives {needed[0]} beside {inputs_of.IMAGE_INPUT}: networks that need both are not prepared"
        )
    masks = tuple(name for name in others if name.endswith("mask"))
    made = ProcessorPreprocessing(processor, inputs_of.IMAGE_INPUT, pixels.shape[1], size, fixed=False, masks=masks)
    shapes = [made.shape_of(*probe) for probe in _PROBES]
    sample = shapes[0] if shapes[0] == shapes[1] else made.shape_of(size[1], size[0])
    fixed = len(set(shapes)) == 1
    return ProcessorPreprocessing(processor, inputs_of.IMAGE_INPUT, pixels.shape[1], sample, fixed, masks)
