import copy
from collections.abc import Mapping
from dataclasses import replace

import pytest
import scipy.stats
import tiny
import torch
from torch import Tensor, nn

from optin_deploy.criteria import trajectory_forward
from optin_deploy.criteria.trajectory import exact_scores, sketch_scores
from optin_deploy.criteria.trajectory_forward import Draws, forward_scores
from optin_deploy.criteria.trajectory_loss import LossSettings, Trajectory
from optin_deploy.network import Network
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.masking import mask_units

pytestmark = pytest.mark.slow


MANIFOLD, FACTOR, SEED = 0.7, 3.0, 5
STEP = 1e-5

Scores = dict[str, Tensor]


def in_float64(name: str, size: int = 2) -> tuple[Network, Structure, tiny.Batch]:
    network, structure = tiny.network(name), tiny.structure(name)
    batch = tiny.batches(network, 1, size)[0]
    batch = {n: t.double() if t.is_floating_point() else t for n, t in batch.items()}
    return network.with_module(copy.deepcopy(network.module).double()), structure, batch


def same_factors(network: Network, factor: float = FACTOR) -> dict[str, float]:
    return dict.fromkeys(network.outputs, factor)


def task_form(trajectory: Trajectory, name: str, y: Tensor, change: Tensor) -> Tensor:
    """The output's task term to second order, for changes with a last axis for units."""
    mask = trajectory.inputs.get("attention_mask")
    if name == trajectory.network.logits:
        p = torch.softmax(y / 4, dim=-1)
        return sum(
            0.5 * torch.einsum("iu,ij,ju->u", d, q.diag() - q.outer(q), d) for d, q in zip(change, p, strict=True)
        )
    total = torch.zeros(change.shape[-1], dtype=y.dtype)
    for i in range(len(y)):
        rows = mask[i].bool() if mask is not None and y.dim() == 3 else slice(None)
        total += change[i][rows].flatten(0, -2).square().sum(0) / y[i][rows].square().sum()
    return total


def quadratic(
    trajectory: Trajectory, grams: Mapping[str, Tensor], dense: Mapping[str, Tensor], changes: Mapping[str, Tensor]
) -> Tensor:
    """The loss to second order, for changes of Gram matrices and of outputs with a last axis for units."""
    total = MANIFOLD * sum(g.flatten(0, -2).square().sum(0) for g in grams.values())
    return total + FACTOR * sum(task_form(trajectory, n, y, changes[n]) for n, y in dense.items())


@torch.no_grad()
def by_differences(network: Network, structure: Structure, batch: tiny.Batch, samples: list[int]) -> Scores:
    """‖Σ_b J_bu‖² over these samples, by changing one mask a little up and down; in float64."""
    trajectory, scores = Trajectory(network, structure, batch, SEED), {}
    _, dense = trajectory.run()
    for group in structure.groups:
        results = []
        for step in (STEP, -STEP):
            masks = torch.ones(group.units, trajectory.size, group.units, dtype=torch.float64)
            for unit in range(group.units):
                masks[unit, samples, unit] += step
            with mask_units(network.module, structure, {group.name: masks.flatten(0, 1)}):
                blocks, outputs = trajectory.run(group.units)
            grams = trajectory.grams(blocks, group.units)
            results.append((grams, {n: y.unflatten(0, (group.units, -1)) for n, y in outputs.items()}))
        slopes = [
            {n: ((up[n] - down[n]) / (2 * STEP)).movedim(0, -1) for n in up} for up, down in zip(*results, strict=True)
        ]
        scores[group.name] = quadratic(trajectory, slopes[0], dense, slopes[1])
    return scores


def by_jacobian(network: Network, structure: Structure, batch: tiny.Batch) -> Scores:
    """‖Σ_b J_bu‖² from explicit derivatives by backward passes."""
    trajectory = Trajectory(network, structure, batch, SEED)
    units = [g.units for g in structure.groups]
    names = []

    def run(mask: Tensor) -> tuple[Tensor, ...]:
        masks = dict(zip([g.name for g in structure.groups], mask.split(units), strict=True))
        with mask_units(network.module, structure, masks):
            blocks, outputs = trajectory.run()
        grams = trajectory.grams(blocks)
        names[:] = [*grams, *outputs]
        return (*grams.values(), *outputs.values())

    ones = torch.ones(sum(units), dtype=torch.float64)
    jacobians = torch.autograd.functional.jacobian(run, ones)
    found = dict(zip(names, (j.detach() for j in jacobians), strict=True))
    with torch.no_grad():
        dense = trajectory.run()[1]
    grams = {b: found[b][0] for b in structure.blocks}
    total = quadratic(trajectory, grams, dense, {n: found[n] for n in dense})
    return dict(zip([g.name for g in structure.groups], total.split(units), strict=True))


def assert_close(given: Scores, expected: Scores, rtol: float) -> None:
    assert given.keys() == expected.keys()
    for name, scores in expected.items():
        assert given[name].dtype == torch.float64
        torch.testing.assert_close(given[name], scores, rtol=rtol, atol=rtol * 1e-3 * float(scores.max()))


def unit_by_unit(network: Network, structure: Structure, batches: list[tiny.Batch]) -> Scores:
    factors = same_factors(network)
    return forward_scores(
        network, structure, batches, LossSettings(factors=factors, manifold=MANIFOLD, seed=SEED), draws=Draws(1, 1)
    )


@pytest.mark.parametrize("name", ["vit", "bert_classifier", "plain_resnet"])
def test_unit_by_unit_the_scores_are_those_of_the_jacobian(name: str) -> None:
    network, structure, batch = in_float64(name)
    if name == "plain_resnet":
        batch = {"x": batch["x"][..., :6, :6]}
    assert_close(unit_by_unit(network, structure, [batch]), by_jacobian(network, structure, batch), 1e-8)


@pytest.mark.parametrize("name", tiny.ALL_NAMES)
def test_unit_by_unit_any_network_has_the_scores_of_small_steps(name: str) -> None:
    network, structure, batch = in_float64(name)
    assert_close(unit_by_unit(network, structure, [batch]), by_differences(network, structure, batch, [0, 1]), 1e-4)


def test_scores_of_batches_sum() -> None:
    network, structure = tiny.network("bert"), tiny.structure("bert")
    batches = tiny.batches(network, 2)
    given = unit_by_unit(network, structure, batches)
    parts = [unit_by_unit(network, structure, [b]) for b in batches]
    assert_close(given, {n: parts[0][n] + parts[1][n] for n in given}, 1e-4)


@pytest.fixture
def in_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """The groups here are so small that none would be scored in sets."""
    monkeypatch.setattr(Draws, "is_exact", lambda draws, group: draws.set_size == 1)


@pytest.mark.usefixtures("in_sets")
@pytest.mark.parametrize("name", ["vit", "bert_classifier", "bert"])
def test_sets_are_unbiased(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory_forward, "_SHARED_DRAWS", 2000)
    network, structure, batch = in_float64(name, size=3)
    factors = same_factors(network)
    # Sets of five do not divide the groups.
    given = forward_scores(
        network, structure, [batch], LossSettings(factors=factors, manifold=MANIFOLD, seed=SEED), draws=Draws(300, 5)
    )
    joint = by_differences(network, structure, batch, [0, 1, 2])
    each = [by_differences(network, structure, batch, [b]) for b in range(3)]
    for group in structure.groups:
        single = sum(part[group.name] for part in each)
        expected = single * joint[group.name].sum() / single.sum()
        assert float((given[group.name] / expected).mean()) == pytest.approx(1.0, rel=0.1)
        torch.testing.assert_close(given[group.name], expected, rtol=0.25, atol=0.02 * float(expected.max()))


@pytest.mark.usefixtures("in_sets")
def test_many_draws_come_near_the_sketch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory_forward, "_SHARED_DRAWS", 500)
    network, structure = tiny.network("vit"), tiny.structure("vit").without_widths()
    batches, factors = tiny.batches(network, 2), same_factors(network)
    given = forward_scores(network, structure, batches, LossSettings(factors=factors, seed=0), draws=Draws(100, 4))
    sketch = sketch_scores(network, structure, batches, LossSettings(factors=factors, seed=0), probes=2000)
    for name, scores in sketch.items():
        torch.testing.assert_close(given[name], scores, rtol=0.25, atol=0.05 * float(scores.max()))


@pytest.mark.usefixtures("in_sets")
@pytest.mark.parametrize("name", ["vit", "bert_classifier"])
def test_a_few_draws_rank_neurons_as_the_exact_scores_do(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    batches, factors = tiny.batches(network, 8, size=6), same_factors(network, 1.0)
    neurons = [g for g in structure.groups if g.kind == "neuron"]
    given = forward_scores(network, structure, batches, LossSettings(factors=factors, seed=0), draws=Draws(4, 4))
    exact = exact_scores(network, structure, neurons, batches, LossSettings(factors=factors, seed=0))
    for group in neurons:
        assert scipy.stats.spearmanr(given[group.name], exact[group.name]).statistic > 0.9


@pytest.mark.usefixtures("in_sets")
def test_signs_of_their_own_for_each_sample_lessen_the_noise() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    group = next(g for g in structure.groups if g.kind == "neuron")
    errors = []
    for size in (2, 32):
        batch = tiny.batches(network, 1, size)
        best = forward_scores(network, structure, batch, LossSettings(factors={}, seed=99), draws=Draws(100, 4))[
            group.name
        ]
        given = [
            forward_scores(network, structure, batch, LossSettings(factors={}, seed=s), draws=Draws(2, 4))[group.name]
            for s in range(6)
        ]
        # As shares, so that the factor of the group does not matter.
        errors.append(sum(float((g / g.sum() - best / best.sum()).square().sum()) for g in given))
    assert errors[1] < 0.25 * errors[0]


@pytest.mark.parametrize("name", ["vit", "bert", "plain_resnet"])
def test_energies_are_of_what_units_add_to_the_output(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    batch = tiny.batches(network, 1)[0]
    given = trajectory_forward._Differential(Trajectory(network, structure, batch, 0), LossSettings()).energies
    for group in structure.groups:
        module, seen = network.module.get_submodule(group.output), []
        handle = module.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0]))
        with torch.no_grad():
            network.forward(batch)
        handle.remove()
        x, expected = seen[0].movedim(group.axis, -1), torch.zeros(group.units)
        for feature in range(x.shape[-1]):
            unit = feature % group.units if group.kind == "width" else feature // group.width
            expected[unit] += (x[..., feature].square().sum() * module.weight[:, feature].square().sum()).detach()
        torch.testing.assert_close(given[group.name], expected)


def test_units_are_ordered_by_size() -> None:
    energies, scores = torch.tensor([3.0, 0.0, 9.0, 1.0]), torch.tensor([-1.0, 8.0, 9.0, 0.0])
    assert trajectory_forward._order(energies, None).tolist() == [1, 3, 0, 2]
    # Ranks are 2, 0, 3, 1 and 0, 2, 3, 1.
    assert trajectory_forward._order(energies, scores)[-1] == 2
    assert trajectory_forward._order(energies, energies).tolist() == [1, 3, 0, 2]


# How it runs


def test_no_graph_is_kept() -> None:
    network, structure = tiny.network("bert_classifier"), tiny.structure("bert_classifier")
    saved: list[Tensor] = []
    seen: list[bool] = []

    def look(_: nn.Module, __: object, output: object) -> None:
        tensor = output[0] if isinstance(output, tuple) else output
        if isinstance(tensor, Tensor):
            seen.append(torch.is_grad_enabled() or tensor.requires_grad)

    handles = [m.register_forward_hook(look) for m in network.module.modules()]
    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        unit_by_unit(network, structure, tiny.batches(network, 1))
    for handle in handles:
        handle.remove()
    assert seen and not any(seen)
    assert not saved


@pytest.mark.usefixtures("in_sets")
@pytest.mark.parametrize("set_size", [1, 5])
def test_stacks_of_any_size_give_the_same_scores(set_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network, structure = tiny.network("bert_classifier"), tiny.structure("bert_classifier")
    batches, results = tiny.batches(network, 1), []
    for tokens in (1, 21 * 7, 10**6):
        monkeypatch.setattr(trajectory_forward, "STACKED_TOKENS", tokens)
        factors = same_factors(network)
        # Signs are drawn stack by stack, in one order.
        results.append(
            forward_scores(network, structure, batches, LossSettings(factors=factors, seed=0), draws=Draws(2, set_size))
        )
    for given in results[1:]:
        assert_close(given, results[0], 1e-3)


@pytest.mark.parametrize(("probes", "set_size"), [(1, 1), (2, 3), (2, 100)])
def test_progress_and_what_is_left_behind(probes: int, set_size: int) -> None:
    network, structure = tiny.network("resnet"), tiny.structure("resnet")
    before = {k: v.clone() for k, v in network.module.state_dict().items()}
    scores = forward_scores(
        network,
        structure,
        tiny.batches(network, 2),
        LossSettings(factors=same_factors(network), seed=0),
        draws=Draws(probes, set_size),
    )
    assert all(bool((s >= 0).all()) for s in scores.values())
    assert all(torch.equal(before[k], v) for k, v in network.module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in network.module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.module.modules())


def test_how_many_passes_are_taken() -> None:
    group = tiny.structure("vit").groups[-1]

    def passes(units: int, probes: int, set_size: int) -> int:
        return Draws(probes, set_size).passes(of(group, units))

    assert passes(1000, 2, 16) == 63 * 2 + 8
    assert passes(1000, 4, 10) == 100 * 4 + 8
    assert passes(12, 4, 16) == 12
    assert passes(6, 4, 16) == 6
    assert passes(1000, 4, 1) == 1000


def of(group: Group, units: int) -> Group:
    return replace(group, units=units)


@pytest.mark.usefixtures("in_sets")
def test_one_seed_makes_one_score() -> None:
    network, structure = tiny.network("bert_classifier"), tiny.structure("bert_classifier")
    batches, factors = tiny.batches(network, 2), same_factors(network)
    first, again, other = (
        forward_scores(network, structure, batches, LossSettings(factors=factors, seed=s), draws=Draws(2, 4))
        for s in (3, 3, 4)
    )
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)


def test_parts_may_be_left_out() -> None:
    network, structure, batch = in_float64("vit")
    draws = Draws(1, 1)
    whole = forward_scores(network, structure, [batch], LossSettings(same_factors(network), seed=SEED), draws=draws)
    manifold = forward_scores(network, structure, [batch], LossSettings(seed=SEED), draws=draws)
    task = forward_scores(network, structure, [batch], LossSettings(same_factors(network), 0.0, SEED), draws=draws)
    assert_close(whole, {n: manifold[n] + task[n] for n in whole}, 1e-8)
    assert all(
        bool((s == 0).all())
        for s in forward_scores(
            network, structure, [batch], LossSettings({"output": 0.0}, 0.0, SEED), draws=draws
        ).values()
    )


def test_a_set_needs_two_draws() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    with pytest.raises(ValueError, match="two probes"):
        forward_scores(network, structure, tiny.batches(network, 1), LossSettings(factors={}, seed=0), draws=Draws(1))
