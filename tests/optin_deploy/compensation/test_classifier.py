import copy

import numpy as np
import pytest
import scipy.optimize
import scipy.special
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from optin_deploy.compensation.classifier import Rows, fit, logits_layer, refit_classifier
from optin_deploy.network import Network
from optin_deploy.pruning.removal import Remover
from optin_deploy.pruning.space import analyze
from optin_deploy.structure.plan import Plan
from optin_deploy.tokens.merging import with_merging

NONE = torch.zeros(40, dtype=torch.bool)


def drawn(features: int, classes: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows, class probabilities that follow them, and weights some way from those that give them; float64."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(len(NONE), features, generator=generator, dtype=torch.float64) + 0.5
    truth = torch.randn(features + 1, classes, generator=generator, dtype=torch.float64)
    p = (x @ truth[:-1] + truth[-1] + torch.randn(len(NONE), classes, generator=generator)).softmax(1)
    return x, p, truth + 0.5 * torch.randn(truth.shape, generator=generator)


def problem(x: Tensor, p: Tensor, old: Tensor, strength: float, weights: np.ndarray) -> float:
    """The module's problem, as it is written there."""
    log_q = scipy.special.log_softmax(x.numpy() @ weights[:-1] + weights[-1], axis=1)
    divergence = (p.numpy() * (np.log(p.numpy()) - log_q)).sum(1).mean()
    pull = strength * np.square(x.numpy()).mean() * np.square(weights[:-1] - old.numpy()[:-1]).sum() / 2
    return float(divergence + pull)


@settings(max_examples=20)
@given(
    features=st.integers(1, 5),
    classes=st.integers(2, 4),
    strength=st.sampled_from([0.003, 0.1, 3.0]),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_fit_minimises_the_divergence_and_the_pull(
    features: int, classes: int, strength: float, bias: bool, seed: int
) -> None:
    x, p, old = drawn(features, classes, seed)
    found = fit(Rows(x, p, NONE), old, [strength], bias=bias).numpy()

    def value(flat: np.ndarray) -> float:
        weights = flat.reshape(-1, classes)
        return problem(x, p, old, strength, weights if bias else np.vstack([weights, old[-1:].numpy()]))

    start = (old if bias else old[:-1]).numpy().ravel()
    least = scipy.optimize.minimize(value, start, method="BFGS", options={"gtol": 1e-7}).fun
    assert problem(x, p, old, strength, found) <= least + 1e-6
    if not bias:
        np.testing.assert_array_equal(found[-1], old[-1])


def test_the_strength_is_the_one_that_does_best_on_held_out_rows() -> None:
    x, p, old = drawn(4, 3, 1)
    held_out = NONE.clone()
    held_out[::4] = True
    strengths = (0.003, 0.1, 3.0)

    def error(strength: float) -> float:
        weights = fit(Rows(x[~held_out], p[~held_out], held_out[~held_out]), old, [strength], bias=True)
        return problem(x[held_out], p[held_out], old, 0.0, weights.numpy())

    best = min(strengths, key=error)
    expected = fit(Rows(x, p, NONE), old, [best], bias=True)
    torch.testing.assert_close(fit(Rows(x, p, held_out), old, strengths, bias=True), expected, rtol=0, atol=1e-3)


def test_weights_stay_where_no_strength_does_better_on_held_out_rows() -> None:
    x, p, old = drawn(4, 3, 2)
    held_out = NONE.clone()
    held_out[20:] = True
    # What the other rows teach is wrong for those held out, which the old weights give just so.
    p[20:] = (x[20:] @ old[:-1] + old[-1]).softmax(1)
    assert torch.equal(fit(Rows(x, p, held_out), old, (0.003, 0.1), bias=True), old)


@pytest.mark.parametrize("name", ["vit", "bert_classifier", "resnet"])
def test_the_last_map_gives_the_logits(name: str) -> None:
    network = tiny.network(name)
    found = logits_layer(network, network.module, network.inputs)
    assert found is not None
    layer = network.module.get_submodule(found)
    assert (
        isinstance(layer, nn.Linear) and layer.out_features == network.forward(network.inputs)[network.logits].shape[-1]
    )


class Twice(nn.Module):
    """Class logits that no single linear layer gives."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.two(x)


class Tied(nn.Module):
    """Class logits from weights that are used elsewhere too."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)
        self.last.weight = self.first.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x))


@pytest.mark.parametrize("module", [Twice(), Tied()], ids=["two layers", "tied"])
def test_maps_that_do_not_alone_give_the_logits_are_left_alone(module: nn.Module) -> None:
    network = tiny.network_around(module, {"x": torch.randn(5, 4)}, logits=True)
    assert logits_layer(network, module, network.inputs) is None
    pruned = copy.deepcopy(module)
    refit_classifier(network, pruned, [network.inputs] * 4)
    assert all(torch.equal(a, b) for a, b in zip(pruned.parameters(), module.parameters(), strict=True))


def divergence(network: Network, pruned: nn.Module, batches: list[dict[str, Tensor]]) -> float:
    assert network.logits is not None
    pairs = [[network.forward(b, m)[network.logits].log_softmax(-1) for m in (network.module, pruned)] for b in batches]
    return float(torch.cat([(p.exp() * (p - q)).sum(-1).flatten() for p, q in pairs]).mean())


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "bert_classifier", "resnet"])
def test_a_compensated_network_comes_nearer_to_the_dense_distribution(name: str) -> None:
    network = tiny.network(name)
    space = analyze(network, narrow=False)
    plan = Plan({g.name: tuple(range(g.units // 2)) for g in space.structure.groups})
    batches = tiny.batches(network, 8)
    pruned = Remover(network, space, batches, None).remove(plan)
    before = divergence(network, pruned, batches)
    refit_classifier(network, pruned, batches, (0.01,))
    assert divergence(network, pruned, batches) < before
    others = Remover(network, space, batches, None).remove(plan).named_parameters()
    last = logits_layer(network, pruned, batches[0])
    assert all(torch.equal(t, pruned.get_parameter(n)) for n, t in others if not n.startswith(f"{last}."))


def test_an_unpruned_network_stays_as_it_is() -> None:
    network = tiny.network("vit")
    same = copy.deepcopy(network.module)
    refit_classifier(network, same, tiny.batches(network, 8))
    assert all(torch.equal(a, b) for a, b in zip(same.parameters(), network.module.parameters(), strict=True))


@torch.no_grad()
def test_the_last_map_follows_merged_tokens() -> None:
    network = tiny.network("vit")
    space = analyze(network, narrow=False, tokens=True)
    assert space.stack is not None
    tokens = space.stack.tokens
    kept = {g.name: tuple(range(g.units // 2)) for g in space.structure.groups}
    plan = Plan(kept, (tokens, *[space.stack.fewest_after(tokens)] * (len(space.stack.blocks) - 1)))
    batches = tiny.batches(network, 8)
    before_merging = Remover(network, space, batches, 0.01).remove(Plan(kept))
    with_merging(before_merging, space.structure, space.stack, plan)
    pruned = Remover(network, space, batches, 0.01).remove(plan)
    assert divergence(network, pruned, batches) < divergence(network, before_merging, batches)
