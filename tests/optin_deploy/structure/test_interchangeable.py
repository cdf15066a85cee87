"""Modules of which every second unit can be removed, but not any: they stay dense, or are pruned in tuples."""

from collections.abc import Callable
from dataclasses import replace
from fractions import Fraction
from math import ceil, floor
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optin_deploy import checkpoint, export_onnx
from optin_deploy.masking import masked
from optin_deploy.network import Network, custom_network
from optin_deploy.plans import Plan
from optin_deploy.pruning import prune
from optin_deploy.slicing import sliced
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Group, Structure, Together
from optin_deploy.structure.trial import mostly_first, mostly_last, uncuttable

WIDTH, NEURONS, HEADS, HEAD = 12, 120, 8, 4
Middle = Callable[[Tensor], Tensor]


class FeedForward(nn.Module):
    """Neurons with something of the test's own between the maps."""

    def __init__(self, middle: Middle, given: int = NEURONS, neurons: int = NEURONS) -> None:
        super().__init__()
        self.up, self.down, self.middle = nn.Linear(WIDTH, given), nn.Linear(neurons, WIDTH), middle

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.middle(self.up(x)))


class Attention(nn.Module):
    """timm's in shape; what is done to ``(3, batch, heads, tokens, width)`` is the test's own."""

    def __init__(self, middle: Middle, heads: int = HEADS, *, head_major: bool = False) -> None:
        super().__init__()
        self.num_heads, self.head_major, self.middle = heads, head_major, middle
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * heads * HEAD), nn.Linear(heads * HEAD, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        if self.head_major:
            qkv = self.qkv(x).unflatten(-1, (self.num_heads, 3, -1)).permute(3, 0, 2, 1, 4)
        else:
            qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        return self.proj(self.middle(qkv).transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.norm, self.inner = nn.LayerNorm(WIDTH), inner

    def forward(self, x: Tensor) -> Tensor:
        return x + self.inner(self.norm(x))


class Bottleneck(nn.Module):
    """Channels of a map, with something of the test's own between the convolutions."""

    def __init__(self, middle: Middle, channels: int = 40) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(6, channels, 3, padding=1), nn.Conv2d(channels, 6, 1)
        self.middle = middle

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(self.middle(self.first(x)))


def network(inner: Callable[[], nn.Module]) -> Network:
    torch.manual_seed(0)
    made = inner()
    if isinstance(made, Bottleneck):
        module = nn.Sequential(made, inner())
        return custom_network(tiny.randomised(module), {"input": torch.randn(2, 6, 5, 6)})
    module = nn.Sequential(Block(made), Block(inner()))
    return custom_network(tiny.randomised(module), {"input": torch.randn(2, 5, WIDTH)})


def halves(x: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return torch.cat([F.gelu(first), second.sin()], dim=-1)


def rolled(x: Tensor) -> Tensor:
    """As in UNeXt's shifted MLP."""
    return torch.cat([c.roll(i - 2, 1) for i, c in enumerate(x.chunk(5, -1))], -1).relu()


def quarter_shifted(x: Tensor) -> Tensor:
    """As a temporal shift; so do AS-MLP and S2-MLP."""
    fold = x.shape[-1] // 4
    x = x.relu()
    return torch.cat([x[..., :fold].roll(1, 1), x[..., fold:]], -1)


def eighths_shifted(x: Tensor) -> Tensor:
    """TSM: an eighth to the left, an eighth to the right."""
    fold = x.shape[-1] // 8
    x = x.relu()
    return torch.cat([x[..., :fold].roll(1, 1), x[..., fold : 2 * fold].roll(-1, 1), x[..., 2 * fold :]], -1)


def last_quarter_linear(x: Tensor) -> Tensor:
    kept = x.shape[-1] // 4
    return torch.cat([x[..., :-kept].relu(), x[..., -kept:]], -1)


def last_linear(count: int) -> Middle:
    return lambda x: torch.cat([x[..., :-count].relu(), x[..., -count:]], -1)


def thirds(x: Tensor) -> Tensor:
    a, b, c = x.tensor_split(3, dim=-1)
    return torch.cat([a.relu(), b.tanh(), c], dim=-1)


def parity(x: Tensor) -> Tensor:
    return torch.stack([x[..., ::2].relu(), x[..., 1::2].sin()], -1).flatten(-2)


def swapped_pairs(x: Tensor) -> Tensor:
    """Neighbours see each other, as in rotary positions."""
    pairs = x.unflatten(-1, (-1, 2))
    return (pairs * pairs.flip(-1).sigmoid()).flatten(-2)


def normed_by_eights(x: Tensor) -> Tensor:
    """A norm over every eight neighbours."""
    return F.layer_norm(x.unflatten(-1, (-1, 8)), (8,)).flatten(-2).relu()


def attended(qkv: Tensor) -> Tensor:
    q, k, v = qkv
    return (q @ k.transpose(-2, -1) * HEAD**-0.5).softmax(-1) @ v


def local_first_half(qkv: Tensor) -> Tensor:
    q, k, v = qkv
    logits = q @ k.transpose(-2, -1)
    near = (torch.arange(5)[:, None] - torch.arange(5)).abs() <= 1
    half = q.shape[1] // 2
    local = logits[:, :half].masked_fill(~near, -1e9)
    return torch.cat([local, logits[:, half:]], 1).softmax(-1) @ v


def unflattened_heads(qkv: Tensor) -> Tensor:
    q, k, v = (part.unflatten(1, (2, -1)) for part in qkv)
    logits = q @ k.transpose(-2, -1) * torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1)
    return (logits.softmax(-1) @ v).flatten(1, 2)


def slopes(qkv: Tensor) -> Tensor:
    q, k, v = qkv
    heads = q.shape[1]
    slope = 2.0 ** (-8 * (torch.arange(heads) + 1) / heads)
    away = -(torch.arange(5)[:, None] - torch.arange(5)).abs()
    return (q @ k.transpose(-2, -1) + slope[:, None, None] * away).softmax(-1) @ v


def head_places(qkv: Tensor) -> Tensor:
    q, k, v = qkv
    return (q @ k.transpose(-2, -1) * (1 + torch.arange(q.shape[1])[:, None, None])).softmax(-1) @ v


def half_pooled(x: Tensor) -> Tensor:
    """As a partial convolution does."""
    first, second = x.relu().split([x.shape[1] // 2, x.shape[1] - x.shape[1] // 2], 1)
    return torch.cat([F.avg_pool2d(first, 3, 1, 1), second], 1)


def ghosted(x: Tensor) -> Tensor:
    """Half of the channels see the other half, as in GhostNet."""
    first, second = x.relu().chunk(2, 1)
    return torch.cat([first, second * F.avg_pool2d(first, 3, 1, 1).sigmoid()], 1)


def shuffled(x: Tensor) -> Tensor:
    return x.relu().unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2)


def quarter_of_channels_shifted(x: Tensor) -> Tensor:
    fold = x.shape[1] // 4
    return torch.cat([x[:, :fold].roll(1, 3), x[:, fold:]], 1).relu()


IN_TUPLES: dict[str, tuple[Callable[[], nn.Module], Together]] = {
    "halves": (lambda: FeedForward(halves), Together(2, True)),
    "five chunks rolled": (lambda: FeedForward(rolled), Together(5, True)),
    "a quarter shifted": (lambda: FeedForward(quarter_shifted), Together(4, True)),
    "eighths shifted": (lambda: FeedForward(eighths_shifted), Together(8, True)),
    "the last quarter linear": (lambda: FeedForward(last_quarter_linear), Together(4, True)),
    "thirds": (lambda: FeedForward(thirds), Together(3, True)),
    "every second neuron": (lambda: FeedForward(parity), Together(2, False)),
    "pairs": (lambda: FeedForward(swapped_pairs), Together(2, False)),
    "eights": (lambda: FeedForward(normed_by_eights), Together(8, False)),
    "halves that gate": (
        lambda: FeedForward(lambda x: torch.cat([(a := x.chunk(2, -1))[0] * a[1].sigmoid(), a[1]], -1)),
        Together(2, True),
    ),
    "local heads first": (lambda: Attention(local_first_half), Together(2, True)),
    "heads in two groups": (lambda: Attention(unflattened_heads), Together(2, True)),
    "half of the channels pooled": (lambda: Bottleneck(half_pooled), Together(2, True)),
    "ghosts": (lambda: Bottleneck(ghosted), Together(2, True)),
    "a quarter of the channels shifted": (lambda: Bottleneck(quarter_of_channels_shifted), Together(4, True)),
}

PLACES = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(3))
LEFT_DENSE: dict[str, Callable[[], nn.Module]] = {
    "flipped": lambda: FeedForward(lambda x: x.relu().flip(-1)),
    "reversed and added": lambda: FeedForward(lambda x: x.relu() + x.flip(-1)),
    "permuted": lambda: FeedForward(lambda x: x.relu()[..., PLACES]),
    "permuted by size": lambda: FeedForward(lambda x: x.relu()[..., PLACES[PLACES < x.shape[-1]]]),
    "summed up": lambda: FeedForward(lambda x: x.relu().cumsum(-1)),
    "scaled by place": lambda: FeedForward(lambda x: x * torch.arange(x.shape[-1]).sin()),
    "less their mean": lambda: FeedForward(lambda x: x.relu() - x.mean(-1, keepdim=True)),
    "softmax": lambda: FeedForward(lambda x: x.softmax(-1)),
    "the largest": lambda: FeedForward(lambda x: x * (x >= x.topk(9, dim=-1).values[..., -1:])),
    "their neighbour": lambda: FeedForward(lambda x: x.relu() + x.roll(1, -1)),
    "the last seven linear": lambda: FeedForward(last_linear(7)),
    "the last one linear": lambda: FeedForward(last_linear(1)),
    "the first one linear": lambda: FeedForward(lambda x: torch.cat([x[..., :1], x[..., 1:].relu()], -1)),
    "shuffled": lambda: FeedForward(lambda x: x.relu().unflatten(-1, (2, -1)).transpose(-2, -1).flatten(-2)),
    "divided by their number": lambda: FeedForward(lambda x: x.relu() / x.shape[-1]),
    "slopes": lambda: Attention(slopes),
    "places of heads": lambda: Attention(head_places),
    "three heads of which one is the middle": lambda: Attention(
        lambda qkv: attended(qkv) * (1 + torch.arange(qkv.shape[2])[:, None, None]), 3
    ),
    "shuffled channels": lambda: Bottleneck(shuffled),
    "flipped channels": lambda: Bottleneck(lambda x: x.relu().flip(1)),
    "rolled channels": lambda: Bottleneck(lambda x: x.relu() + x.roll(2, 1)),
}

IN_A_ROW: dict[str, Callable[[], nn.Module]] = {
    "gates between": lambda: FeedForward(lambda x: x[..., ::2] * x[..., 1::2].sigmoid(), 2 * NEURONS),
    "the larger of two": lambda: FeedForward(lambda x: x.unflatten(-1, (-1, 2)).amax(-1), 2 * NEURONS),
    "heads with their own queries, keys and values": lambda: Attention(attended, head_major=True),
}

AS_EVER: dict[str, Callable[[], nn.Module]] = {
    "plain": lambda: FeedForward(F.gelu),
    "gated": lambda: FeedForward(lambda x: (a := x.chunk(2, -1))[0] * a[1].sigmoid(), 2 * NEURONS),
    "heads": lambda: Attention(attended),
    "channels": lambda: Bottleneck(F.relu),
}


def assert_sliced_equals_masked(of: Network, structure: Structure, plan: Plan) -> nn.Module:
    small = sliced(of.module, structure, plan)
    inputs = {n: torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for n, t in of.inputs.items()}
    for batch in (of.inputs, inputs):
        with torch.no_grad(), masked(of.module, structure, tiny.masks_of(structure, plan)):
            expected = of.forward(batch)["output"]
        with torch.no_grad():
            given = of.forward(batch, small)["output"]
        torch.testing.assert_close(given, expected, rtol=0, atol=1e-5)
    return small


@pytest.mark.parametrize("name", LEFT_DENSE)
def test_units_that_are_not_interchangeable_stay_dense(name: str) -> None:
    of = network(LEFT_DENSE[name])
    structure = describe(of.module, of.inputs)
    assert structure.groups == ()
    reasons = [left.reason for left in structure.left_dense]
    assert reasons and all(
        r.startswith("its units are not interchangeable: ") or r == "its channels do not stay apart" for r in reasons
    )


@pytest.mark.parametrize("name", IN_TUPLES)
def test_units_of_equal_parts_leave_in_tuples(name: str) -> None:
    make, together = IN_TUPLES[name]
    of = network(make)
    structure = describe(of.module, of.inputs)
    assert [g.together for g in structure.groups if g.kind != "width"] == [together] * 2
    assert not structure.left_dense


@pytest.mark.parametrize("name", [*IN_A_ROW, *AS_EVER])
def test_units_that_may_leave_alone_do(name: str) -> None:
    of = network({**IN_A_ROW, **AS_EVER}[name])
    structure = describe(of.module, of.inputs)
    assert len(structure.groups) == 2 and not structure.left_dense
    assert all(g.together is None for g in structure.groups)


ALL = {**{name: make for name, (make, _) in IN_TUPLES.items()}, **IN_A_ROW, **AS_EVER}
