"""A real network of its own kind: a timm ViT with a convolutional decoder, as a user would bring it."""

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import optin_deploy
from optin_deploy import ImagePreprocessing, Network

SIZE = 224


class SaliencyNet(nn.Module):
    """DINOv2 ViT-S/14 and a decoder of three transposed convolutions; gives a map ``(batch, 1, 224, 224)`` in 0…1."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = timm.create_model("vit_small_patch14_dinov2", img_size=SIZE, num_classes=0, global_pool="")
        widths = (384, 256, 128, 64)
        layers: dict[str, nn.Module] = {}
        for i in range(3):
            layers[f"upconv{i + 1}"] = nn.ConvTranspose2d(widths[i], widths[i + 1], 4, stride=2, padding=1)
            layers[f"bn{i + 1}"] = nn.BatchNorm2d(widths[i + 1])
        layers["final_conv"] = nn.Conv2d(widths[-1], 1, 1)
        self.decoder = nn.ModuleDict(layers)

    def forward(self, image: Tensor) -> Tensor:
        tokens = self.backbone(image)[:, 1:]
        x = tokens.transpose(1, 2).reshape(-1, 384, SIZE // 14, SIZE // 14)
        for i in range(1, 4):
            x = F.relu(self.decoder[f"bn{i}"](self.decoder[f"upconv{i}"](x)))
        x = F.interpolate(self.decoder["final_conv"](x), size=(SIZE, SIZE), mode="bilinear", align_corners=False)
        return torch.sigmoid(x)


def saliency_network(data_root: Path) -> Network:
    """The trained network, ready to prune."""
    module = SaliencyNet()
    weights = load_file(data_root / "vit_small_saliency" / "model.safetensors")
    module.load_state_dict({name: t.float() if t.is_floating_point() else t for name, t in weights.items()})
    preprocessing = ImagePreprocessing("image", (SIZE, SIZE), crop_pct=1.0)
    inputs = {"image": torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))}
    return optin_deploy.custom_network(module, inputs, preprocessing=preprocessing)


@torch.inference_mode()
def map_agreement(dense: nn.Module, pruned: nn.Module, batches: list[dict[str, Tensor]]) -> tuple[float, float]:
    """Mean over pictures of the correlation, and of the absolute difference, of the two maps."""
    correlations, differences = [], []
    for batch in batches:
        a, b = dense(**batch).flatten(1), pruned(**batch).flatten(1)
        correlations += [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(a, b, strict=True)]
        differences += (a - b).abs().mean(1).tolist()
    return sum(correlations) / len(correlations), sum(differences) / len(differences)
