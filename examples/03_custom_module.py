"""Prune a module of your own, save it, load it into a fresh module, and export it.

python examples/03_custom_module.py
"""

from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor, nn

import optin_deploy


class Forecaster(nn.Module):
    """A small transformer for time series: ``(batch, steps, channels)`` to a forecast ``(batch, channels)``."""

    def __init__(self, channels: int = 8, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(channels, width)
        layer = nn.TransformerEncoderLayer(width, nhead=8, dim_feedforward=4 * width, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.forecast = nn.Linear(width, channels)

    def forward(self, series: Tensor) -> Tensor:
        return self.forecast(self.encoder(self.embed(series))[:, -1])


def main() -> None:
    """Prune a `Forecaster` to 0.6 of its FLOPs."""
    torch.manual_seed(0)
    module = Forecaster().eval()
    network = optin_deploy.custom_network(module, {"series": torch.randn(2, 24, 8)}, logits="output", head="regression")
    # Your calibration batches, by the argument names of forward. No labels are needed.
    batches = [{"series": torch.randn(32, 24, 8)} for _ in range(4)]

    pruned = optin_deploy.prune(network, batches, flops=0.6)
    print(pruned)

    with TemporaryDirectory() as folder:
        # The checkpoint holds weights and what was kept; your code builds the dense module.
        optin_deploy.save(pruned.network, pruned.plan, Path(folder, "smaller"))
        smaller = optin_deploy.load(Path(folder, "smaller"), module=Forecaster().eval())
        series = batches[0]["series"]
        assert torch.allclose(smaller(series), pruned.network.module(series), atol=1e-5)

        # The ONNX file is compared with torch; it is not written if they differ.
        print(optin_deploy.export_onnx(pruned.network, Path(folder, "smaller.onnx")))


if __name__ == "__main__":
    main()
