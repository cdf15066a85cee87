from itertools import combinations, product

import numpy as np
import pytest
import tiny
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from optin_deploy.compensation.pair import CompensationPair
from optin_deploy.compensation.ridge import Moments, add_ridge
from optin_deploy.compensation.sparsity import (
    Sparsity,
    can_be_sparse,
    choose_mask,
    has_pattern,
    measure_sparsity,
    solve_masked,
    sparse_fit,
    sparsify,
)
from optin_deploy.network import Network
from optin_deploy.nn.names import is_inside
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

pytestmark = pytest.mark.slow


STRENGTHS = (0.01, 0.1, 1.0)
seeds = st.integers(0, 2**31)


def rows(seed: int, features: int, outputs: int, samples: int = 60) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs whose features have much in common, what a dense map makes of them with noise, and that map's weights."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = normal(samples, features) @ (torch.eye(features) + 0.5 * normal(features, features))
    old = normal(features + 1, outputs)
    return x, x @ old[:-1] + old[-1] + 0.1 * normal(samples, outputs), old


def loss(weights: Tensor, optimum: Tensor, hessian: Tensor) -> Tensor:
    """Of every row."""
    change = weights - optimum
    return ((change @ hessian) * change).sum(1)


def least(optimum: Tensor, hessian: Tensor, kept: list[int]) -> Tensor:
    """Loss of every row with the weights that are kept at their best, by elimination of the others, one by one."""
    inverse, weights = torch.linalg.inv(hessian), optimum.clone()
    for gone in sorted(set(range(len(hessian))) - set(kept)):
        weights = weights - weights[:, gone : gone + 1] / inverse[gone, gone] * inverse[gone]
        inverse = inverse - torch.outer(inverse[:, gone], inverse[gone]) / inverse[gone, gone]
        inverse[gone, gone] = 1.0
        weights[:, gone] = 0.0
    return loss(weights, optimum, hessian)


def by_magnitude(weights: Tensor, columns: int) -> Tensor:
    """The mask that keeps the two largest of every four."""
    mask = torch.ones_like(weights, dtype=torch.bool)
    for row, first in product(range(len(weights)), range(0, columns, 4)):
        mask[row, first + weights[row, first : first + 4].abs().argsort()[:2]] = False
    return mask


# The choice within a group


@given(seeds, st.integers(0, 3))
def test_one_group_is_the_best_of_all_six(seed: int, behind: int) -> None:
    x, y, old = rows(seed, 4 + behind, 5)
    hessian = add_ridge(Moments.of(x, y), 0.01)
    optimum = old.T
    mask, weights = choose_mask(optimum, hessian, 4)
    assert mask[:, 4:].all()
    rest = list(range(4, len(hessian)))
    best = torch.stack([least(optimum, hessian, [*pair, *rest]) for pair in combinations(range(4), 2)]).min(0).values
    torch.testing.assert_close(loss(weights, optimum, hessian), best)
    torch.testing.assert_close(solve_masked(hessian, optimum @ hessian, mask), weights)


@given(seeds, st.integers(2, 6))
def test_the_first_group_counts_what_all_behind_take_over(seed: int, groups: int) -> None:
    x, y, old = rows(seed, 4 * groups, 3)
    hessian, optimum = add_ridge(Moments.of(x, y), 0.01), old.T
    mask, _ = choose_mask(optimum, hessian, 4 * groups)
    pairs, rest = list(combinations(range(4), 2)), list(range(4, len(hessian)))
    best = torch.stack([least(optimum, hessian, [*pair, *rest]) for pair in pairs]).argmin(0)
    assert [tuple(row[:4].nonzero()[:, 0].tolist()) for row in mask] == [pairs[i] for i in best]


@given(seeds, st.integers(1, 6))
def test_solving_anew_is_least_squares_on_what_stays(seed: int, groups: int) -> None:
    x, y, old = rows(seed, 4 * groups, 3)
    moments = Moments.of(x, y)
    hessian, mask = add_ridge(moments, 0.1), by_magnitude(old.T, 4 * groups)
    found = solve_masked(hessian, moments.cross.T, mask)
    for row, weights in enumerate(found):
        kept = mask[row].nonzero()[:, 0].numpy()
        expected = np.linalg.solve(hessian.numpy()[np.ix_(kept, kept)], moments.cross.numpy()[kept, row])
        np.testing.assert_allclose(weights.numpy()[kept], expected, atol=1e-9)
    assert not found[~mask].any()


def test_many_rows_are_solved_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y, old = rows(0, 8, 7)
    moments, mask = Moments.of(x, y), by_magnitude(old.T, 8)
    whole = solve_masked(add_ridge(moments, 0.1), moments.cross.T, mask)
    monkeypatch.setattr("optin_deploy.compensation.sparsity._MOST_NUMBERS", 60)
    torch.testing.assert_close(solve_masked(add_ridge(moments, 0.1), moments.cross.T, mask), whole)


# A whole map


@given(seeds, st.integers(1, 6), st.booleans())
def test_a_map_is_the_best_that_its_mask_allows(seed: int, groups: int, bias: bool) -> None:
    features = 4 * groups
    x, y, old = rows(seed, features, 3)
    found = sparse_fit(Moments.of(x, y), None, old, (0.1,), bias=bias)
    assert has_pattern(found[:-1].T) and int((found[:-1] != 0).sum()) == features // 2 * 3
    assert bias or torch.equal(found[-1], old[-1])
    penalty = 0.1 * x.square().sum(0).mean()
    for column in range(3):
        kept = found[:-1, column].nonzero()[:, 0]
        design = torch.cat([x[:, kept], x.new_ones(len(x), 1)], 1) if bias else x[:, kept]
        pull = penalty * torch.eye(design.shape[1], dtype=x.dtype)
        start = old[:-1, column][kept]
        if bias:
            pull[-1, -1], start = 0.0, torch.cat([start, old[-1:, column]])
        target = y[:, column] - (0.0 if bias else old[-1, column])
        expected = torch.linalg.solve(design.T @ design + pull, design.T @ target + pull @ start)
        torch.testing.assert_close(found[:-1, column][kept], expected[: len(kept)])


@pytest.mark.parametrize("features", [8, 32])
def test_less_is_lost_than_by_magnitude(features: int) -> None:
    ours, theirs, kept = [], [], []
    for seed in range(20):
        x, y, old = rows(seed, features, 6, samples=200)
        moments = Moments.of(x, y)
        hessian = add_ridge(moments, 0.01)
        mask = by_magnitude(old.T, features)
        ours.append(moments.error(sparse_fit(moments, None, old, (0.01,), bias=True)))
        theirs.append(moments.error(torch.where(mask, old.T, 0.0).T))
        kept.append(moments.error(solve_masked(hessian, moments.cross.T, mask).T))
    assert all(our < their for our, their in zip(ours, theirs, strict=True))
    # The mask alone is better, too, where both are solved anew.
    assert np.mean(ours) < 0.8 * np.mean(kept)


def test_weights_that_stay_keep_their_values_without_a_ridge() -> None:
    x, y, old = rows(3, 16, 5)
    found = sparse_fit(Moments.of(x, y), None, old, (), bias=True)
    stays = found[:-1] != 0
    assert has_pattern(found[:-1].T) and int(stays.sum()) == 8 * 5
    assert torch.equal(found[:-1][stays], old[:-1][stays]) and torch.equal(found[-1], old[-1])


def test_the_strength_is_the_one_that_does_best_on_held_out_rows() -> None:
    x, y, old = rows(5, 16, 4, samples=24)
    training, held_out = Moments.of(x[:18], y[:18]), Moments.of(x[18:], y[18:])
    strengths = (0.001, 0.1, 30.0)
    found = sparse_fit(training, held_out, torch.zeros_like(old), strengths, bias=True)
    alone = [sparse_fit(training + held_out, None, torch.zeros_like(old), (s,), bias=True) for s in strengths]
    assert sum(torch.equal(found, each) for each in alone) == 1


def test_features_that_never_occur_do_no_harm() -> None:
    x, y, old = rows(7, 8, 3)
    x[:, 2:6] = 0.0
    found = sparse_fit(Moments.of(x, y), None, old, (0.01,), bias=True)
    assert found.isfinite().all() and has_pattern(found[:-1].T)


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ([[1, 0, 0, 1], [0, 0, 0, 1]], True),
        ([[1, 1, 0, 1], [0, 0, 0, 1]], False),
        # Two of every four, counted from the first.
        ([[0, 0, 1, 1, 1, 1, 0, 0]], True),
        ([[0, 1, 1, 1, 0, 1, 0, 0]], False),
        ([[0, 0, 0]], False),
    ],
)
def test_the_pattern_is_recognised(weights: list[list[int]], expected: bool) -> None:
    assert has_pattern(torch.tensor(weights)) == expected


# A network


def made_sparse(network: Network, plan: Plan, strengths: tuple[float, ...]) -> tuple[Structure, nn.Module]:
    structure = describe(network.module, network.inputs)
    module = slice_network(network.module, structure, plan)
    sparsify(CompensationPair(network, module, structure, plan), tiny.batches(network, 6), strengths)
    return structure, module


def weight_rows(layer: nn.Module) -> Tensor:
    """The weights with the input features or channels last."""
    weight = layer.get_parameter("weight").detach()
    return weight if weight.dim() == 2 else weight.permute(0, 2, 3, 1)


@pytest.mark.parametrize("strengths", [STRENGTHS, (0.1,), ()], ids=["auto", "one", "none"])
@pytest.mark.parametrize("name", ["vit", "vit_without_biases", "bert_classifier", "resnet", "plain_resnet"])
def test_every_map_of_a_block_has_the_pattern(name: str, strengths: tuple[float, ...]) -> None:
    network = tiny.network(name)
    structure, module = made_sparse(network, Plan({}), strengths)
    named = dict(module.named_modules())
    inside = [
        n
        for n, m in named.items()
        if isinstance(m, nn.Linear | nn.Conv2d) and any(is_inside(n, block) for block in structure.blocks)
    ]
    wanted = [n for n in inside if weight_rows(named[n]).shape[-1] % 4 == 0]
    assert wanted and list(can_be_sparse(module, structure)) == wanted
    for each in wanted:
        found, dense = weight_rows(named[each]), weight_rows(network.module.get_submodule(each))
        assert found.shape == dense.shape
        assert int((found == 0).sum()) == found.numel() // 2 and has_pattern(found)
        assert strengths or torch.equal(found[found != 0], dense[found != 0])
    told = measure_sparsity(module, structure, network.inputs)
    assert (told.maps, told.zeros) == (len(wanted), 0.5)
    assert told.left_dense == tuple(n for n in inside if n not in wanted)
    assert 0.1 < told.flops_share < 1


@pytest.mark.parametrize("name", ["vit", "bert_classifier", "resnet"])
def test_a_sparse_network_follows_the_dense_one_better_than_by_magnitude(name: str) -> None:
    network = tiny.network(name)
    structure, module = made_sparse(network, Plan({}), STRENGTHS)
    crude = slice_network(network.module, structure, Plan({}))
    for layer in can_be_sparse(crude, structure).values():
        inside = weight_rows(layer)
        mask = by_magnitude(inside.reshape(-1, inside.shape[-1]), inside.shape[-1]).reshape(inside.shape)
        with torch.no_grad():
            layer.weight *= mask if mask.dim() == 2 else mask.permute(0, 3, 1, 2)

    def error(of: nn.Module) -> float:
        pairs = ((network.forward(b), network.forward(b, of)) for b in tiny.batches(network, 12)[6:])
        return sum(float((ours[n] - theirs[n]).square().sum()) for ours, theirs in pairs for n in network.outputs)

    with torch.no_grad():
        assert error(module) < 0.7 * error(crude)


def test_what_is_left_by_a_plan_gets_the_pattern() -> None:
    network = tiny.network("vit")
    plan = tiny.uneven_plan(describe(network.module, network.inputs))
    structure, module = made_sparse(network, plan, STRENGTHS)
    told = measure_sparsity(module, structure, network.inputs)
    assert told.maps == len(can_be_sparse(module, structure)) > 0
    again = slice_network(network.module, structure, plan)
    assert {n: p.shape for n, p in module.named_parameters()} == {n: p.shape for n, p in again.named_parameters()}


def test_a_dense_network_has_no_sparse_maps() -> None:
    network = tiny.network("vit")
    told = measure_sparsity(network.module, describe(network.module, network.inputs), network.inputs)
    assert (told.maps, told.zeros, told.flops_share) == (0, 0.0, 0.0)
    assert isinstance(told, Sparsity) and len(told.left_dense) > 0


def test_a_map_that_stays_dense_is_refitted() -> None:
    network = tiny.network("bert_classifier")
    _, module = made_sparse(network, Plan({}), (0.1,))
    _, crude = made_sparse(network, Plan({}), ())
    before = network.module.get_parameter("classifier.weight")
    assert not torch.equal(module.get_parameter("classifier.weight"), before)
    assert torch.equal(crude.get_parameter("classifier.weight"), before)
    assert (module.get_parameter("classifier.weight") != 0).all()


def test_one_seed_makes_one_result() -> None:
    network = tiny.network("vit")
    one, other = (made_sparse(network, Plan({}), STRENGTHS)[1] for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))
