"""Built-in calibration samples: English sentences, and crops of a photograph."""

from importlib import resources

import numpy as np
from numpy.typing import NDArray
from PIL import Image


def builtin_texts() -> list[str]:
    """Return 256 English sentences of many kinds."""
    return resources.files("optin_deploy.data").joinpath("builtin_sentences.txt").read_text("utf-8").splitlines()


def builtin_images(count: int, seed: int) -> list[Image.Image]:
    """Return random crops of the photograph in matplotlib; every second one is mixed with noise of natural spectrum."""
    import matplotlib.cbook

    with Image.open(matplotlib.cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)) as file:
        photo = file.convert("RGB")
    rng = np.random.default_rng(seed)
    return [_random_crop(photo, rng, noisy=index % 2 == 1) for index in range(count)]


def _random_crop(photo: Image.Image, rng: np.random.Generator, *, noisy: bool) -> Image.Image:
    side = int(rng.integers(96, min(photo.size)))
    left, top = (int(rng.integers(0, extent - side + 1)) for extent in photo.size)
    crop = photo.crop((left, top, left + side, top + side)).resize((256, 256), Image.Resampling.BICUBIC)
    pixels = np.asarray(crop, dtype=np.float64)
    if rng.random() < 0.5:
        pixels = pixels[:, ::-1]
    if noisy:
        pixels = 0.4 * pixels + 0.6 * _natural_noise(rng)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _natural_noise(rng: np.random.Generator) -> NDArray[np.float64]:
    """Return color noise ``(256, 256, 3)``, 0 to 255, whose amplitude falls with 1/frequency as in photographs."""
    frequency = np.hypot(np.fft.fftfreq(256)[:, None], np.fft.rfftfreq(256)[None, :])
    frequency[0, 0] = 1.0
    spectrum = np.fft.rfft2(rng.standard_normal((3, 256, 256))) / frequency
    noise = np.moveaxis(np.fft.irfft2(spectrum), 0, -1)
    return np.asarray(127.5 + 64 * (noise - noise.mean()) / noise.std())
