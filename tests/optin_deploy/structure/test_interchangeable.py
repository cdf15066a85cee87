"""Modules of which every second unit can be removed, but not any: they stay dense, or are pruned in tuples."""

import re
from collections.abc import Callable
from itertools import pairwise
from math import ceil, floor, gcd
from pathlib import Path

import pytest
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from optin_deploy import export_onnx
from optin_deploy.criteria.registry import Criterion
from optin_deploy.criteria.scoring import Scoring, score
from optin_deploy.errors import UserError
from optin_deploy.latency.block_stacks import block_types, build_stack
from optin_deploy.latency.tables import table_points
from optin_deploy.latency.target import LatencySettings
from optin_deploy.models import checkpoint
from optin_deploy.models.custom import custom_network
from optin_deploy.network import Network
from optin_deploy.pruning.pruner import prune
from optin_deploy.search.costs import flop_costs
from optin_deploy.search.knapsack import candidate_sizes
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import CostModules, Group, Structure, Together
from optin_deploy.structure.masking import mask_units
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network
from optin_deploy.structure.verify import mostly_first, mostly_last

pytestmark = pytest.mark.slow


WIDTH, NEURONS, HEADS, HEAD = 12, 120, 8, 4
Middle = Callable[[Tensor], Tensor]


class FeedForward(nn.Module):
    """Neurons with something of the test's own between the maps."""

    def __init__(self, middle: Middle, outputs: int = NEURONS, neurons: int = NEURONS) -> None:
        super().__init__()
        self.up, self.down, self.middle = nn.Linear(WIDTH, outputs), nn.Linear(neurons, WIDTH), middle

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


def swapped_channels(x: Tensor) -> Tensor:
    pairs = x.unflatten(1, (-1, 2))
    return (pairs * pairs.flip(2).sigmoid()).flatten(1, 2)


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
    "neighbouring channels": (lambda: Bottleneck(swapped_channels), Together(2, False)),
    "ghosts of an odd number": (lambda: Bottleneck(ghosted, 30), Together(2, True)),
    "channels normed by eights": (lambda: Bottleneck(lambda x: F.group_norm(x, x.shape[1] // 8)), Together(8, False)),
    "a quarter of the channels shifted": (lambda: Bottleneck(quarter_of_channels_shifted), Together(4, True)),
}

PLACES = torch.randperm(NEURONS, generator=torch.Generator().manual_seed(3))
LEFT_DENSE: dict[str, Callable[[], nn.Module]] = {
    "flipped": lambda: FeedForward(lambda x: x.relu().flip(-1)),
    "reversed and added": lambda: FeedForward(lambda x: x.relu() + x.flip(-1)),
    "permuted": lambda: FeedForward(lambda x: x.relu()[..., PLACES]),
    "permuted by size": lambda: FeedForward(lambda x: x.relu()[..., PLACES[x.shape[-1] > PLACES]]),
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
    "three heads by turns": lambda: Attention(
        lambda qkv: attended(qkv) * (1 + torch.arange(qkv.shape[2])[:, None, None] % 2), 3
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
    small = slice_network(of.module, structure, plan)
    inputs = {n: torch.randn(t.shape, generator=torch.Generator().manual_seed(1)) for n, t in of.inputs.items()}
    for batch in (of.inputs, inputs):
        with torch.no_grad(), mask_units(of.module, structure, tiny.masks_of(structure, plan)):
            expected = of.forward(batch)["output"]
        with torch.no_grad():
            found = of.forward(batch, small)["output"]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    return small


@pytest.mark.parametrize("name", LEFT_DENSE)
def test_units_that_are_not_interchangeable_stay_dense(name: str) -> None:
    of = network(LEFT_DENSE[name])
    structure = describe(of.module, of.inputs)
    assert structure.groups == ()
    reasons = [left.reason for left in structure.left_dense]
    assert reasons and all("not interchangeable" in r or "channels depend on each other" in r for r in reasons)


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


def structure_of(name: str) -> tuple[Network, Structure]:
    if name not in SEEN:
        of = network(ALL[name])
        SEEN[name] = of, describe(of.module, of.inputs)
    return SEEN[name]


SEEN: dict[str, tuple[Network, Structure]] = {}


def kept_tuples(group: Group) -> st.SearchStrategy[tuple[int, ...]]:
    """Some of the tuples, and none where that may be."""
    which = st.sets(st.integers(0, len(group.tuples) - 1), min_size=group.min_units // group.step)
    return which.map(lambda some: tuple(sorted(unit for i in some for unit in group.tuples[i])))


@pytest.mark.parametrize("name", ALL)
@given(data=st.data())
def test_any_tuples_can_stay(name: str, data: st.DataObject) -> None:
    of, structure = structure_of(name)
    kept = {g.name: data.draw(kept_tuples(g)) for g in structure.groups}
    assert_sliced_equals_masked(of, structure, Plan(kept))


@pytest.mark.parametrize("name", ALL)
def test_networks_in_tuples_are_pruned_saved_and_read(name: str, tmp_path: Path) -> None:
    of, structure = structure_of(name)
    batches = [{n: torch.randn(4, *t.shape[1:]) for n, t in of.inputs.items()} for _ in range(3)]
    pruned = prune(of, batches, 0.6, align=8)
    pruned.plan.check(structure)
    assert any(0 < len(pruned.plan.kept[g.name]) < g.units for g in structure.groups)
    assert 0.45 < pruned.space.costs.of(pruned.plan) / pruned.space.costs.total <= 0.6
    checkpoint.save(pruned.network, pruned.plan, tmp_path / "checkpoint")
    # The user's module is built anew, with other weights.
    fresh = nn.Sequential(*(type(m)(ALL[name]()) if isinstance(m, Block) else ALL[name]() for m in of.module))
    loaded = checkpoint.load(tmp_path / "checkpoint", fresh.eval())
    with torch.no_grad():
        torch.testing.assert_close(loaded(of.inputs["input"]), pruned.network.module(of.inputs["input"]))


@pytest.mark.parametrize("name", ["halves", "pairs", "heads in two groups", "a quarter of the channels shifted"])
def test_tuples_are_exported_and_pruned_again(name: str, tmp_path: Path) -> None:
    of, _ = structure_of(name)
    batches = [{n: torch.randn(4, *t.shape[1:]) for n, t in of.inputs.items()} for _ in range(3)]
    pruned = prune(of, batches, 0.7, align=1, rounds=2)
    pruned.plan.check(describe(of.module, of.inputs))
    file = export_onnx(pruned.network, tmp_path / "pruned.onnx")
    assert file.path.is_file()
    again = prune(pruned.network, batches, 0.8, align=1)
    again.plan.after(pruned.plan).check(describe(of.module, of.inputs))


@pytest.mark.parametrize("criterion", ["trajectory-obs", "trajectory", "magnitude", "random"])
def test_every_criterion_chooses_whole_tuples(criterion: Criterion) -> None:
    of, structure = structure_of("heads in two groups")
    batches = [{"input": torch.randn(4, 5, WIDTH)} for _ in range(2)]
    pruned = prune(of, batches, 0.6, scoring=Scoring(criterion))
    pruned.plan.check(structure)


def test_scores_of_tuples_are_those_of_removing_them_at_once() -> None:
    """Against elimination of the same units by permuted weights, as plain groups of twice the width."""
    of, structure = structure_of("halves")
    batches = [{"input": torch.randn(4, 5, WIDTH)} for _ in range(2)]
    costs = flop_costs(of.module, structure, of.inputs)
    scores = score(of, structure, costs, batches)
    for group in structure.groups:
        found = scores[group.name][torch.tensor(group.tuples)]
        assert torch.equal(found[:, 0], found[:, 1]) and len(found.unique()) == len(found)


def test_a_plan_that_parts_a_tuple_is_refused() -> None:
    _, structure = structure_of("halves")
    name = structure.groups[0].name
    Plan({name: (0, 60)}).check(structure)
    with pytest.raises(UserError, match=r"120 units.* 2 "):
        Plan({name: (0, 61)}).check(structure)


@given(st.sampled_from([2, 3, 4, 5, 8]), st.booleans(), st.integers(2, 40), st.sampled_from([1, 8, 64]))
def test_sizes_and_best_units_are_whole_tuples(size: int, strided: bool, tuples: int, align: int) -> None:
    group = Group("g", "neuron", size * tuples, 1, "o", (), CostModules(), together=Together(size, strided))
    assert sorted(i for units in group.tuples for i in units) == list(range(group.units))
    sizes = candidate_sizes(group, align)
    assert sizes[0] == size and sizes[-1] == group.units and all(n % size == 0 for n in sizes)
    assert group.first(size) == group.tuples[0] and group.first(group.units) == tuple(range(group.units))


def test_latency_tables_hold_sizes_of_whole_tuples() -> None:
    of, structure = structure_of("five chunks rolled")
    kind = block_types(of.module, structure, of.inputs)[0]
    for units, _, sizes in table_points(structure, structure.groups[0], LatencySettings()):
        assert units % 5 == 0
        made, inputs = build_stack(of.module, structure, kind, sizes, 2)
        assert made(**inputs).shape == (2, 5, WIDTH)
    assert re.search(r"5 equal parts", str(kind.describe()))


Boundary = Callable[[int], int]


def boundaries() -> list[Boundary]:
    """Where a part of n units may end, as code puts it: a fraction, rounded in any way, from either end, or a count."""
    found: list[Boundary] = []
    for q in range(2, 9):
        for p in range(1, q):
            if gcd(p, q) == 1:
                found += [
                    lambda n, p=p, q=q: floor(n * p / q),
                    lambda n, p=p, q=q: ceil(n * p / q),
                    lambda n, p=p, q=q: round(n * p / q),
                    lambda n, p=p, q=q: p * (n // q),
                    lambda n, p=p, q=q: min(n, p * ceil(n / q)),
                    lambda n, p=p, q=q: n - p * (n // q),
                ]
    for count in (1, 2, 3, 7, 16):
        found += [lambda n, c=count: min(c, n), lambda n, c=count: max(0, n - c)]
    return found


@pytest.mark.parametrize("units", [*range(2, 34), 48, 64, 96, 100, 384])
def test_one_of_the_trials_moves_every_boundary(units: int) -> None:
    group = Group("g", "neuron", units, 1, "o", (), CostModules())
    trials = [mostly_first(group), mostly_last(group)]
    assert all(0 < len(kept) < units and all(a < b for a, b in pairwise(kept)) for kept in trials)
    for boundary in boundaries():
        if 0 < boundary(units) < units:
            assert any(sum(i < boundary(units) for i in kept) != boundary(len(kept)) for kept in trials)
    for modulus in range(2, max(min(units, 3), min(units - 1, 9))):
        for rest in range(modulus):
            assert any(any((i % modulus == rest) != (n % modulus == rest) for n, i in enumerate(k)) for k in trials)


class Errors(nn.Module):
    """Fails in one of its two layers, which one needs to be found, when that is cut."""

    def __init__(self) -> None:
        super().__init__()
        self.plain, self.odd = (
            Block(FeedForward(F.relu)),
            Block(FeedForward(lambda x: x.unflatten(-1, (8, 15)).flatten(-2))),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.odd(self.plain(x))


def test_the_layer_that_cannot_be_run_is_found() -> None:
    module = tiny.randomised(Errors())
    structure = describe(module, {"x": torch.randn(2, 5, WIDTH)})
    assert [g.name for g in structure.groups] == ["plain.inner"]
    (left,) = structure.left_dense
    assert left.module == "odd.inner" and "the network cannot be run (" in left.reason


class Deep(nn.Module):
    """Layers that make more of every difference, rounding too."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FeedForward(lambda x: (3 * x).sin()) for _ in range(24))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = F.layer_norm(block(x), (WIDTH,))
        return x


def test_rounding_that_adds_up_over_layers_is_no_difference() -> None:
    module = tiny.randomised(Deep(), gain=2.0)
    structure = describe(module, {"x": torch.randn(2, 5, WIDTH)})
    assert len(structure.groups) == 24 and not structure.left_dense


def test_low_precision_is_judged_in_float64() -> None:
    module = tiny.randomised(nn.Sequential(Block(FeedForward(F.relu)), Block(FeedForward(halves)))).bfloat16()
    structure = describe(module, {"input": torch.randn(2, 5, WIDTH, dtype=torch.bfloat16)})
    assert [g.together for g in structure.groups] == [None, Together(2, True)]
    assert next(module.parameters()).dtype == torch.bfloat16


def test_a_small_difference_in_a_large_stream_is_found() -> None:
    class Loud(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = Block(FeedForward(lambda x: x.relu() + 0.3 * x.flip(-1)))

        def forward(self, x: Tensor) -> Tensor:
            return self.block(x) + 1e6

    module = tiny.randomised(Loud())
    assert describe(module, {"x": torch.randn(2, 5, WIDTH)}).groups == ()


def test_nan_of_the_network_passes_and_nan_of_a_cut_does_not() -> None:
    class Padded(nn.Module):
        """Gives NaN and infinity beside, as logits of what is masked."""

        def __init__(self, middle: Middle) -> None:
            super().__init__()
            self.block = Block(FeedForward(middle))

        def forward(self, x: Tensor) -> Tensor:
            given = self.block(x)
            beside = given[..., :1]
            return torch.cat([given, beside.abs() * -torch.inf, beside * torch.nan], -1)

    inputs = {"x": torch.randn(2, 5, WIDTH)}
    assert len(describe(tiny.randomised(Padded(F.relu)), inputs).groups) == 1
    broken = Padded(lambda x: x.relu() if x.shape[-1] == NEURONS else x * torch.nan)
    assert describe(tiny.randomised(broken), inputs).groups == ()


def test_the_group_is_found_though_outputs_are_decisions() -> None:
    class Deciding(nn.Module):
        def __init__(self, middle: Middle) -> None:
            super().__init__()
            self.block = Block(FeedForward(middle))

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            given = self.block(x)
            return {"classes": given.argmax(-1), "above": given > 0}

    inputs = {"x": torch.randn(2, 5, WIDTH)}
    assert len(describe(tiny.randomised(Deciding(F.relu)), inputs).groups) == 1
    assert describe(tiny.randomised(Deciding(lambda x: x.relu().flip(-1))), inputs).groups == ()
