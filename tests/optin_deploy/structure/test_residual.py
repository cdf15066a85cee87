from dataclasses import replace

import pytest
import tiny
import torch
from timm.layers import LayerScale
from timm.models.vision_transformer import ResPostBlock
from torch import Tensor, nn

from optin_deploy.nn.calls import trace_calls
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Stream
from optin_deploy.structure.residual import residual_stream, stream_scale, stream_shift

pytestmark = pytest.mark.slow


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
    found = residual_stream(trace_calls(module, {"input": torch.randn(2, 3, 4)}), "0", "0.linear")
    assert found.shortcut is None
    assert found.norm is None
    assert not found.in_place
    return found.residual, found.scale


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


def test_a_norm_after_the_projection_hides_the_stream() -> None:
    network = tiny.vit(block_fn=ResPostBlock)
    groups = describe(network.module, network.inputs).groups
    assert [(g.stream.residual, g.stream.scale) for g in groups] == [(None, None)] * 6


def test_small_layer_scales_are_found() -> None:
    network = tiny.vit(init_values=1.0)
    for name, parameter in network.module.named_parameters():
        if name.endswith("gamma"):
            parameter.data.fill_(1e-4)
    groups = describe(network.module, network.inputs).groups
    assert [g.stream.scale for g in groups[:3]] == ["blocks.0.ls1.gamma"] * 2 + ["blocks.0.ls2.gamma"]
    streams = ["blocks.0", "blocks.0", "blocks.0.norm2", "blocks.1", "blocks.1", "blocks.1.norm2"]
    assert [g.stream.residual for g in groups] == streams


def test_an_addition_in_place_is_marked() -> None:
    class InPlace(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            update = self.linear(x)
            update += x
            return update

    calls = trace_calls(tiny.randomised(nn.Sequential(InPlace())), {"input": torch.randn(5, 4)})
    assert residual_stream(calls, "0", "0.linear") == Stream("0", in_place=True)


@pytest.mark.parametrize("name", tiny.CNN_NAMES)
@torch.no_grad()
def test_scale_and_shift_give_the_update_of_the_stream(name: str) -> None:
    module, structure = tiny.network(name).module, tiny.structure(name)
    calls = {call.name: call for call in trace_calls(module, tiny.network(name).inputs)}
    for group in structure.groups:
        scale, shift = stream_scale(module, group), stream_shift(module, group)
        given = calls[group.output].output * scale[:, None, None] + shift[:, None, None]
        torch.testing.assert_close(given, calls[group.stream.norm].output, rtol=1e-5, atol=1e-5)
        if group.stream.known:
            block = structure.blocks[group.layer]
            before = (
                calls[group.stream.residual].input if group.stream.residual else calls[group.stream.shortcut].output
            )
            torch.testing.assert_close((before + given).relu(), calls[block].output, rtol=1e-5, atol=1e-5)


def test_a_norm_of_zeros_hides_the_stream() -> None:
    module = tiny.randomised(tiny.PlainResNet())
    for index in (0, 1):
        nn.init.zeros_(module.blocks[index].bn2.weight)
        nn.init.zeros_(module.blocks[index].bn2.bias)
    groups = describe(module, tiny.images("x")).groups
    assert [g.stream.known for g in groups] == [False, False, True]
    assert [g.stream.norm for g in groups] == [f"blocks.{i}.bn2" for i in range(3)]


def test_scale_and_shift_without_a_batch_norm() -> None:
    module = tiny.network("vit_layer_scale").module
    group = tiny.structure("vit_layer_scale").groups[0]
    assert torch.equal(stream_scale(module, group), module.get_parameter(group.stream.scale))
    assert stream_shift(module, group) is None
    assert stream_scale(tiny.network("vit").module, tiny.structure("vit").groups[0]) is None


def test_a_batch_norm_and_a_layer_scale() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm, self.scale = nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4, affine=False), LayerScale(4, 0.3)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.scale(self.norm(self.conv(x)))

    # Four pixels a row, so that LayerScale takes its factors for those of the last axis.
    module = tiny.randomised(nn.Sequential(Both()))
    calls = trace_calls(module, {"input": torch.randn(2, 4, 4, 4)})
    found = residual_stream(calls, "0", "0.conv")
    assert found == Stream("0", norm="0.norm", scale="0.scale.gamma")


class OwnScale(nn.Module):
    """Multiplies what it adds by a parameter of its own, one factor for each channel of a map."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.GroupNorm(1, 4), nn.Conv2d(4, 4, 1)
        self.bias, self.gamma = nn.Parameter(torch.rand(4)), nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.gamma * self.conv(self.norm(x) + self.bias[:, None, None])


def test_a_scale_among_the_parameters_of_the_block() -> None:
    module = tiny.randomised(nn.Sequential(OwnScale(), nn.Conv2d(4, 4, 1)))
    calls = trace_calls(module, {"input": torch.randn(2, 4, 4, 3)})
    assert residual_stream(calls, "0", "0.conv", 1) == Stream("0", scale="0.gamma")
    group = replace(tiny.structure("vit").groups[0], axis=1, stream=Stream("0", scale="0.gamma"))
    assert torch.equal(stream_scale(module, group), module[0].gamma.flatten())


class FlatNorm(nn.Module):
    """LeViT's kind: a linear layer with a batch norm over all tokens of the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(4, 4), nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        return x + self.norm(y.flatten(0, 1)).reshape_as(y)


def test_a_batch_norm_over_all_tokens() -> None:
    module = tiny.randomised(nn.Sequential(FlatNorm(), nn.Linear(4, 4)))
    module[0].norm.running_mean += 0.3
    calls = trace_calls(module, {"input": torch.randn(2, 5, 4)})
    assert residual_stream(calls, "0", "0.linear") == Stream("0", norm="0.norm")


class Afterwards(nn.Module):
    """What the feed-forward network makes of the projection's output is added to it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.ffn = nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))
        self.dropped = nn.Dropout()

    def forward(self, x: Tensor) -> Tensor:
        x = self.linear(x)
        return x + self.dropped(self.ffn(x))


def test_modules_after_the_output_are_no_shortcut() -> None:
    module = tiny.randomised(nn.Sequential(Afterwards(), nn.Linear(4, 4)))
    calls = trace_calls(module, {"input": torch.randn(2, 5, 4)})
    assert residual_stream(calls, "0", "0.linear") == Stream()
    assert residual_stream(calls, "0", "0.ffn.2") == Stream("0.ffn")
