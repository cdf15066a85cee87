import math

import pytest
import scipy.stats
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy.criteria import trajectory, trajectory_loss
from optin_deploy.criteria.trajectory import exact_scores, sketch_scores, task_factors
from optin_deploy.criteria.trajectory_loss import LossSettings, sample_tokens
from optin_deploy.network import Network
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Group, Structure

pytestmark = pytest.mark.slow


FACTOR = 3.0
MODELS = [
    "vit",
    "vit_layer_scale",
    "deit_distilled",
    "dinov2",
    "bert",
    "bert_classifier",
    "distilbert",
    "segmenter",
    "upsampler",
    "resnet",
    "plain_resnet",
]


def structure_of(name: str) -> Structure:
    """Heads, neurons and channels."""
    return tiny.structure(name).without_widths()


def same_factors(network: Network, factor: float) -> dict[str, float]:
    return dict.fromkeys(network.outputs, factor)


def run_with_features(
    network: Network, structure: Structure, batch: tiny.Batch
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The tokens of every block, ``(all tokens, width)`` with padding left out, and the outputs, in float64."""
    features: list[Tensor] = []

    def keep(_: nn.Module, __: object, output: object) -> None:
        tokens = (output[0] if isinstance(output, tuple) else output).double()
        tokens = tokens.movedim(1, -1).flatten(1, 2) if tokens.dim() == 4 else tokens
        real = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(tokens.shape[:2]).bool()
        features.append(tokens[real])

    handles = [network.module.get_submodule(b).register_forward_hook(keep) for b in structure.compared]
    outputs = network.forward(batch)
    for handle in handles:
        handle.remove()
    return features, {n: y.double() for n, y in outputs.items()}


def task_terms(network: Network, batch: tiny.Batch, dense: dict[str, Tensor], changed: dict[str, Tensor]) -> float:
    """Of all outputs: KL for class logits, else the change relative to each sample's norm."""
    total = 0.0
    for name, y in dense.items():
        if name == network.logits:
            p, q = (torch.softmax(t / 4, dim=-1) for t in (y, changed[name]))
            total += 16 * float((p * (p / q).log()).sum())
            continue
        for i in range(len(y)):
            # Rows of an output with a row for each token.
            mask = batch.get("attention_mask")
            rows = mask[i].bool() if mask is not None and y.dim() == 3 else slice(None)
            total += float((changed[name][i][rows] - y[i][rows]).square().sum() / y[i][rows].square().sum())
    return total


def without_unit(network: Network, group: Group, unit: int) -> object:
    def zero(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        for feature in range(unit * group.width, (unit + 1) * group.width):
            x.select(group.axis, feature).zero_()
        return (x,)

    return network.module.get_submodule(group.output).register_forward_pre_hook(zero)


def cosines(tokens: Tensor) -> Tensor:
    matrix = torch.zeros(len(tokens), len(tokens), dtype=torch.float64)
    for i, a in enumerate(tokens):
        # A position may be zero behind a ReLU.
        matrix[i] = (tokens @ a) / (tokens.norm(dim=1) * a.norm()).clamp_min(1e-12)
    return matrix


@torch.no_grad()
def reference_scores(
    network: Network, structure: Structure, batches: list[tiny.Batch], factor: float
) -> dict[str, Tensor]:
    """Slow and plain: a full forward per unit, every block's Gram matrix, earlier blocks too."""
    scores = {g.name: torch.zeros(g.units, dtype=torch.float64) for g in structure.groups}
    for batch in batches:
        dense, dense_outputs = run_with_features(network, structure, batch)
        for group in structure.groups:
            for unit in range(group.units):
                handle = without_unit(network, group, unit)
                changed, outputs = run_with_features(network, structure, batch)
                handle.remove()
                moved = [float((cosines(a) - cosines(b)).square().sum()) for a, b in zip(dense, changed, strict=True)]
                moved[-1] *= 0.5
                task = task_terms(network, batch, dense_outputs, outputs)
                scores[group.name][unit] += sum(moved) + factor * task
    return scores


def assert_scores_close(given: dict[str, Tensor], expected: dict[str, Tensor], rtol: float = 1e-4) -> None:
    assert given.keys() == expected.keys()
    largest = max(float(s.max()) for s in expected.values())
    for name, scores in expected.items():
        torch.testing.assert_close(given[name], scores, rtol=rtol, atol=1e-6 * largest)


@pytest.mark.parametrize("name", MODELS)
def test_exact_scores_are_those_of_the_plain_reference(name: str) -> None:
    network, structure = tiny.network(name), structure_of(name)
    batches = tiny.batches(network, 2)
    given = exact_scores(
        network, structure, structure.groups, batches, LossSettings(factors=same_factors(network, FACTOR), seed=0)
    )
    assert_scores_close(given, reference_scores(network, structure, batches, FACTOR))


@pytest.mark.parametrize("name", ["vit", "bert_classifier"])
@pytest.mark.parametrize("tokens", [1, 100])
def test_stacks_of_any_size_give_the_same_scores(name: str, tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    network, structure = tiny.network(name), structure_of(name)
    batches = tiny.batches(network, 1, size=4)
    whole = exact_scores(
        network, structure, structure.groups, batches, LossSettings(factors=same_factors(network, FACTOR), seed=0)
    )
    monkeypatch.setattr(trajectory, "STACKED_TOKENS", tokens)
    parts = exact_scores(
        network, structure, structure.groups, batches, LossSettings(factors=same_factors(network, FACTOR), seed=0)
    )
    assert_scores_close(parts, whole)


def test_only_the_groups_asked_for_are_scored() -> None:
    network, structure = tiny.network("vit"), structure_of("vit")
    batches = tiny.batches(network, 1)
    every = exact_scores(
        network, structure, structure.groups, batches, LossSettings(factors=same_factors(network, 1.0), seed=0)
    )
    given = exact_scores(
        network, structure, structure.groups[2:3], batches, LossSettings(factors=same_factors(network, 1.0), seed=0)
    )
    assert_scores_close(given, {"blocks.1.attn": every["blocks.1.attn"]})


def padded(batch: tiny.Batch, columns: int) -> tiny.Batch:
    return {n: F.pad(t, (0, columns), value=0 if n == "attention_mask" else 9) for n, t in batch.items()}


@pytest.mark.parametrize("name", ["bert", "bert_classifier", "distilbert", "electra"])
def test_padding_does_not_change_scores(name: str) -> None:
    network, structure = tiny.network(name), structure_of(name)
    batches = tiny.batches(network, 2)
    more = [padded(b, 4) for b in batches]
    given, expected = (
        exact_scores(
            network, structure, structure.groups, b, LossSettings(factors=same_factors(network, FACTOR), seed=0)
        )
        for b in (more, batches)
    )
    assert_scores_close(given, expected)
    given, expected = (
        sketch_scores(network, structure, b, LossSettings(factors=same_factors(network, FACTOR), seed=0), probes=3)
        for b in (more, batches)
    )
    assert_scores_close(given, expected, rtol=1e-3)


def very_tiny(classes: int) -> tuple[Network, Structure, tiny.Batch]:
    network = tiny.vit(embed_dim=8, num_heads=2, mlp_ratio=0.75, num_classes=classes, global_pool="token")
    return network, describe(network.module, network.inputs).without_widths(), tiny.images("x", 1, seed=4)


def jacobians(network: Network, structure: Structure, batch: tiny.Batch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
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
    *grams, output = torch.autograd.functional.jacobian(forward, ones)
    weights = [1.0] * (len(grams) - 1) + [0.5]
    manifold = sum(w * g.square().sum((0, 1)) for w, g in zip(weights, grams, strict=True))
    dense = next(iter(network.forward(batch).values()))
    if network.logits:
        p = torch.softmax(dense / 4, dim=-1)
        task = sum(0.5 * d.T @ (q.diag() - q.outer(q)) @ d for d, q in zip(output, p, strict=True)).diagonal()
    else:
        task = sum(d.square().sum(0) / y.square().sum() for d, y in zip(output, dense, strict=True))
    units = [g.units for g in structure.groups]
    names = [g.name for g in structure.groups]
    return tuple(dict(zip(names, part.detach().double().split(units), strict=True)) for part in (manifold, task))


@pytest.mark.parametrize(("part", "headless"), [(0, False), (1, False), (1, True)])
def test_the_sketch_is_unbiased(part: int, headless: bool) -> None:
    network, structure, batch = very_tiny(classes=4)
    if headless:
        network = Network(network.module, network.inputs, network.outputs, network.source, "random")
    probes = 2000
    factors, manifold = same_factors(network, float(part)), float(1 - part)
    given = sketch_scores(
        network, structure, [batch], LossSettings(factors=factors, manifold=manifold, seed=0), probes=probes
    )
    expected = jacobians(network, structure, batch)[part]
    # The variance of a squared sum of random signs is at most twice its squared mean.
    deviation = math.sqrt(2 / probes)
    ratios = torch.cat([given[n] / expected[n] for n in expected])
    assert float((ratios - 1).abs().max()) < 4 * deviation
    assert float((ratios.mean() - 1).abs()) < 1.5 * deviation


def test_both_parts_of_the_sketch_add_up() -> None:
    network, structure, batch = very_tiny(classes=4)
    given = sketch_scores(
        network, structure, [batch], LossSettings(factors=same_factors(network, 5.0), seed=1), probes=1000
    )
    manifold, task = jacobians(network, structure, batch)
    ratios = torch.cat([given[n] / (manifold[n] + 5 * task[n]) for n in manifold])
    assert float((ratios.mean() - 1).abs()) < 0.05


@pytest.mark.parametrize("name", ["vit", "vit_pooled", "bert_classifier", "distilbert"])
def test_the_sketch_ranks_neurons_as_the_exact_scores_do(name: str) -> None:
    network, structure = tiny.network(name), structure_of(name)
    batches = tiny.batches(network, 4)
    neurons = [g for g in structure.groups if g.kind == "neuron"]
    exact = exact_scores(network, structure, neurons, batches, LossSettings(factors=same_factors(network, 1.0), seed=0))
    sketch = sketch_scores(
        network, structure, batches, LossSettings(factors=same_factors(network, 1.0), seed=0), probes=32
    )
    for group in neurons:
        assert scipy.stats.spearmanr(sketch[group.name], exact[group.name]).statistic > 0.85


def test_one_seed_makes_one_sketch() -> None:
    network, structure = tiny.network("bert_classifier"), structure_of("bert_classifier")
    batches = tiny.batches(network, 2)
    first, again, other = (
        sketch_scores(network, structure, batches, LossSettings(factors=same_factors(network, 1.0), seed=s), probes=2)
        for s in (3, 3, 4)
    )
    assert all(first[n].numpy().tobytes() == again[n].numpy().tobytes() for n in first)
    assert not any(torch.equal(first[n], other[n]) for n in first)
    assert all(s.dtype == torch.float64 and bool((s >= 0).all()) for s in first.values())


def test_batches_have_probes_of_their_own() -> None:
    network, structure = tiny.network("vit"), structure_of("vit")
    batch = tiny.images("x", seed=1)
    one = sketch_scores(network, structure, [batch], LossSettings(factors=same_factors(network, 1.0), seed=0), probes=2)
    two = sketch_scores(
        network, structure, [batch, batch], LossSettings(factors=same_factors(network, 1.0), seed=0), probes=2
    )
    assert not any(torch.allclose(two[n], 2 * one[n]) for n in one)


def test_scoring_leaves_the_network_as_it_was() -> None:
    network, structure = tiny.network("vit"), structure_of("vit")
    before = {k: v.clone() for k, v in network.module.state_dict().items()}
    batches = tiny.batches(network, 2)
    sketch_scores(network, structure, batches, LossSettings(factors=same_factors(network, 1.0), seed=0), probes=3)
    exact_scores(
        network, structure, structure.groups, batches, LossSettings(factors=same_factors(network, 1.0), seed=0)
    )
    assert all(torch.equal(before[k], v) for k, v in network.module.state_dict().items())
    assert all(p.requires_grad and p.grad is None for p in network.module.parameters())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.module.modules())


def total(
    network: Network, structure: Structure, manifold: float, factors: dict[str, float], probes: int = 200
) -> float:
    scores = sketch_scores(
        network, structure, [network.inputs], LossSettings(factors=factors, manifold=manifold, seed=0), probes=probes
    )
    return sum(float(s.sum()) for s in scores.values())


@pytest.mark.parametrize("name", ["vit", "bert", "segmenter", "resnet"])
def test_task_factors_bring_both_parts_to_one_size(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory, "_FACTOR_PROBES", 50)
    network, structure = tiny.network(name), structure_of(name)
    factors = task_factors(network, structure, [network.inputs], 2.0, seed=0)
    manifold, task = total(network, structure, 1.0, {}), total(network, structure, 0.0, factors)
    assert 0.5 < task / (2.0 * manifold) < 2.0


def test_outputs_share_the_task_weight() -> None:
    class Outputs(nn.Module):
        """Class logits, an embedding a hundred times larger, a constant, and class numbers."""

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.head = tiny._vit(num_classes=0), nn.Linear(tiny.WIDTH, 3)

        def forward(self, x: Tensor) -> tuple[Tensor, ...]:
            x = self.backbone(x)
            return self.head(x), 100 * x, torch.ones(len(x), 2), self.head(x).argmax(1)

    network = tiny.network_around(tiny.randomised(Outputs()), tiny.images("x"), logits=True)
    structure = describe(network.module, network.inputs).without_widths()
    factors = task_factors(network, structure, [network.inputs], 2.0, seed=0)
    assert factors.keys() == {"output_0", "output_1", "output_2"}
    # No mask moves it.
    assert factors["output_2"] == 0.0
    manifold = total(network, structure, 1.0, {}, probes=8)
    for name in ("output_0", "output_1"):
        share = total(network, structure, 0.0, {name: factors[name]}, probes=8)
        assert share == pytest.approx(2.0 * manifold / 2, rel=1e-3)


def test_scores_are_of_the_sampled_tokens_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory_loss, "GRAM_TOKENS", 4)
    network, structure = tiny.network("bert"), structure_of("bert")
    batch = tiny.batches(network, 1)[0]
    chosen = sample_tokens(batch["attention_mask"].numel(), batch["attention_mask"].bool(), seed=7)
    given = exact_scores(
        network, structure, structure.groups, [batch], LossSettings(factors=same_factors(network, 0.0), seed=7)
    )
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


def test_small_changes_of_the_logits_are_not_lost_in_rounding() -> None:
    network = tiny.vit()
    structure = describe(network.module, network.inputs).without_widths()
    last = structure.groups[-1]
    network.module.get_parameter(f"{last.output}.weight").data *= 1e-2
    batches = tiny.batches(network, 1)
    given = exact_scores(
        network, structure, [last], batches, LossSettings(factors=same_factors(network, 100.0), seed=0)
    )[last.name]
    expected = reference_scores(network, structure, batches, 100.0)[last.name]
    assert bool((given > 0).all())
    torch.testing.assert_close(given, expected, rtol=0.01, atol=1e-3 * float(expected.max()))


def test_only_the_units_asked_for_are_scored() -> None:
    network, structure = tiny.network("vit"), structure_of("vit")
    batches = tiny.batches(network, 2)
    every = exact_scores(
        network, structure, structure.groups, batches, LossSettings(factors=same_factors(network, 1.0), seed=0)
    )
    only = {"blocks.0.mlp": (3, 20), "blocks.1.attn": (1,)}
    given = exact_scores(
        network,
        structure,
        structure.groups,
        batches,
        LossSettings(factors=same_factors(network, 1.0), seed=0),
        only=only,
    )
    for name, units in only.items():
        others = [u for u in range(len(every[name])) if u not in units]
        every[name][others] = 0.0
    assert_scores_close(given, every)
