"""Example images of dense predictions: outputs of both networks for some held-out samples.

A map ``(batch, 1, height, width)`` is drawn by its values, class logits ``(batch, classes, height, width)`` by the most
likely class of every pixel.
"""

import base64
import io

import matplotlib
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from optin_deploy.data.preprocessing import VisionPreprocessing
from optin_deploy.evaluation.results import ExampleImage
from optin_deploy.network import Network
from optin_deploy.nn.batches import Batch, Batches, batch_size

MOST = 4
# Longer side in pixels: four samples then add about 100 kB to a report.
_EDGE = 192
_FEWEST_PIXELS = 8
_VALUES, _CLASSES = "viridis", "tab20"


def is_map(network: Network, name: str, output: Tensor) -> bool:
    """Whether an output can be drawn: one value, or the logits of classes, for each pixel.

    Several yes/no answers for each pixel do not fit into one image.
    """
    if output.dim() != 4 or min(output.shape[2:]) < _FEWEST_PIXELS:
        return False
    return output.shape[1] == 1 or (name == network.logits and network.head == "classes")


@torch.no_grad()
def draw_examples(network: Network, pruned: nn.Module, batches: Batches) -> list[ExampleImage]:
    """Return an image of every map output for the first `MOST` samples; empty if no output is a map."""
    examples: list[ExampleImage] = []
    left = MOST
    for batch in batches:
        if left <= 0:
            break
        batch = {name: tensor[:left] for name, tensor in batch.items()}
        dense, small = network.forward(batch), network.forward(batch, pruned)
        maps = [name for name, output in dense.items() if is_map(network, name, output)]
        for sample in range(batch_size(batch) if maps else 0):
            image = _draw_input(network, batch, sample)
            for name in maps:
                examples.append(ExampleImage(name, image, *_draw_maps(dense[name][sample], small[name][sample])))
        left -= batch_size(batch)
    return examples


def _draw_maps(dense: Tensor, pruned: Tensor) -> tuple[str, str]:
    """Draw both maps ``(channels, height, width)`` of a sample, with the same colors for the same values."""
    if len(dense) > 1:
        palette = matplotlib.colormaps[_CLASSES]
        first, second = (palette(t.argmax(0).cpu().numpy() % palette.N)[..., :3] for t in (dense, pruned))
        return _png(first, nearest=True), _png(second, nearest=True)
    low, high = float(dense.min()), float(dense.max())
    colors = matplotlib.colormaps[_VALUES]
    first, second = (
        colors(((t[0] - low) / max(high - low, 1e-12)).clamp(0, 1).float().cpu().numpy())[..., :3]
        for t in (dense, pruned)
    )
    return _png(first), _png(second)


def _draw_input(network: Network, batch: Batch, sample: int) -> str | None:
    """Draw an input image as it was before normalisation; None if the input is not an image."""
    preprocessing = network.preprocessing
    if not isinstance(preprocessing, VisionPreprocessing):
        return None
    return _png(preprocessing.to_colors(batch[preprocessing.input_name][sample].float().cpu()).numpy())


def _png(pixels: NDArray[np.float64], *, nearest: bool = False) -> str:
    """Encode colors ``(height, width, 3)``, 0 to 1, as a PNG file in base64, no larger than `_EDGE`."""
    image = Image.fromarray((255 * pixels).round().astype(np.uint8))
    scale = _EDGE / max(image.size)
    if scale < 1:
        width, height = (max(1, round(n * scale)) for n in image.size)
        image = image.resize((width, height), Image.Resampling.NEAREST if nearest else Image.Resampling.BILINEAR)
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return base64.b64encode(file.getvalue()).decode("ascii")
