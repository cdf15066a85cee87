"""A real network of its own kind: a timm ViT with a convolutional decoder, as a user would bring it."""

from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import optin_deploy
from optin_deploy import ImagePreprocessing, Network
from optin_deploy.nn.outputs import named_outputs

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
        a, b = (next(iter(named_outputs(module(**batch)).values())).flatten(1) for module in (dense, pruned))
        correlations += [float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(a, b, strict=True)]
        differences += (a - b).abs().mean(1).tolist()
    return sum(correlations) / len(correlations), sum(differences) / len(differences)


def main() -> None:
    """Prune, export and report the network at ``--flops``; print how its maps on other photographs agree."""
    import common

    arguments = common.parser(main.__doc__ or "")
    arguments.add_argument("--flops", type=float, default=0.6)
    arguments.add_argument("--output", type=Path, default=None)
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    network = saliency_network(given.data_root)
    photos = given.data_root / "photos"
    recipe = optin_deploy.Recipe(model="vit_small_saliency", flops=given.flops, calibration=photos, profile_seconds=3)
    result = optin_deploy.prune_export(recipe, network=network, output=given.output)
    held_out = list(optin_deploy.load_calibration(network, photos).held_out)
    correlation, difference = map_agreement(network.module, result.network.module, held_out)
    for gate in result.report.gates:
        print(f"{gate.name}: {'passed' if gate.passed else 'FAILED'}, {gate.detail}")
    print(f"maps on {sum(len(b['image']) for b in held_out)} held-out photographs: correlation {correlation:.3f}, "
          f"mean absolute difference {difference:.3f}; report in {result.directory}")  # fmt: skip


if __name__ == "__main__":
    main()
