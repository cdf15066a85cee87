"""Pictures of dense predictions: what both networks give for some images that were not calibrated on.

A map ``(batch, 1, height, width)`` is drawn by its values, one of class logits ``(batch, classes, height, width)`` by
the most likely class of every pixel.
"""

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from optin_deploy.data.preprocessing import PicturePreprocessing
from optin_deploy.network import Network

MOST = 4
# Of the longer side, in pixels: four samples then add some 100 kB to a report.
_EDGE = 192
_FEWEST_PIXELS = 8
_VALUES, _CLASSES = "viridis", "tab20"


@dataclass(frozen=True)
class Picture:
    """One sample of one output: PNG files in base64. ``image`` is what went in, None where that is no picture."""

    output: str
    image: str | None
    dense: str
    pruned: str


def is_map(network: Network, name: str, output: Tensor) -> bool:
    """Whether an output is drawn: one value, or the logits of classes, for each pixel of a map. Of several answers for
    each pixel (a yes or no for every label) no picture shows all."""
    if output.dim() != 4 or min(output.shape[2:]) < _FEWEST_PIXELS:
        return False
    return output.shape[1] == 1 or (name == network.logits and network.head == "classes")


@torch.no_grad()
def pictures(network: Network, pruned: nn.Module, batches: Sequence[Mapping[str, Tensor]]) -> list[Picture]:
    """Of the first `MOST` samples, every output that is a map; none where there are no maps."""
    found: list[Picture] = []
    left = MOST
    for batch in batches:
        if left <= 0:
            break
        batch = {name: t[:left] for name, t in batch.items()}
        dense, small = network.forward(batch), network.forward(batch, pruned)
        names = [name for name, y in dense.items() if is_map(network, name, y)]
        size = len(next(iter(batch.values())))
        for sample in range(size if names else 0):
            image = _image(network, batch, sample)
            for name in names:
                pair = _drawn(dense[name][sample], small[name][sample])
                found.append(Picture(name, image, *pair))
        left -= size
    return found


def _drawn(dense: Tensor, pruned: Tensor) -> tuple[str, str]:
    """Both maps ``(channels, height, width)`` of a sample, in the same colours for the same values."""
    if len(dense) > 1:
        palette = matplotlib.colormaps[_CLASSES]
        first, second = (palette(t.argmax(0).cpu().numpy() % palette.N)[..., :3] for t in (dense, pruned))
        return _png(first, nearest=True), _png(second, nearest=True)
    low, high = float(dense.min()), float(dense.max())
    colours = matplotlib.colormaps[_VALUES]
    first, second = (
        colours(((t[0] - low) / max(high - low, 1e-12)).clamp(0, 1).float().cpu().numpy())[..., :3]
        for t in (dense, pruned)
    )
    return _png(first), _png(second)


def _image(network: Network, batch: Mapping[str, Tensor], sample: int) -> str | None:
    """The input as it was before it was normalised."""
    preprocessing = network.preprocessing
    if not isinstance(preprocessing, PicturePreprocessing):
        return None
    return _png(preprocessing.shown(batch[preprocessing.input_name][sample].float().cpu()).numpy())


def _png(pixels: NDArray[np.float64], *, nearest: bool = False) -> str:
    """Colours ``(height, width, 3)``, 0 to 1, as a PNG file in base64, no larger than `_EDGE`."""
    image = Image.fromarray((255 * pixels).round().astype(np.uint8))
    scale = _EDGE / max(image.size)
    if scale < 1:
        width, height = (max(1, round(n * scale)) for n in image.size)
        image = image.resize((width, height), Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")
