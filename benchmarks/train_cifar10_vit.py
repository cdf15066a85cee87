"""Trains the vision transformer of the accuracy benchmark: DeiT-Tiny's blocks on 32×32 images in patches of 4×4.

    python benchmarks/train_cifar10_vit.py --data-root ../shared/data --output cifar10_vit.safetensors

The schedule is over when ``--seconds`` are. Wanted are 90 % of the test images, to make it a case of the accuracy
benchmark; 150 s of an H200 that tests ran on as well were 73 epochs, and 79.0 %.
Recipe after DeiT (Touvron et al., 2021, table 9): AdamW, cosine, label smoothing, mixup or cutmix, and TrivialAugment
in the place of RandAugment.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import timm
import torch
import torch.nn.functional as F
from resnet_cifar10 import CLASSES, MEAN, SIZE, STD, cifar_images
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torchvision.transforms import v2

from optin_deploy.utils.atomic_files import write_tensors

PATCH = 4
ARGUMENTS = {"img_size": SIZE, "patch_size": PATCH, "num_classes": CLASSES}
"""What `timm.create_model("deit_tiny_patch16_224")` is given."""
_RATE, _DECAY, _WARMUP, _SMOOTHING, _AVERAGED = 1e-3, 0.05, 0.04, 0.1, 0.999
# All images of a chunk are augmented alike, which is far faster; those of a batch are of many chunks.
_CHUNK = 400


def build() -> nn.Module:
    """The network, not trained."""
    return timm.create_model("deit_tiny_patch16_224", **ARGUMENTS)


def normalised(images: Tensor) -> Tensor:
    """Network inputs of ``(n, 3, 32, 32)`` bytes."""
    mean, std = (torch.tensor(v, device=images.device).view(1, 3, 1, 1) for v in (MEAN, STD))
    return (images.float() / 255 - mean) / std


def epoch(images: Tensor, labels: Tensor, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Augmented inputs and soft labels, in batches of ``size``."""
    alike = v2.Compose([v2.RandomHorizontalFlip(), v2.RandomCrop(SIZE, padding=4), v2.TrivialAugmentWide()])
    ways = [v2.CutMix(num_classes=CLASSES), v2.MixUp(alpha=0.8, num_classes=CLASSES), _one_hot]
    mixed = v2.RandomChoice(ways, p=[0.4, 0.2, 0.4])
    first, then = (torch.randperm(len(images), device=images.device) for _ in range(2))
    augmented = torch.cat([alike(chunk) for chunk in images[first].split(_CHUNK)])
    for batch in then[: len(images) - len(images) % size].split(size):
        yield mixed(normalised(augmented[batch]), labels[first[batch]])


def _one_hot(inputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    return inputs, F.one_hot(labels, CLASSES).float()


def rate_at(progress: float) -> float:
    """Learning rate after the part ``progress`` of the time."""
    warm = min(1.0, progress / _WARMUP)
    return _RATE * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train(images: Tensor, labels: Tensor, seconds: float, size: int) -> tuple[nn.Module, int]:
    """The average of the last steps' weights, and how many epochs were trained."""
    model = build().to(images.device)
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(_AVERAGED))
    step_of = torch.compile(model) if images.is_cuda else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=_RATE, weight_decay=_DECAY, fused=images.is_cuda)
    model.train()
    # Compiling is not to take of the schedule's time.
    with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
        step_of(normalised(images[:size])).sum().backward()
    start, epochs = perf_counter(), 0
    while (progress := (perf_counter() - start) / seconds) < 1:
        for inputs, targets in epoch(images, labels, size):
            optimizer.param_groups[0]["lr"] = rate_at((perf_counter() - start) / seconds)
            with torch.autocast("cuda", torch.bfloat16, enabled=images.is_cuda):
                logits = step_of(inputs)
            loss = F.cross_entropy(logits.float(), targets, label_smoothing=_SMOOTHING)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            average.update_parameters(model)
        epochs += 1
        print(f"epoch {epochs}, {progress:.0%} of the time, loss {loss.item():.3f}", flush=True)
    return average.module.eval(), epochs


@torch.inference_mode()
def top1(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Correct answers in per cent."""
    predicted = torch.cat([model(normalised(some)).argmax(1) for some in images.split(500)])
    return 100 * float((predicted == labels).float().mean())


def main() -> None:
    made = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--data-root", type=Path, default=Path("../shared/data"))
    made.add_argument("--output", type=Path, required=True)
    made.add_argument("--device", default="cuda")
    made.add_argument("--seconds", type=float, default=180.0)
    made.add_argument("--batch", type=int, default=500)
    made.add_argument("--images", type=int, default=50_000, help="of the training set; fewer for a trial")
    given = made.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")

    def placed(split: str, most: int) -> tuple[Tensor, Tensor]:
        images, labels = cifar_images(given.data_root, split)  # type: ignore[arg-type]
        pixels = torch.from_numpy(images[:most]).permute(0, 3, 1, 2).contiguous()
        return pixels.to(given.device), torch.from_numpy(labels[:most]).to(given.device)

    model, epochs = train(*placed("train", given.images), given.seconds, given.batch)
    weights = {name: tensor.half().contiguous().cpu() for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    accuracy = top1(model.float(), *placed("test", given.images))
    given.output.parent.mkdir(parents=True, exist_ok=True)
    write_tensors(given.output, weights)
    print(f"{epochs} epochs, top-1 on the test images {accuracy:.2f} %")


if __name__ == "__main__":
    main()
