"""Image processors of transformers: read them, and find their output shapes by a few images."""

import importlib.util
import inspect
import logging
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import transformers
from PIL import Image
from torch import nn

from optin_deploy.data.preprocessing import ImagePreprocessing, ProcessorPreprocessing, VisionPreprocessing
from optin_deploy.errors import UserError
from optin_deploy.models.hub import PROCESSOR_FILES, read_files
from optin_deploy.models.transformers_inputs import IMAGE_INPUT, image_size

logger = logging.getLogger(__name__)

# A limit for sizes in a processor: a huge one would fill memory with the first image.
_MOST_PIXELS = 1 << 13
_LEAST_CROP = 0.05
_ONLY_IN_PILLOW = (Image.Resampling.BOX, Image.Resampling.HAMMING)
# Width and height of images that show whether all are prepared to one size; built-in images have the first.
_PROBES = ((256, 256), (300, 300), (320, 200), (200, 330))


def read_image_preprocessing(name: str, module: nn.Module) -> VisionPreprocessing | None:
    """Return the preprocessing of ``module``: the image processor next to its weights.

    None, with a warning, if the network takes another number of channels than the processor makes. Without a processor,
    ImageNet's preprocessing is assumed, with a warning.

    Raises:
        UserError: the processor fails, or does not make one image from an image.
    """
    channels, height, width = image_size(module.config)
    try:
        processor = read_processor(name)
    except OSError:
        if read_files(name, PROCESSOR_FILES):
            raise
        logger.warning("%s has no image processor: ImageNet's preprocessing is assumed, which is a guess", name)
        assumed = ImagePreprocessing(IMAGE_INPUT, (height, width), crop_pct=1.0, crop_mode="squash", assumed=True)
        return _if_channels_match(assumed, channels, name)
    arguments = inspect.signature(module.forward).parameters
    return _if_channels_match(_inspect_processor(processor, arguments, (height, width)), channels, name)


def read_processor(name: str) -> Any:
    """Return the image processor of a local directory or model id; OSError if there is none."""
    processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
    config = processor.to_dict()
    _check_sizes(name, config)
    if config.get("resample") in _ONLY_IN_PILLOW:
        # transformers resizes with torchvision by default, which fails for these filters.
        processor = transformers.AutoImageProcessor.from_pretrained(name, trust_remote_code=False, **_pillow_backend())
        logger.warning("%s resizes images with a filter that only Pillow has: its processor runs on Pillow", name)
    return processor


def _pillow_backend() -> dict[str, Any]:
    """Return the arguments that select Pillow and NumPy; later releases of transformers 5 have named backends."""
    named = importlib.util.find_spec("transformers.image_processing_backends") is not None
    return {"backend": "pil"} if named else {"use_fast": False}


def _if_channels_match(preprocessing: VisionPreprocessing, channels: int, name: str) -> VisionPreprocessing | None:
    if preprocessing.channels == channels:
        return preprocessing
    logger.warning(
        "%s takes images of %d channels, its image processor makes %d: calibrate it on tensors (.npz, .safetensors)",
        *(name, channels, preprocessing.channels),
    )
    return None


def _check_sizes(name: str, config: Mapping[str, Any]) -> None:
    """Raise UserError if the processor would make larger images than any network takes."""
    for key, value in config.items():
        if isinstance(value, Mapping):
            _check_sizes(name, value)
        numbers = value if isinstance(value, list | tuple) else [value]
        numbers = [n for n in numbers if isinstance(n, int | float) and not isinstance(n, bool)]
        if key.endswith(("size", "edge", "height", "width", "multiple_of", "divisor", "crop_pct")):
            least = _LEAST_CROP if key == "crop_pct" else 0
            wrong = next((n for n in numbers if not math.isfinite(n) or not least <= n <= _MOST_PIXELS), None)
            if wrong is not None:
                raise UserError(
                    f"the image processor of {name} has {key} {str(wrong)[:40]}: correct it to a value "
                    f"from {least} to {_MOST_PIXELS}"
                )


def _inspect_processor(
    processor: Any, arguments: Mapping[str, inspect.Parameter], size: tuple[int, int]
) -> ProcessorPreprocessing:
    """Return the preprocessing of ``processor``, with the shapes that it makes of a few images.

    Args:
        arguments: of the network's forward.
        size: height and width in the network's configuration.
    """
    features = processor(images=Image.new("RGB", _PROBES[0]), return_tensors="pt")
    kind = type(processor).__name__
    pixels = features.get(IMAGE_INPUT)
    if pixels is None or getattr(pixels, "ndim", 0) != 4 or len(pixels) != 1:
        shape = "nothing" if pixels is None else f"shape {tuple(getattr(pixels, 'shape', ()))}"
        raise UserError(f"{kind} returns {IMAGE_INPUT} of {shape} for an image: (1, channels, height, width) is needed")
    others = [n for n in features if n != IMAGE_INPUT and n in arguments]
    needed = [n for n in others if not n.endswith("mask") and arguments[n].default is inspect.Parameter.empty]
    if needed:
        raise UserError(f"{kind} returns {needed[0]} next to {IMAGE_INPUT}: networks that need both are not supported")
    masks = tuple(name for name in others if name.endswith("mask"))
    preprocessing = ProcessorPreprocessing(processor, IMAGE_INPUT, pixels.shape[1], size, fixed=False, masks=masks)
    shapes = [preprocessing.shape_of(*probe) for probe in _PROBES]
    sample = shapes[0] if shapes[0] == shapes[1] else preprocessing.shape_of(size[1], size[0])
    return replace(preprocessing, size=sample, fixed=len(set(shapes)) == 1)
