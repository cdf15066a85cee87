import pytest
import tiny
import torch
from timm.layers import LayerScale
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from optin_deploy.structure.describe import describe
from optin_deploy.structure.residual import first_tensor, residual_stream, trial_forward


class PreNorm(nn.Module):
    def __init__(self, scale: nn.Module) -> None:
        super().__init__()
        self.norm, self.linear, self.scale, self.after = nn.LayerNorm(4), nn.Linear(4, 4), scale, nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.after(x + self.scale(self.linear(self.norm(x))))


class PostNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x) + x)


class Halved(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x


def stream(block: nn.Module) -> tuple[str | None, str | None]:
    module = tiny.randomised(nn.Sequential(block))
    return residual_stream(trial_forward(module, {"input": torch.randn(2, 3, 4)}), "0", "0.linear")


@pytest.mark.parametrize(
    ("block", "expected"),
    [
        (PreNorm(nn.Identity()), ("0", None)),
        (PreNorm(LayerScale(4, 0.1)), ("0", "0.scale.gamma")),
        (PreNorm(LayerScale(4, 1e-5)), ("0", "0.scale.gamma")),
        (PreNorm(nn.LayerNorm(4)), (None, None)),
        (PreNorm(nn.RMSNorm(4)), (None, None)),
        (PreNorm(Halved()), (None, None)),
        (PostNorm(), ("0", None)),
    ],
)
def test_streams_of_small_blocks(block: nn.Module, expected: tuple[str | None, str | None]) -> None:
    assert stream(block) == expected


def test_a_projection_without_a_residual_has_no_stream() -> None:
    class Plain(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)

        def forward(self, x: Tensor) -> Tensor:
            return self.norm(self.linear(x))

    assert stream(Plain()) == (None, None)


def test_a_norm_behind_the_projection_hides_the_stream() -> None:
    network = tiny.vit(block_fn=ResPostBlock)
    groups = describe(network.module, network.inputs).groups
    assert [(g.residual, g.scale) for g in groups] == [(None, None)] * 4


def test_small_layer_scales_are_found() -> None:
    network = tiny.vit(init_values=1.0)
    for name, parameter in network.module.named_parameters():
        if name.endswith("gamma"):
            parameter.data.fill_(1e-4)
    groups = describe(network.module, network.inputs).groups
    assert [g.scale for g in groups[:2]] == ["blocks.0.ls1.gamma", "blocks.0.ls2.gamma"]
    assert [g.residual for g in groups] == ["blocks.0", "blocks.0.norm2", "blocks.1", "blocks.1.norm2"]


def test_trial_forward_in_the_order_calls_end() -> None:
    module = nn.Sequential(nn.Linear(2, 3), nn.Sequential(nn.ReLU()))
    x = torch.randn(1, 2)
    calls = trial_forward(module, {"input": x})
    assert [c.name for c in calls] == ["0", "1.0", "1"]
    assert calls[0].given is x
    assert calls[0].returned is calls[1].given
    assert not any(m._forward_hooks for m in module.modules())


def test_first_tensor() -> None:
    x = torch.ones(1)
    assert first_tensor(x) is x
    assert first_tensor((x, None)) is x
    assert first_tensor([x]) is x
    assert first_tensor((None, x)) is None
    assert first_tensor(()) is None
    assert first_tensor({"a": x}) is None
