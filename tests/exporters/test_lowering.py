"""What forwards make and do themselves, in half precision: the file loads, agrees with float32 and has no NaN."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, numpy_helper
from torch import Tensor, nn

from exporters import (
    PARITY_TOLERANCES,
    Precision,
    check_parity,
    in_precision,
    onnx_from_program,
    runnable_on_cpu,
    trace,
)

pytestmark = pytest.mark.slow


WIDTH, TOKENS, HEADS = 16, 6, 2
AXES = {"x": {0: "batch"}, "mask": {0: "batch"}}
Forward = Callable[["Net", Tensor, Tensor], Tensor]
_PARTS = 4


class Net(nn.Module):
    """One block of a transformer, whose forward gives what each of some functions makes of it."""

    def __init__(self, forwards: Sequence[Forward]) -> None:
        super().__init__()
        self.embed, self.qkv = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 3 * WIDTH)
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH, eps=1e-12), nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.position, self.gain = nn.Parameter(torch.randn(1, TOKENS, WIDTH)), nn.Parameter(torch.rand(WIDTH) + 0.5)
        self.table = nn.Embedding(TOKENS, WIDTH)
        self.register_buffer("places", torch.arange(TOKENS)[None], persistent=False)
        self.register_buffer("inv_freq", 1.0 / 10000 ** (torch.arange(0, WIDTH // HEADS, 2) / (WIDTH // HEADS)))
        self.register_buffer("causal", torch.full((TOKENS, TOKENS), -1e9).triu(1))
        self.register_buffer("infinite", torch.full((TOKENS, TOKENS), float("-inf")).triu(1))
        self.inner = forwards

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, ...]:
        return tuple(f(self, x, mask) for f in self.inner)

    def heads(self, x: Tensor) -> tuple[Tensor, ...]:
        return tuple(t.unflatten(-1, (HEADS, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))

    def attend(self, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        q, k, v = self.heads(x)
        return (change(q @ k.transpose(-1, -2) / 8**0.5).softmax(-1) @ v).transpose(1, 2).flatten(2)


def _masked(net: Net, x: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    x = net.embed(x)
    return x + net.attend(net.norm(x), change)


def _rotated(net: Net, x: Tensor) -> Tensor:
    angles = torch.arange(1000, 1000 + TOKENS).float()[:, None] * net.inv_freq
    cos, sin = (torch.cat([f(angles)] * 2, -1) for f in (torch.cos, torch.sin))
    q, k, v = net.heads(net.embed(x))
    q, k = (t * cos + torch.cat([-t[..., 4:], t[..., :4]], -1) * sin for t in (q, k))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def _sinusoid(length: int) -> Tensor:
    angles = torch.arange(length, dtype=torch.float32)[:, None] / 10000 ** (torch.arange(0, WIDTH, 2) / WIDTH)
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-2)


def _own_rms(x: Tensor, gain: Tensor) -> Tensor:
    return gain * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-8))


def _own_norm(x: Tensor, gain: Tensor) -> Tensor:
    off = x - x.mean(-1, keepdim=True)
    return gain * off / torch.sqrt((off * off).mean(-1, keepdim=True) + 1e-12)


def _bool(mask: Tensor) -> Tensor:
    return mask[:, None, None] == 0


FORWARDS: dict[str, Forward] = {
    "a norm's weight": lambda n, x, m: F.layer_norm(n.embed(x), (WIDTH,), n.norm.weight, n.norm.bias),
    "a norm's dtype": lambda n, x, m: n.norm(n.embed(x).to(n.norm.weight.dtype)),
    "ones": lambda n, x, m: n.embed(x) * torch.ones(TOKENS, WIDTH),
    "zeros": lambda n, x, m: torch.cat([torch.zeros(x.shape[0], 1, WIDTH), n.embed(x)], 1),
    "zeros of a dtype": lambda n, x, m: n.embed(x) + torch.zeros(WIDTH, dtype=torch.float32),
    "full": lambda n, x, m: n.embed(x) + torch.full((WIDTH,), 0.25),
    "full out of range": lambda n, x, m: _masked(n, x, lambda s: s + torch.full((TOKENS, TOKENS), -1e9).triu(1)),
    "arange": lambda n, x, m: n.embed(x) + torch.arange(WIDTH) / 7,
    "linspace": lambda n, x, m: n.embed(x) + torch.linspace(0, 1, WIDTH),
    "a tensor": lambda n, x, m: n.embed(x) * torch.tensor(0.5),
    "a tensor that is too small": lambda n, x, m: n.norm(n.embed(x) + torch.tensor(1e-8)),
    "a tensor in a list": lambda n, x, m: n.embed(x) * torch.tensor([0.5] * WIDTH),
    "eye": lambda n, x, m: n.embed(x) @ torch.eye(WIDTH),
    "like": lambda n, x, m: torch.cat([torch.ones_like(x[:, :1]), n.embed(x), torch.full_like(x[:, :1], 0.5)], 1),
    "new": lambda n, x, m: n.embed(x) + x.new_full((WIDTH,), 0.5) + n.embed(x).new_ones(WIDTH),
    "sinusoids": lambda n, x, m: n.embed(x) + _sinusoid(2000)[-TOKENS:],
    "rotary": lambda n, x, m: _rotated(n, x),
    "positions": lambda n, x, m: n.embed(x) + n.position,
    "positions, cut": lambda n, x, m: n.embed(x) + n.position[:, : x.shape[1]].expand(x.shape[0], -1, -1),
    "positions, looked up": lambda n, x, m: n.embed(x) + n.table(n.places),
    "a class token": lambda n, x, m: n.norm(torch.cat([n.position[:, :1].expand(x.shape[0], -1, -1), n.embed(x)], 1)),
    "mask times 1e9": lambda n, x, m: _masked(n, x, lambda s: s + (1.0 - m.float())[:, None, None] * -1e9),
    "mask times 1e9, of integers": lambda n, x, m: _masked(n, x, lambda s: s + ((1 - m) * -1e9)[:, None, None]),
    "mask times 1e4": lambda n, x, m: _masked(n, x, lambda s: s + (1.0 - m.float())[:, None, None] * -1e4),
    "mask filled": lambda n, x, m: _masked(n, x, lambda s: s.masked_fill(_bool(m), -1e9)),
    "mask filled, least": lambda n, x, m: _masked(n, x, lambda s: s.masked_fill(_bool(m), torch.finfo(s.dtype).min)),
    "mask filled, infinite": lambda n, x, m: _masked(n, x, lambda s: s.masked_fill(_bool(m), float("-inf"))),
    "mask chosen": lambda n, x, m: _masked(n, x, lambda s: torch.where(_bool(m), torch.tensor(-1e9), s)),
    "mask chosen, a number": lambda n, x, m: _masked(n, x, lambda s: torch.where(_bool(m), -1e30, s)),
    "two masks": lambda n, x, m: _masked(
        n, x, lambda s: s + (1.0 - m.float())[:, None, None] * torch.finfo(torch.float32).min * 0.5 + n.causal
    ),
    "a buffer of masks": lambda n, x, m: _masked(n, x, lambda s: s + n.causal),
    "a buffer of infinite masks": lambda n, x, m: _masked(n, x, lambda s: s + n.infinite),
    "a mask for torch's attention": lambda n, x, m: F.scaled_dot_product_attention(
        *n.heads(n.embed(x)), attn_mask=(1.0 - m[:, None, None].float()) * torch.finfo(torch.float32).min
    ),
    "a boolean mask": lambda n, x, m: F.scaled_dot_product_attention(
        *n.heads(n.embed(x)), attn_mask=m[:, None, None].bool().expand(-1, 1, TOKENS, -1)
    ),
    "weights in float32": lambda n, x, m: (
        torch.softmax(n.embed(x) @ n.embed(x).transpose(1, 2), -1, dtype=torch.float32).to(x.dtype) @ n.embed(x)
    ),
    "float32 inside": lambda n, x, m: n.down(n.up(n.embed(x).to(torch.float32)).float().relu().to(torch.float32)),
    "float64 inside": lambda n, x, m: n.norm(n.embed(x).double().cumsum(1).float()),
    "a float64 constant": lambda n, x, m: n.embed(x) * torch.tensor(0.5, dtype=torch.float64),
    "float64 constants": lambda n, x, m: n.norm((n.embed(x) * torch.linspace(0, 1, WIDTH).double()).float()),
    "integers cast": lambda n, x, m: n.embed(x) * m[:, :, None].float(),
    "integers cast by type": lambda n, x, m: n.embed(x) * m[:, :, None].type_as(x),
    "integers as they are": lambda n, x, m: n.embed(x) * m[:, :, None],
    "mean over the mask": lambda n, x, m: (n.embed(x) * m[:, :, None]).sum(1) / m.sum(1, keepdim=True).clamp(min=1e-9),
    "a large sum": lambda n, x, m: n.norm((n.embed(x) * 1e4 + 2e4).sum(1) / 1e6),
    "a large square": lambda n, x, m: n.norm((1000 * n.embed(x)).square() / 1e6),
    "an own square": lambda n, x, m: _own_norm(1000 * n.embed(x), n.gain),
    "an own root mean square": lambda n, x, m: n.down(n.up(_own_rms(1000 * n.embed(x), n.gain)).relu()),
    "torch's root mean square": lambda n, x, m: F.rms_norm(1000 * n.embed(x), (WIDTH,), n.gain, 1e-8),
    "an exponential": lambda n, x, m: n.norm((12 + n.embed(x)).exp().log()),
    "an own softmax": lambda n, x, m: _masked(n, 9 * x, lambda s: s.exp() / s.exp().sum(-1, keepdim=True)),
    "unit length": lambda n, x, m: F.normalize(n.embed(x), dim=-1, eps=1e-12),
    "zero of unit length": lambda n, x, m: F.normalize(n.embed(x) * 0, dim=-1, eps=1e-8),
    "a cosine": lambda n, x, m: F.cosine_similarity(n.embed(x)[:, 1:], n.embed(x)[:, :-1], dim=-1),
    "a small epsilon": lambda n, x, m: n.embed(x) / (n.embed(x).std(-1, keepdim=True) + 1e-8),
    "a small bound": lambda n, x, m: n.embed(x).abs().clamp(min=1e-10).log().clamp(-3, 3),
    "a group norm": lambda n, x, m: F.group_norm(300 * n.embed(x).transpose(1, 2), 4, n.gain, None, 1e-12),
    "a batch norm": lambda n, x, m: F.batch_norm(n.embed(x).transpose(1, 2), n.gain, n.gain.square() + 0.1, n.gain),
    "an instance norm": lambda n, x, m: F.instance_norm(300 * n.embed(x).transpose(1, 2)),
    "an own gelu": lambda n, x, m: (
        n.down(0.5 * n.up(90 * x) * (1 + torch.tanh(0.79788456 * (n.up(90 * x) + 0.044715 * n.up(90 * x) ** 3)))) / 90
    ),
    "written in place": lambda n, x, m: _in_place(n, x),
    "a scaled embedding": lambda n, x, m: n.norm(n.table(n.places) * WIDTH**0.5 + n.embed(x)),
    "a norm first": lambda n, x, m: n.up(n.norm(1e6 * x)),
    "einsum": lambda n, x, m: torch.einsum("bnd,bmd->bnm", n.embed(x), n.embed(x)).softmax(-1),
    "pooled": lambda n, x, m: F.adaptive_avg_pool1d(n.embed(x).transpose(1, 2), 1).flatten(1),
    "resized": lambda n, x, m: F.interpolate(n.embed(x).transpose(1, 2), scale_factor=2.0, mode="nearest"),
    "split": lambda n, x, m: torch.cat([t * n.gain[:8] for t in n.embed(x).split(8, -1)], -1),
    "no autocast": lambda n, x, m: _without_autocast(n, x),
    "the largest": lambda n, x, m: n.embed(x).topk(3, dim=-1).values,
    "gathered": lambda n, x, m: n.embed(x).gather(1, m[:, :1, None].expand(-1, 1, WIDTH)),
}


def _in_place(net: Net, x: Tensor) -> Tensor:
    y = torch.zeros(x.shape[0], TOKENS, WIDTH)
    y[:, 1:] += net.embed(x)[:, 1:]
    z = net.embed(x)
    z[:, 0] = 0
    return y + z.masked_fill_(z > 1e9, -1e9)


def _without_autocast(net: Net, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return net.norm(net.embed(x)) + torch.ones(WIDTH)


def batch(size: int) -> dict[str, Tensor]:
    mask = torch.ones(size, TOKENS, dtype=torch.int64)
    mask[1:, -2:] = 0
    return {"x": torch.randn(size, TOKENS, WIDTH, generator=torch.Generator().manual_seed(size)), "mask": mask}


def network(*forwards: Forward) -> nn.Module:
    torch.manual_seed(0)
    return Net(forwards).eval()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("part", range(_PARTS))
def test_what_a_forward_does_itself(part: int, precision: Precision, tmp_path: Path) -> None:
    names, path = tuple(FORWARDS)[part::_PARTS], tmp_path / "net.onnx"
    module = network(*(FORWARDS[name] for name in names))
    program = in_precision(trace(module, batch(2), AXES), precision, 20)
    onnx_from_program(program, path, output_names=names, dynamic_axes=AXES)
    with runnable_on_cpu(path, precision) as file:
        rows = check_parity(module, file, [batch(1), batch(4)], names, PARITY_TOLERANCES[precision], threads=1)
    assert not [row for row in rows if not row.passed]
    with torch.no_grad():
        given, expected = program.module()(**batch(3)), module(**batch(3))
    for name, ours, theirs in zip(names, given, expected, strict=True):
        most = PARITY_TOLERANCES[precision] * max(1.0, float(theirs.abs().max()))
        torch.testing.assert_close(ours, theirs, rtol=0, atol=most, msg=name)
    _check_range(onnx.load(path), precision)


def _check_range(model: onnx.ModelProto, precision: Precision) -> None:
    """No constant of the low type is infinite, but where forward says so."""
    kind = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}[precision]
    constants = [a.t for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    for tensor in (*model.graph.initializer, *constants):
        if tensor.data_type == kind:
            assert not np.isnan(numpy_helper.to_array(tensor).astype(np.float32)).any()
