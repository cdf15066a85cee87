"""Schedules against trying all of them, and damages against running the network by hand."""

import copy
from itertools import product

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from tiny_models import classifier
from torch import Tensor

from optin_deploy.criteria.scoring import Scoring
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.nn.flops import count_flops
from optin_deploy.pruning.pruner import prune
from optin_deploy.pruning.space import PruningSpace, analyze
from optin_deploy.search.knapsack import Budget, kept_score, search_all
from optin_deploy.structure.plan import Plan
from optin_deploy.tokens.costs import TokenCosts, token_costs
from optin_deploy.tokens.merge_loss import MergeLoss, measure_task_loss
from optin_deploy.tokens.merging import with_merging
from optin_deploy.tokens.schedule import best_schedule, share_schedule

pytestmark = pytest.mark.slow


TEMPERATURE = 4.0


@pytest.fixture(scope="module")
def network() -> Network:
    return classifier(10, depth=3, patch_size=8)


@pytest.fixture(scope="module")
def space(network: Network) -> PruningSpace:
    return analyze(network, narrow=False, tokens=True)


@pytest.fixture(scope="module")
def costs(network: Network, space: PruningSpace) -> TokenCosts:
    assert space.stack is not None
    return token_costs(network.module, space.structure, space.costs, space.stack, network.inputs)


def batch(seed: int = 1) -> dict[str, Tensor]:
    return {"image": torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))}


def drawn_scores(space: PruningSpace, seed: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    return {g.name: torch.rand(g.units, generator=made).double() for g in space.structure.groups}


def inputs_of(network: Network, seed: int = 1) -> dict[str, Tensor]:
    return {next(iter(network.inputs)): next(iter(batch(seed).values()))}


def test_damage_is_the_change_of_the_outputs(network: Network, space: PruningSpace) -> None:
    assert space.stack is not None
    stack, inputs = space.stack, inputs_of(network)
    found = measure_task_loss(network, space.structure, stack, [inputs], {"logits": 2.0})
    dense = network.forward(inputs)["logits"].detach().double()
    for block in range(3):
        merging = copy.deepcopy(network.module)
        tokens = found.tokens[-1]
        plan = Plan({}, (stack.tokens,) * block + (tokens,) * (3 - block))
        with_merging(merging, space.structure, stack, plan)
        changed = network.forward(inputs, merging)["logits"].detach().double()
        p, q = (torch.log_softmax(y / TEMPERATURE, -1) for y in (dense, changed))
        loss = 2.0 * TEMPERATURE**2 * float((p.exp() * (p - q)).sum())
        assert found.loss[block, -1] == pytest.approx(max(loss, found.loss[block, -2]), rel=1e-4)
    assert (found.loss[:, 0] == 0).all() and (np.diff(found.loss, axis=1) >= 0).all()
    # The network is as it was.
    torch.testing.assert_close(network.forward(inputs)["logits"].detach().double(), dense)


def worth(
    space: PruningSpace,
    scores: dict[str, Tensor],
    costs: TokenCosts,
    tokens: tuple[int, ...],
    merge_loss: MergeLoss,
    f: float,
) -> float:
    """The score that the best units keep at a schedule, less its damage; −∞ where the budget is below the floor."""
    try:
        plan = search_all(space.structure, scores, [Budget(costs.at(tokens), f)], 8)
    except UserError:
        return -np.inf
    return kept_score(space.structure, scores, plan) - merge_loss.of(tokens, costs.stack.prefix)


def made_up(stack_tokens: int, blocks: int, weight: float) -> MergeLoss:
    """Merging costs more the earlier and the more of it."""
    tokens = (stack_tokens, stack_tokens - 4, stack_tokens // 2)
    base: NDArray[np.float64] = np.array([0.0, 1.0, 4.0])
    return MergeLoss(tokens, weight * np.stack([base * (blocks - i) for i in range(blocks)]))


def test_a_step_costs_between_what_is_left_of_the_whole_way_and_a_fresh_start() -> None:
    """101 tokens, one of them protected; measured: 20, 40 and 50 gone cost 1, 4 and 10."""
    merge_loss = MergeLoss((101, 81, 61, 51), np.array([[0.0, 1.0, 4.0, 10.0]]))

    def at(tokens: float) -> float:
        return float(merge_loss.at(0, np.array(tokens)))

    def step(before: float, after: float) -> float:
        return float(merge_loss.step(0, 1, np.array(before), np.array(after)))

    # Fewer gone than measured: twice as many cost four times as much, as from 20 to 40. Between, and beyond: linear.
    assert [at(n) for n in (101, 91, 71, 46)] == pytest.approx([0, 0.25, 2.5, 13])
    assert step(101, 61) == pytest.approx(4)
    # From 80 patches to 60: on the way from all that costs 3; so large a part of all, 25 of 100 gone, costs 1.75.
    assert step(81, 61) == pytest.approx((3 * 1.75) ** 0.5)
    assert step(81, 81) == 0
    assert merge_loss.of((81,), 1) == pytest.approx(1) and merge_loss.of((101,), 1) == 0


@pytest.mark.parametrize(("weight", "fraction"), [(3.0, 0.4), (0.5, 0.6), (3.0, 0.8)])
def test_the_schedule_is_nearly_the_best_of_all(
    space: PruningSpace, costs: TokenCosts, weight: float, fraction: float
) -> None:
    stack = costs.stack
    scores, merge_loss = drawn_scores(space, 0), made_up(stack.tokens, 3, weight)
    found = best_schedule(space.structure, scores, costs, fraction, 8, merge_loss)
    stack.check(found)
    levels = sorted({stack.tokens, 14, 11, 9, 7, 5, 4, 3})
    each = [t for t in product(levels, repeat=3) if stack.possible(t)]
    best = max(worth(space, scores, costs, t, merge_loss, fraction) for t in each)
    total = sum(float(v.sum()) for v in scores.values())
    # Prices reach the corners of what is possible only, and units come in steps.
    assert worth(space, scores, costs, found, merge_loss, fraction) >= best - 0.015 * total


def test_dear_merging_is_left_and_free_merging_taken(space: PruningSpace, costs: TokenCosts) -> None:
    scores, n = drawn_scores(space, 0), costs.stack.tokens
    dear = best_schedule(space.structure, scores, costs, 0.6, 8, made_up(n, 3, 1e6))
    free = best_schedule(space.structure, scores, costs, 0.6, 8, made_up(n, 3, 0.0))
    assert dear == (n,) * 3 and free[-1] < n


def test_a_share_of_the_flops_is_left_to_tokens(space: PruningSpace, costs: TokenCosts) -> None:
    found = share_schedule(space.structure, costs, 0.8, made_up(costs.stack.tokens, 3, 1.0))
    whole = Plan({})
    assert 0.6 < costs.at(found).of(whole) / costs.total <= 0.8


@pytest.mark.parametrize("loss", [(0.0, 0.0), (1.0, 1.0)])
def test_merging_takes_no_more_than_its_share(
    space: PruningSpace, costs: TokenCosts, loss: tuple[float, float]
) -> None:
    """Neither where it costs nothing, nor where the first step costs as much as all: no price is between the two."""
    n = costs.stack.tokens
    steps = MergeLoss((n, n - 2, (n + 1) // 2), np.array([(0.0, *loss)] * 3))
    found = share_schedule(space.structure, costs, 0.8, steps)
    costs.stack.check(found)
    assert 0.75 < costs.at(found).of(Plan({})) / costs.total <= 0.8


def test_what_merging_alone_cannot_reach_is_told(space: PruningSpace, costs: TokenCosts) -> None:
    with pytest.raises(UserError, match=r"0\.\d+ of the FLOPs.* 0\.050.*--tokens-share"):
        share_schedule(space.structure, costs, 0.05, made_up(costs.stack.tokens, 3, 1.0))


def test_scores_without_outputs_do_not_make_merging_free(network: Network) -> None:
    with pytest.raises(UserError, match=r"--task-weight 0.*tokens"):
        prune(network, [inputs_of(network)], 0.5, tokens="auto", scoring=Scoring(task_weight=0))


def test_pruning_meets_the_budget_with_tokens(network: Network) -> None:
    for tokens in ("auto", (17, 14, 11)):
        pruned = prune(network, [inputs_of(network)], 0.5, align=8, tokens=tokens)
        if tokens != "auto":
            assert pruned.plan.tokens == tokens
        left = count_flops(pruned.network.module, network.inputs) / count_flops(network.module, network.inputs)
        assert 0.49 <= left <= 0.5
        assert network.forward(inputs_of(network), pruned.network.module)["logits"].shape == (4, 10)
    with pytest.raises(UserError, match="one round"):
        prune(network, [inputs_of(network)], 0.5, tokens="auto", rounds=2)
