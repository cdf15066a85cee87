import copy
from collections import OrderedDict
from collections.abc import Sequence

import numpy as np
import pytest
import scipy.linalg
import scipy.stats
import timm.layers
import tiny
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from optin_deploy.criteria import packed_symmetric, trajectory_obs
from optin_deploy.criteria.trajectory_loss import LossSettings, Trajectory, differentiable, probe_losses
from optin_deploy.criteria.trajectory_obs import ProbeMoments, eliminate, obs_scores, probe_moments, unit_costs
from optin_deploy.network import Network
from optin_deploy.nn.unfold import weight_matrix
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Group, Structure

pytestmark = pytest.mark.slow


MANIFOLD, FACTOR, SEED = 0.7, 3.0, 5


# ProbeMoments


def in_float64(name: str) -> tuple[Network, Structure]:
    network = tiny.network(name)
    return network.with_module(copy.deepcopy(network.module).double()), tiny.structure(name)


def doubled(batch: tiny.Batch) -> tiny.Batch:
    return {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}


def gradient_at(
    network: Network, structure: Structure, batch: tiny.Batch, group: Group, where: tuple[int, ...], draw: int
) -> Tensor:
    """Gradient of the ``draw``-th probe for what the projection gives at one position, its features last."""

    def add(_: object, __: object, output: Tensor) -> Tensor:
        place = torch.zeros_like(output.movedim(group.axis, -1))
        place[where] = 1.0
        return output + (place * change).movedim(-1, group.axis)

    features = network.module.get_submodule(group.output).weight.shape[0]
    change = torch.zeros(features, dtype=torch.float64, requires_grad=True)
    trajectory = Trajectory(network, structure, batch, SEED)
    handle = network.module.get_submodule(group.output).register_forward_hook(add)
    with differentiable(network):
        blocks, outputs = trajectory.run()
        grams, generator = trajectory.grams(blocks), torch.Generator().manual_seed(SEED)
        for _ in range(draw + 1):
            loss = probe_losses(
                trajectory, grams, outputs, LossSettings(dict.fromkeys(outputs, FACTOR), MANIFOLD), generator
            )
    handle.remove()
    return torch.autograd.grad(loss, change)[0]


def seen_at(network: Network, group: Group, x: Tensor, where: tuple[int, ...]) -> Tensor:
    """What the projection's weights see of its input at one position of the output."""
    if len(where) == 2:
        return x[where]
    conv = network.module.get_submodule(group.output)
    sample, row, column = where
    padded = F.pad(x[sample], (conv.padding[1],) * 2 + (conv.padding[0],) * 2)
    (height, width), (down, right) = conv.kernel_size, conv.stride
    return padded[:, row * down : row * down + height, column * right : column * right + width].reshape(-1)


@pytest.mark.parametrize(("name", "groups"), [("vit", 4), ("bert", 2), ("bert_classifier", 1), ("plain_resnet", 1)])
def test_moments_are_sums_over_positions(name: str, groups: int) -> None:
    network, structure = in_float64(name)
    batch, probes = doubled(tiny.batches(network, 1, size=2)[0]), 2
    if "x" in batch and structure.groups[0].axis == 1:
        batch = {"x": batch["x"][..., :6, :6]}
    factors = dict.fromkeys(network.outputs, FACTOR)
    given = probe_moments(
        network, structure, [batch], LossSettings(factors=factors, manifold=MANIFOLD, seed=SEED), probes=probes
    )
    for group in structure.without_widths().groups[-groups:]:
        seen: list[Tensor] = []
        handle = network.module.get_submodule(group.output).register_forward_hook(
            lambda _, args, y, seen=seen: seen.extend((*args, y))
        )
        with torch.no_grad():
            network.forward(batch)
        handle.remove()
        x, y = seen
        metric, second = 0.0, 0.0
        effects: dict[tuple[int, int], Tensor | float] = {}
        rows = [seen_at(network, group, x, w) for w in np.ndindex(*y.movedim(group.axis, -1).shape[:-1])
                if "attention_mask" not in batch or batch["attention_mask"][w]]  # fmt: skip
        mean, apart = torch.stack(rows).mean(0), 0.0
        weight = network.module.get_submodule(group.output).weight.detach().flatten(1)
        for where in np.ndindex(*y.movedim(group.axis, -1).shape[:-1]):
            if "attention_mask" in batch and not batch["attention_mask"][where]:
                continue
            row = torch.cat([seen_at(network, group, x, where), torch.ones(1)])
            for draw in range(probes):
                g = gradient_at(network, structure, batch, group, where, draw)
                metric = metric + g.outer(g) / probes
                second = second + g.square().sum() * row.outer(row) / probes
                effect = ((row[:-1] - mean) * (g @ weight)).reshape(group.units, -1).sum(1)
                effects[where[0], draw] = effects.get((where[0], draw), 0.0) + effect
                apart = apart + effect.square().sum()
        assert float(metric.trace()) > 0
        torch.testing.assert_close(given[group.name].metric, metric, rtol=1e-9, atol=1e-9 * float(metric.abs().max()))
        found = packed_symmetric.unpack(given[group.name].second, len(second))
        torch.testing.assert_close(found, second, rtol=1e-9, atol=1e-9 * float(second.abs().max()))
        whole = sum(effect.square().sum() for effect in effects.values())
        coherence = float(whole / apart) if group.kind == "channel" else 1.0
        assert given[group.name].coherence == pytest.approx(coherence, rel=1e-9)


class Doubled(nn.Module):
    def __init__(self, in_place: bool) -> None:
        super().__init__()
        self.in_place = in_place

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(2) if self.in_place else x * 2


def test_outputs_may_be_changed_in_place() -> None:
    found = []
    for in_place in (False, True):
        network, structure = copy.deepcopy(tiny.network("vit")), tiny.structure("vit").without_widths()
        for block in network.module.blocks:
            block.attn.proj_drop, block.mlp.drop2 = Doubled(in_place), Doubled(in_place)
        batches = tiny.batches(network, 1)
        factors = dict.fromkeys(network.outputs, FACTOR)
        found.append(probe_moments(network, structure, batches, LossSettings(factors=factors, seed=SEED), probes=1))
    for name, moments in found[0].items():
        torch.testing.assert_close(found[1][name].metric, moments.metric)


@pytest.mark.parametrize("name", ["vit", "bert_classifier", "resnet"])
def test_batches_in_chunks_sum(name: str) -> None:
    network, structure = in_float64(name)
    batch = doubled(tiny.batches(network, 1, size=3)[0])
    arguments = {"probes": 2}
    given = probe_moments(network, structure, [batch], LossSettings(seed=SEED), samples_at_once=2, **arguments)
    pieces = [{n: t[:2] for n, t in batch.items()}, {n: t[2:] for n, t in batch.items()}]
    parts = [
        probe_moments(network, structure, [p], LossSettings(seed=SEED + i), **arguments) for i, p in enumerate(pieces)
    ]
    for name_, moments in given.items():
        for field in ("metric", "second"):
            torch.testing.assert_close(getattr(moments, field), sum(getattr(p[name_], field) for p in parts))


def test_probing_leaves_the_network_as_it_was() -> None:
    network, structure = tiny.network("resnet"), tiny.structure("resnet")
    before = {k: v.clone() for k, v in network.module.state_dict().items()}
    probe_moments(network, structure, tiny.batches(network, 1), LossSettings(factors={}, seed=0), probes=1)
    assert all(torch.equal(before[k], v) for k, v in network.module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in network.module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.module.modules())


def second_moments(rows: np.ndarray, weights: np.ndarray) -> Tensor:
    strips = packed_symmetric.zeros(rows.shape[1], torch.device("cpu"))
    packed_symmetric.add_gram(strips, torch.tensor(rows), torch.tensor(weights))
    return strips


def test_covariance_is_the_weighted_one() -> None:
    generator = np.random.default_rng(0)
    x, weights = generator.normal(size=(30, 4)) + 2, generator.random(30)
    rows = np.hstack([x, np.ones((30, 1))])
    moments = ProbeMoments(second_moments(rows, weights), torch.zeros(1), torch.zeros(1))
    np.testing.assert_allclose(moments.covariance(4), np.cov(x.T, aweights=weights, ddof=0))


# Elimination


class Layer:
    """Rows of activations with weights, a linear layer on them, and a metric of its outputs; all explicit."""

    def __init__(self, units: int, width: int, outputs: int, seed: int = 0, rows: int = 80) -> None:
        generator = np.random.default_rng(seed)
        self.units, self.width = units, width
        features = units * width
        self.x = generator.normal(size=(rows, features)) @ generator.normal(size=(features, features)) + 1
        self.weight, self.root = generator.normal(size=(outputs, features)), generator.normal(size=(outputs, outputs))
        self.row_weights = generator.random(rows)

    def columns(self, units: Sequence[int]) -> list[int]:
        return [u * self.width + i for u in units for i in range(self.width)]

    def refit_loss(self, kept: Sequence[int]) -> float:
        """Weighted mean of the metric of what is left over when weights of the units kept and a bias are fitted."""
        design = np.hstack([self.x[:, self.columns(kept)], np.ones((len(self.x), 1))])
        target = self.x @ self.weight.T
        # One row for each pair of a row of the data and a row of the metric's root.
        scaled = np.sqrt(self.row_weights / self.row_weights.sum())[:, None]
        big, asked = np.kron(design * scaled, self.root.T), ((target * scaled) @ self.root).reshape(-1)
        solution = scipy.linalg.lstsq(big, asked)[0]
        return float(np.square(asked - big @ solution).sum())

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Weight, covariance and metric."""
        covariance = np.atleast_2d(np.cov(self.x.T, aweights=self.row_weights, ddof=0))
        return tuple(torch.tensor(t) for t in (self.weight, covariance, self.root @ self.root.T))


@pytest.mark.parametrize("width", [1, 3])
def test_a_units_cost_is_the_loss_that_refitting_leaves(width: int) -> None:
    layer = Layer(units=4, width=width, outputs=3)
    weight, covariance, metric = layer.tensors()
    given = unit_costs(weight, covariance.inverse(), metric, width)
    expected = [layer.refit_loss([v for v in range(4) if v != u]) for u in range(4)]
    np.testing.assert_allclose(given, expected, rtol=1e-6)


@pytest.mark.parametrize(("width", "seed"), [(1, 0), (1, 1), (2, 2), (3, 3)])
def test_one_at_a_time_is_the_greedy_search(width: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory_obs, "DAMPING", 1e-12)
    layer = Layer(units=6, width=width, outputs=4, seed=seed)
    order, costs = eliminate(*layer.tensors(), width, step=0)
    kept = list(range(6))
    for unit, total in zip(order.tolist(), costs.cumsum(0).tolist(), strict=True):
        losses = {u: layer.refit_loss([v for v in kept if v != u]) for u in kept}
        assert unit == min(losses, key=losses.__getitem__)
        np.testing.assert_allclose(total, losses[unit], rtol=1e-5)
        kept.remove(unit)


@pytest.mark.parametrize("width", [1, 2])
def test_several_at_once_cost_what_they_cost_together(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory_obs, "DAMPING", 1e-12)
    monkeypatch.setattr(trajectory_obs, "_LARGEST_STEP", 1.0)
    layer = Layer(units=6, width=width, outputs=4)
    order, costs = eliminate(*layer.tensors(), width, step=0.5)
    for removed in (3, 4, 5, 6):
        loss = layer.refit_loss(sorted(order[removed:].tolist()))
        np.testing.assert_allclose(float(costs[:removed].sum()), loss, rtol=1e-5)


@pytest.mark.parametrize("width", [1, 2])
def test_duplicates_cost_nothing(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory_obs, "DAMPING", 1e-8)
    layer = Layer(units=6, width=width, outputs=4)
    for copied, unit in ((4, 1), (5, 2)):
        layer.x[:, layer.columns([copied])] = layer.x[:, layer.columns([unit])]
    order, costs = eliminate(*layer.tensors(), width, step=0)
    first = order[:2].tolist()
    assert len({1, 4} & set(first)) == 1
    assert len({2, 5} & set(first)) == 1
    assert float(costs[:2].sum()) < 1e-5 * float(costs[2])


@pytest.mark.parametrize("width", [1, 3])
def test_steps_hardly_change_the_order(width: int) -> None:
    layer = Layer(units=160, width=width, outputs=8, rows=2000)
    layer.weight *= np.exp(np.random.default_rng(1).normal(size=160)).repeat(width)
    (one, costs), (several, costs_of_several) = (eliminate(*layer.tensors(), width, step=step) for step in (0.0, 0.05))
    assert scipy.stats.spearmanr(one.argsort(), several.argsort()).statistic > 0.95
    for removed in (40, 80, 120):
        assert float(costs_of_several[:removed].sum()) < 1.1 * float(costs[:removed].sum())


def test_units_may_leave_in_a_given_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory_obs, "DAMPING", 1e-12)
    layer = Layer(units=5, width=2, outputs=3)
    wanted = torch.tensor([3, 0, 4, 1, 2])
    order, costs = eliminate(*layer.tensors(), 2, order=wanted)
    assert torch.equal(order, wanted)
    expected = [layer.refit_loss(wanted[removed:].tolist()) for removed in range(1, 6)]
    np.testing.assert_allclose(costs.cumsum(0), expected, rtol=1e-5)


@st.composite
def layers(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int]:
    """Layers whose activations may stand still, repeat each other, or lie in few dimensions."""
    units, width, outputs = draw(st.integers(1, 12)), draw(st.integers(1, 3)), draw(st.integers(1, 5))
    rows = draw(st.integers(1, 20))
    layer = Layer(units, width, outputs, seed=draw(st.integers(0, 99)), rows=rows)
    layer.x *= draw(st.sampled_from([0.0, 1e-6, 1.0, 1e4]))
    layer.x += draw(st.sampled_from([0.0, 1e3]))
    for unit in draw(st.sets(st.integers(0, units - 1))):
        layer.x[:, layer.columns([unit])] = draw(st.sampled_from([0.0, 1.0, 1e5]))
    layer.root *= draw(st.sampled_from([0.0, 1e-8, 1.0]))
    augmented = np.hstack([layer.x, np.ones((rows, 1))])
    metric = torch.tensor(layer.root @ layer.root.T)
    moments = ProbeMoments(second_moments(augmented, layer.row_weights), metric, metric)
    return torch.tensor(layer.weight), moments.covariance(units * width), metric, width


@given(drawn=layers(), step=st.sampled_from([0.0, 0.05, 0.5]))
def test_any_layer_can_be_eliminated(drawn: tuple[Tensor, Tensor, Tensor, int], step: float) -> None:
    weight, _, _, width = drawn
    order, costs = eliminate(*drawn, step=step)
    assert sorted(order.tolist()) == list(range(weight.shape[1] // width))
    assert bool(costs.isfinite().all()) and bool((costs >= 0).all())


@pytest.mark.parametrize("noise", [-1e-9, 0.0, 1e-9])
def test_rounding_may_leave_a_covariance_indefinite(noise: float) -> None:
    weight, _, metric = Layer(units=6, width=1, outputs=3).tensors()
    order, costs = eliminate(weight, noise * torch.ones(6, 6).double(), metric, 1)
    assert sorted(order.tolist()) == list(range(6))
    assert bool(costs.isfinite().all()) and bool((costs >= 0).all())
    assert float(costs.sum()) < 1e-4


# Scores


@pytest.mark.parametrize("name", tiny.ALL_NAMES)
def test_scores_of_any_network(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    factors = dict.fromkeys(network.outputs, 1.0)
    moments = probe_moments(
        network, structure, tiny.batches(network, 2), LossSettings(factors=factors, seed=0), probes=2
    )
    scores = obs_scores(network.module, structure, moments)
    assert len(scores) == len(structure.groups)
    for group in structure.groups:
        assert bool((scores[group.name] > 0).all())
        if group.kind == "width":
            assert bool((scores[group.name].diff() < 0).all())
            continue
        weight = weight_matrix(network.module.get_submodule(group.output)).detach().double()
        found = moments[group.name]
        features = weight.shape[1]
        order, costs = eliminate(weight, found.covariance(features), found.metric.double(), features // group.units)
        given = scores[group.name]
        assert given.dtype == torch.float64
        assert bool((given[order].diff() > 0).all())
        highest = np.maximum.accumulate(costs.numpy())
        np.testing.assert_allclose(given[order], found.coherence * highest, rtol=1e-6)


def test_units_that_cost_nothing_keep_their_order() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    moments = probe_moments(network, structure, tiny.batches(network, 1), LossSettings(factors={}, seed=0), probes=1)
    for each in moments.values():
        each.metric.zero_()
        each.queries.zero_()
    for scores in obs_scores(network.module, structure, moments).values():
        assert len(set(scores.tolist())) == len(scores)
        assert float(scores.max()) < 1e-200


def test_one_seed_makes_one_score() -> None:
    network, structure = tiny.network("bert_classifier"), tiny.structure("bert_classifier")
    batches = tiny.batches(network, 2)

    def scores(seed: int) -> dict[str, Tensor]:
        moments = probe_moments(network, structure, batches, LossSettings(factors={"logits": 1.0}, seed=seed), probes=2)
        return obs_scores(network.module, structure, moments)

    first, again, other = scores(3), scores(3), scores(4)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize("name", ["bert", "bert_classifier"])
def test_content_of_padding_does_not_matter(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    found = []
    for padding in (1, 7):
        batch = copy.deepcopy(tiny.batches(network, 1)[0])
        batch["input_ids"][batch["attention_mask"] == 0] = padding
        factors = dict.fromkeys(network.outputs, 1.0)
        found.append(probe_moments(network, structure, [batch], LossSettings(factors=factors, seed=0), probes=2))
    for group, moments in found[0].items():
        for field in ("metric", "second"):
            expected = getattr(moments, field)
            given = getattr(found[1][group], field)
            torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def test_moments_of_a_shared_layer_are_sums_over_its_runs() -> None:
    """Against the same network with two copies of the layer."""

    class Shared(nn.Module):
        def __init__(self, copies: bool) -> None:
            super().__init__()
            torch.manual_seed(0)
            first = timm.layers.Mlp(6, 8)
            second = copy.deepcopy(first) if copies else first
            self.layers = nn.ModuleList([first, second] if copies else [first])

        def forward(self, x: Tensor) -> Tensor:
            for layer in (self.layers[0], self.layers[-1]):
                x = x + layer(x)
            return x

    x = {"x": torch.randn(4, 5, 6, generator=torch.Generator().manual_seed(1))}
    found = []
    for copies in (False, True):
        network = tiny.network_around(nn.Sequential(OrderedDict(x=Shared(copies).eval())), {"input": x["x"]})
        structure = describe(network.module, network.inputs)
        found.append(
            probe_moments(
                network,
                structure,
                [network.inputs],
                LossSettings(factors={"output": 1.0}, manifold=0.0, seed=0),
                probes=2,
            )
        )
    (shared,) = found[0].values()
    first, second = found[1].values()
    torch.testing.assert_close(shared.metric, first.metric + second.metric)
    torch.testing.assert_close(shared.second, first.second + second.second)
    assert structure.left_dense == ()


def test_layers_that_run_several_times_in_the_network_itself_are_left_dense() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = timm.layers.Mlp(6, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    structure = describe(Twice().eval(), {"x": torch.randn(3, 5, 6)})
    assert structure.groups == ()
    assert "runs several times" in structure.left_dense[0].reason
