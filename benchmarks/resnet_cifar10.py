"""The CIFAR-10 ResNets of He et al. (2016), section 4.2, trained, and the CIFAR-10 images.

    python benchmarks/resnet_cifar10.py --data-root ../shared/data

prints the dense top-1. The images are read from their archive once and kept, decoded, in a cache folder.

The archive holds JPEGs of quality 75 with colours at half resolution, not the images the networks were trained on, and
the dense top-1 on them is far below the published one: compare a pruned network with the dense one measured here.
"""

import io
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

import optin_deploy
from optin_deploy import ImagePreprocessing, Network
from optin_deploy.utils.atomic_files import atomic_directory

Split = Literal["train", "test"]

CACHE = Path("~/.cache/optin-deploy-benchmarks").expanduser()
CLASSES = 10
SIZE = 32
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_WIDTHS = (16, 32, 64)


class Shortcut(nn.Module):
    """Option A: without weights, every ``stride``-th pixel, with channels of zeros on both sides."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.each_side = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        pixels = x[:, :, :: self.stride, :: self.stride]
        return F.pad(pixels, (0, 0, 0, 0, self.each_side, self.each_side))


class Block(nn.Module):
    """Two 3×3 convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else Shortcut(inputs, outputs, stride)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.shortcut(x) + self.bn2(self.conv2(inner)))


class CifarResNet(nn.Module):
    """6n + 2 layers in three stages of n blocks, 16, 32 and 64 channels wide; ``(batch, 3, 32, 32)`` to 10 logits."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks, rest = divmod(depth - 2, 6)
        if rest or blocks < 1:
            raise ValueError(f"a CIFAR ResNet has 6n + 2 layers, not {depth}")
        self.conv1 = nn.Conv2d(3, _WIDTHS[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(_WIDTHS[0])
        self.layer1 = _stage(_WIDTHS[0], _WIDTHS[0], blocks, 1)
        self.layer2 = _stage(_WIDTHS[0], _WIDTHS[1], blocks, 2)
        self.layer3 = _stage(_WIDTHS[1], _WIDTHS[2], blocks, 2)
        self.linear = nn.Linear(_WIDTHS[2], CLASSES)

    def forward(self, image: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(image)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(inputs: int, outputs: int, blocks: int, stride: int) -> nn.Sequential:
    first = Block(inputs, outputs, stride)
    return nn.Sequential(first, *(Block(outputs, outputs, 1) for _ in range(blocks - 1)))


def cifar_network(data_root: Path, depth: int) -> Network:
    """The trained network of 20 or 56 layers, ready to prune."""
    module = CifarResNet(depth)
    weights = load_file(data_root / "resnet_cifar10" / f"resnet{depth}.safetensors")
    # The files lack the counters of batches tracked, which a network in eval mode does not use.
    own = {name: t for name, t in module.state_dict().items() if name.endswith("num_batches_tracked")}
    module.load_state_dict({**own, **{n: t.float() if t.is_floating_point() else t for n, t in weights.items()}})
    preprocessing = ImagePreprocessing("image", (SIZE, SIZE), MEAN, STD, crop_pct=1.0)
    inputs = {"image": torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))}
    return optin_deploy.custom_network(module, inputs, logits="output", preprocessing=preprocessing)


def cifar_images(data_root: Path, split: Split, cache: Path = CACHE) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
    """Images ``(N, 32, 32, 3)`` and their labels ``(N,)``, in the archive's order of names; decoded once to ``cache``.

    "train" has 50,000 images, "test" 5,000. Labels are numbered in the order of the classes' names.
    """
    folder = cache / "cifar10"
    if not folder.is_dir():
        _decode(data_root / "cifar10.tar.xz", folder)
    with np.load(folder / f"{split}.npz") as arrays:
        return arrays["images"], arrays["labels"]


def _decode(archive: Path, folder: Path) -> None:
    """Write train.npz and test.npz into ``folder``, which appears whole or not at all."""
    images: dict[tuple[str, str, str], NDArray[np.uint8]] = {}
    with tarfile.open(archive, "r:xz") as tar:
        for member in tar:
            if member.isfile() and member.name.endswith(".jpg"):
                split, label, name = member.name.split("/")[-3:]
                content = tar.extractfile(member)
                assert content is not None
                with Image.open(io.BytesIO(content.read())) as picture:
                    images[split, label, name] = np.asarray(picture.convert("RGB"))
    classes = sorted({label for _, label, _ in images})
    with atomic_directory(folder) as directory:
        for wanted in ("train", "test"):
            keys = sorted(key for key in images if key[0] == wanted)
            labels = np.array([classes.index(label) for _, label, _ in keys])
            np.savez(directory / f"{wanted}.npz", images=np.stack([images[key] for key in keys]), labels=labels)


def batches(images: NDArray[np.uint8], size: int) -> Iterator[dict[str, Tensor]]:
    """Normalised inputs for `cifar_network`, ``size`` images at a time: what its preprocessing gives for them."""
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    for start in range(0, len(images), size):
        pixels = torch.from_numpy(images[start : start + size]).permute(0, 3, 1, 2)
        yield {"image": (pixels / 255 - mean) / std}


@torch.inference_mode()
def top1(module: nn.Module, images: NDArray[np.uint8], labels: NDArray[np.int64], size: int = 250) -> float:
    """Accuracy in per cent; runs on the device of ``module``."""
    device = next(module.parameters()).device
    predicted = [module(batch["image"].to(device)).argmax(1).cpu() for batch in batches(images, size)]
    return 100 * float((torch.cat(predicted) == torch.from_numpy(labels)).float().mean())


def main() -> None:
    """Print the dense top-1 of both networks."""
    import common

    arguments = common.parser(__doc__ or "")
    arguments.add_argument("--cache", type=Path, default=CACHE, help="folder for the decoded images")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    images, labels = cifar_images(given.data_root, "test", given.cache)
    for depth in (20, 56):
        print(f"ResNet-{depth}: {top1(cifar_network(given.data_root, depth).module, images, labels):.2f} %", flush=True)


if __name__ == "__main__":
    main()
