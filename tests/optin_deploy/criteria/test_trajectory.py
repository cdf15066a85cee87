import math

import pytest
import scipy.stats
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy.criteria import trajectory
from optin_deploy.criteria.trajectory import exact_scores, gram, sample_tokens, sketch_scores, task_factor
from optin_deploy.network import Network
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Group, Structure

FACTOR = 3.0
MODELS = ["vit", "vit_layer_scale", "deit_distilled", "dinov2", "bert", "bert_classifier", "distilbert", "segmenter"]


def run_with_features(network: Network, structure: Structure, batch: tiny.Batch) -> tuple[list[Tensor], Tensor | None]:
    """The tokens of every block, ``(all tokens, width)`` with padding left out, and the logits, in float64."""
    features: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: object) -> None:
        tokens = (output[0] if isinstance(output, tuple) else output).double()
        real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(tokens.shape[:2]).bool()
        features.append(tokens[real])

    handles = [network.module.get_submodule(b).register_forward_hook(keep) for b in structure.blocks]
    outputs = network.forward(batch)
    for handle in handles:
        handle.remove()
    return features, outputs[network.logits].double() if network.logits else None


def without_unit(network: Network, group: Group, unit: int) -> object:
    def zero(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        for feature in range(unit * group.width, (unit + 1) * group.width):
            x[..., feature] = 0.0
        return (x,)

    return network.module.get_submodule(group.output).register_forward_pre_hook(zero)


def cosines(tokens: Tensor) -> Tensor:
    matrix = torch.zeros(len(tokens), len(tokens), dtype=torch.float64)
    for i, a in enumerate(tokens):
        matrix[i] = (tokens @ a) / (tokens.norm(dim=1) * a.norm())
    return matrix


@torch.no_grad()
def reference_scores(
    network: Network, structure: Structure, batches: list[tiny.Batch], factor: float
) -> dict[str, Tensor]:
    """Slow and plain: a full forward per unit, every block's Gram matrix, earlier blocks too."""
    scores = {g.name: torch.zeros(g.units, dtype=torch.float64) for g in structure.groups}
    for batch in batches:
        dense, dense_logits = run_with_features(network, structure, batch)
        for group in structure.groups:
            for unit in range(group.units):
                handle = without_unit(network, group, unit)
                changed, logits = run_with_features(network, structure, batch)
                handle.remove()
                moved = [float((cosines(a) - cosines(b)).square().sum()) for a, b in zip(dense, changed, strict=True)]
                moved[-1] *= 0.5
                task = moved[-1]
                if logits is not None:
                    p, q = (torch.softmax(x / 4, dim=-1) for x in (dense_logits, logits))
                    task = 16 * float((p * (p / q).log()).sum())
                scores[group.name][unit] += sum(moved) + factor * task
    return scores


def assert_scores_close(given: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert given.keys() == expected.keys()
    largest = max(float(s.max()) for s in expected.values())
    for name, scores in expected.items():
        torch.testing.assert_close(given[name], scores, rtol=rtol, atol=1e-6 * largest)


@pytest.mark.parametrize("name", MODELS)
def test_exact_scores_are_those_of_the_plain_reference(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    batches = tiny.batches(network, 2)
    given = exact_scores(network, structure, structure.groups, batches, factor=FACTOR, seed=0)
    assert_scores_close(given, reference_scores(network, structure, batches, FACTOR))


@pytest.mark.parametrize("name", ["vit", "bert_classifier"])
@pytest.mark.parametrize("tokens", [1, 100])
def test_stacks_of_any_size_give_the_same_scores(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    batches = tiny.batches(network, 1, size=4)
    whole = exact_scores(network, structure, structure.groups, batches, factor=FACTOR, seed=0)
    monkeypatch.setattr(trajectory, "_STACKED_TOKENS", tokens)
    steps: list[int] = []
    parts = exact_scores(network, structure, structure.groups, batches, factor=FACTOR, seed=0, advance=steps.append)
    assert_scores_close(parts, whole)
    assert sum(steps) == sum(g.units for g in structure.groups)
    assert len(steps) > len(structure.groups)


def test_only_the_groups_asked_for_are_scored() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    batches = tiny.batches(network, 1)
    every = exact_scores(network, structure, structure.groups, batches, factor=1.0, seed=0)
    given = exact_scores(network, structure, structure.groups[2:3], batches, factor=1.0, seed=0)
    assert_scores_close(given, {"blocks.1.attn": every["blocks.1.attn"]})


def padded(batch: tiny.Batch, columns: int) -> tiny.Batch:
    return {n: F.pad(t, (0, columns), value=0 if n == "attention_mask" else 9) for n, t in batch.items()}


@pytest.mark.parametrize("name", ["bert", "bert_classifier", "distilbert", "electra"])
def test_padding_does_not_change_scores(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    batches = tiny.batches(network, 2)
    more = [padded(b, 4) for b in batches]
    given, expected = (
        exact_scores(network, structure, structure.groups, b, factor=FACTOR, seed=0) for b in (more, batches)
    )
    assert_scores_close(given, expected)
    given, expected = (
        sketch_scores(network, structure, b, probes=3, weights=(1.0, FACTOR), seed=0) for b in (more, batches)
    )
    assert_scores_close(given, expected, rtol=1e-3)


def very_tiny(classes: int) -> tuple[Network, Structure, tiny.Batch]:
    network = tiny.vit(embed_dim=8, num_heads=2, mlp_ratio=0.75, num_classes=classes, global_pool="token")
    return network, describe(network.module, network.inputs), tiny.images("x", 1, seed=4)


def jacobians(network: Network, structure: Structure, batch: tiny.Batch) -> tuple[dict[str, Tensor], Tensor | None]:
    """Second-order scores of every unit from explicit derivatives: the manifold part and the task part."""

    def forward(mask: Tensor) -> tuple[Tensor, ...]:
        handles = []
        for group, part in zip(structure.groups, mask.split([g.units for g in structure.groups]), strict=True):
            factors = part.repeat_interleave(group.width)
            output = network.module.get_submodule(group.output)
            handles.append(output.register_forward_pre_hook(lambda _, args, f=factors: (args[0] * f,)))
        features: list[Tensor] = []
        for block in structure.blocks:
            handles.append(network.module.get_submodule(block).register_forward_hook(lambda *a: features.append(a[2])))
        output = next(iter(network.forward(batch).values()))
        for handle in handles:
            handle.remove()
        normed = [f.flatten(0, 1) / f.flatten(0, 1).norm(dim=1, keepdim=True) for f in features]
        return (*(n @ n.T for n in normed), output)

    ones = torch.ones(sum(g.units for g in structure.groups))
    *grams, logits = torch.autograd.functional.jacobian(forward, ones)
    weights = [1.0] * (len(grams) - 1) + [0.5]
    manifold = sum(w * g.square().sum((0, 1)) for w, g in zip(weights, grams, strict=True))
    p = torch.softmax(network.forward(batch)[network.logits] / 4, dim=-1) if network.logits else None
    if p is None:
        task = 0.5 * grams[-1].square().sum((0, 1))
    else:
        task = sum(0.5 * d.T @ (q.diag() - q.outer(q)) @ d for d, q in zip(logits, p, strict=True)).diagonal()
    units = [g.units for g in structure.groups]
    names = [g.name for g in structure.groups]
    return tuple(dict(zip(names, part.detach().double().split(units), strict=True)) for part in (manifold, task))


@pytest.mark.parametrize(
    ("weights", "part", "headless"), [((1.0, 0.0), 0, False), ((0.0, 1.0), 1, False), ((0.0, 1.0), 1, True)]
)
def test_the_sketch_is_unbiased(weights: tuple[float, float], part: int, headless: bool) -> None:
    network, structure, batch = very_tiny(classes=4)
    if headless:
        network = Network(network.module, network.inputs, network.outputs, network.source, "random")
    probes = 2000
    given = sketch_scores(network, structure, [batch], probes=probes, weights=weights, seed=0)
    expected = jacobians(network, structure, batch)[part]
    # The variance of a squared sum of random signs is at most twice its squared mean.
    deviation = math.sqrt(2 / probes)
    ratios = torch.cat([given[n] / expected[n] for n in expected])
    assert float((ratios - 1).abs().max()) < 4 * deviation
    assert float((ratios.mean() - 1).abs()) < 1.5 * deviation


def test_both_parts_of_the_sketch_add_up() -> None:
    network, structure, batch = very_tiny(classes=4)
    given = sketch_scores(network, structure, [batch], probes=1000, weights=(1.0, 5.0), seed=1)
    manifold, task = jacobians(network, structure, batch)
    ratios = torch.cat([given[n] / (manifold[n] + 5 * task[n]) for n in manifold])
    assert float((ratios.mean() - 1).abs()) < 0.05


@pytest.mark.parametrize("name", ["vit", "vit_pooled", "bert_classifier", "distilbert"])
def test_the_sketch_ranks_neurons_as_the_exact_scores_do(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    batches = tiny.batches(network, 4)
    neurons = [g for g in structure.groups if g.kind == "neuron"]
    exact = exact_scores(network, structure, neurons, batches, factor=1.0, seed=0)
    sketch = sketch_scores(network, structure, batches, probes=32, weights=(1.0, 1.0), seed=0)
    for group in neurons:
        assert scipy.stats.spearmanr(sketch[group.name], exact[group.name]).statistic > 0.85


def test_one_seed_makes_one_sketch() -> None:
    network, structure = tiny.network("bert_classifier"), tiny.structure("bert_classifier")
    batches = tiny.batches(network, 2)
    first, again, other = (
        sketch_scores(network, structure, batches, probes=2, weights=(1.0, 1.0), seed=s) for s in (3, 3, 4)
    )
    assert all(first[n].numpy().tobytes() == again[n].numpy().tobytes() for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)
    assert all(s.dtype == torch.float64 and bool((s >= 0).all()) for s in first.values())


def test_batches_have_probes_of_their_own() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    batch = tiny.images("x", seed=1)
    one = sketch_scores(network, structure, [batch], probes=2, weights=(1.0, 1.0), seed=0)
    two = sketch_scores(network, structure, [batch, batch], probes=2, weights=(1.0, 1.0), seed=0)
    assert not any(torch.allclose(two[n], 2 * one[n]) for n in one)


def test_scoring_leaves_the_network_as_it_was() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    before = {k: v.clone() for k, v in network.module.state_dict().items()}
    steps: list[int] = []
    batches = tiny.batches(network, 2)
    sketch_scores(network, structure, batches, probes=3, weights=(1.0, 1.0), seed=0, advance=steps.append)
    exact_scores(network, structure, structure.groups, batches, factor=1.0, seed=0)
    assert steps == [1] * 6
    assert all(torch.equal(before[k], v) for k, v in network.module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in network.module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.module.modules())


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_the_task_factor_brings_both_parts_to_one_size(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    batch = tiny.batches(network, 1)[0]
    factor = task_factor(network, structure, batch, 2.0, seed=0)
    parts = [
        sketch_scores(network, structure, [batch], probes=200, weights=w, seed=1) for w in ((1.0, 0.0), (0.0, factor))
    ]
    manifold, task = (sum(float(s.sum()) for s in part.values()) for part in parts)
    assert 0.5 < task / (2.0 * manifold) < 2.0


def test_sampled_tokens() -> None:
    valid = torch.rand(20, 100, generator=torch.Generator().manual_seed(0)) < 0.5
    given = sample_tokens(2000, valid, seed=1)
    assert len(given) == 768
    assert bool((given.diff() > 0).all())
    assert bool(valid.flatten()[given].all())
    assert torch.equal(given, sample_tokens(2000, valid, seed=1))
    assert not torch.equal(given, sample_tokens(2000, valid, seed=2))
    assert sample_tokens(5, None, seed=0).tolist() == [0, 1, 2, 3, 4]


def test_sampled_tokens_ignore_a_mask_of_another_shape() -> None:
    assert sample_tokens(4, torch.zeros(1, 3).bool(), seed=0).tolist() == [0, 1, 2, 3]


def test_scores_are_of_the_sampled_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory, "GRAM_TOKENS", 4)
    network, structure = tiny.network("bert"), tiny.structure("bert")
    batch = tiny.batches(network, 1)[0]
    chosen = sample_tokens(batch["attention_mask"].numel(), batch["attention_mask"].bool(), seed=7)
    given = exact_scores(network, structure, structure.groups, [batch], factor=0.0, seed=7)
    group = structure.groups[-1]
    last = network.module.get_submodule(structure.blocks[-1])
    seen: list[Tensor] = []
    handle = last.register_forward_hook(lambda *a: seen.append(a[2].flatten(0, 1)[chosen].double()))
    with torch.no_grad():
        network.forward(batch)
        for unit in range(group.units):
            masked = without_unit(network, group, unit)
            network.forward(batch)
            masked.remove()
    handle.remove()
    moved = torch.stack([(cosines(s) - cosines(seen[0])).square().sum() for s in seen[1:]])
    assert_scores_close(given, {**given, group.name: 0.5 * moved})


def test_gram_of_stacked_copies() -> None:
    features = torch.randn(6, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([0, 3, 15])
    given = gram(features, tokens, copies=3)
    for copy, matrix in zip(features.chunk(3), given, strict=True):
        torch.testing.assert_close(matrix.double(), cosines(copy.reshape(-1, 5)[tokens].double()), rtol=0, atol=1e-6)


def test_small_changes_of_the_logits_are_not_lost_in_rounding() -> None:
    network = tiny.vit()
    structure = describe(network.module, network.inputs)
    last = structure.groups[-1]
    network.module.get_parameter(f"{last.output}.weight").data *= 1e-2
    batches = tiny.batches(network, 1)
    given = exact_scores(network, structure, [last], batches, factor=100.0, seed=0)[last.name]
    expected = reference_scores(network, structure, batches, 100.0)[last.name]
    assert bool((given > 0).all())
    torch.testing.assert_close(given, expected, rtol=0.01, atol=1e-3 * float(expected.max()))


def test_only_the_units_asked_for_are_scored() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    batches = tiny.batches(network, 2)
    every = exact_scores(network, structure, structure.groups, batches, factor=1.0, seed=0)
    only = {"blocks.0.mlp": (3, 20), "blocks.1.attn": (1,)}
    steps: list[int] = []
    given = exact_scores(
        network, structure, structure.groups, batches, factor=1.0, seed=0, only=only, advance=steps.append
    )
    for name, units in only.items():
        others = [u for u in range(len(every[name])) if u not in units]
        every[name][others] = 0.0
    assert_scores_close(given, every)
    assert sum(steps) == 2 * (4 + 2 + 1 + 24)
