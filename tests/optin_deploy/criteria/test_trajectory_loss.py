import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import tiny
import torch
from torch import Tensor, nn

from optin_deploy.criteria import trajectory_loss
from optin_deploy.criteria.trajectory_loss import (
    LossSettings,
    Trajectory,
    chunks,
    class_axis,
    differentiable,
    gradients,
    gram,
    probe_losses,
    sample_tokens,
    signs,
    softmax_probe,
)
from optin_deploy.nn.task_head import HeadKind

pytestmark = pytest.mark.slow


# Shape of an output -> what its numbers mean, None where it is not a task head's.
OUTPUTS = [
    ((3, 4), "classes"),
    ((3, 7, 4), "classes"),
    ((3, 4, 2, 3), "classes"),
    ((3,), "binary"),
    ((3, 1), "binary"),
    ((3, 5), "binary"),
    ((3, 7, 4), "binary"),
    ((3, 1, 2, 3), "binary"),
    ((3,), "regression"),
    ((3, 2), "regression"),
    ((3, 7, 4), "regression"),
    ((3,), None),
    ((3, 5), None),
    ((3, 7, 4), None),
    ((3, 4, 2, 3), None),
]


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trajectory_of(shape: tuple[int, ...], head: HeadKind | None) -> Trajectory:
    """Of a network with an output of that shape; with 7 tokens, some are padding."""
    name = "bert" if len(shape) == 3 else "vit"
    network = replace(tiny.network(name), logits="output" if head else None, head=head or "classes")
    return Trajectory(network, tiny.structure(name), network.inputs, seed=0)


def plain_task(trajectory: Trajectory, y: Tensor, moved: Tensor) -> Tensor:
    """Slow and plain: sample by sample, token by token, pixel by pixel."""
    total = torch.zeros((), dtype=torch.float64)
    mask = trajectory.inputs.get("attention_mask")
    for sample in range(len(y)):
        positions = [()]
        if y.dim() == 3:
            positions = [(t,) for t in range(y.shape[1]) if mask is None or mask[sample, t]]
        elif y.dim() == 4:
            positions = [(slice(None), r, c) for r in range(y.shape[2]) for c in range(y.shape[3])]
        old, new = ([t[sample][p] if p else t[sample] for p in positions] for t in (y, moved))
        if trajectory.network.logits and trajectory.network.head == "regression":
            total = total + sum((a - b).square().sum() for a, b in zip(old, new, strict=True))
        elif trajectory.network.logits and trajectory.network.head == "binary":
            for a, b in zip(old, new, strict=True):
                for u, v in zip(a.reshape(-1), b.reshape(-1), strict=True):
                    p, q = 1 / (1 + (-u / 4).exp()), 1 / (1 + (-v / 4).exp())
                    total = total + 16 * (p * (p / q).log() + (1 - p) * ((1 - p) / (1 - q)).log())
        elif trajectory.network.logits:
            for a, b in zip(old, new, strict=True):
                p, q = torch.softmax(a / 4, dim=0), torch.softmax(b / 4, dim=0)
                total = total + 16 * sum(p[k] * (p[k].log() - q[k].log()) for k in range(len(p)))
        else:
            size = sum(a.square().sum() for a in old)
            total = total + sum((a - b).square().sum() for a, b in zip(old, new, strict=True)) / size
    return total


def second_order(function: Callable[[Tensor], Tensor]) -> float:
    """Half the second derivative at 0."""
    at = torch.zeros((), dtype=torch.float64, requires_grad=True)
    (first,) = torch.autograd.grad(function(at), at, create_graph=True)
    return float(torch.autograd.grad(first, at)[0]) / 2


class Basis:
    """In the place of `signs`: zeros, with a single one at one place of all that are asked for.

    What is linear in the signs has a mean square equal to the sum of its squares over all places.
    """

    def __init__(self) -> None:
        self.place, self.asked = 0, 0

    def __call__(self, like: Tensor, _: torch.Generator) -> Tensor:
        given = torch.zeros(like.numel(), dtype=like.dtype)
        if 0 <= self.place - self.asked < like.numel():
            given[self.place - self.asked] = 1.0
        self.asked += like.numel()
        return given.reshape(like.shape)


def mean_square(function: Callable[[], Tensor], monkeypatch: pytest.MonkeyPatch) -> float:
    """The mean over all random signs of the square of what is linear in them."""
    basis, total = Basis(), 0.0
    monkeypatch.setattr(trajectory_loss, "signs", basis)
    while True:
        basis.asked = 0
        value = float(function())
        if basis.place >= basis.asked:
            return total
        total += value**2
        basis.place += 1


@pytest.mark.parametrize(("shape", "head"), OUTPUTS)
def test_probes_have_the_task_term_as_mean_square(
    shape: tuple[int, ...], head: HeadKind | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    trajectory, y, change = trajectory_of(shape, head), random(*shape), random(*shape, seed=1)
    generator = torch.Generator()
    given = mean_square(lambda: torch.sum(trajectory.task_probe("output", y, generator) * change), monkeypatch)
    expected = second_order(lambda step: plain_task(trajectory, y, y + step * change))
    assert given == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(("shape", "head"), OUTPUTS)
def test_many_probes_come_near_the_task_term(shape: tuple[int, ...], head: HeadKind | None) -> None:
    trajectory, y, change = trajectory_of(shape, head), random(*shape), random(*shape, seed=1)
    generator, probes = torch.Generator().manual_seed(0), 2000
    squares = [float(torch.sum(trajectory.task_probe("output", y, generator) * change)) ** 2 for _ in range(probes)]
    expected = second_order(lambda step: plain_task(trajectory, y, y + step * change))
    # The variance of a squared sum of random signs is at most twice its squared mean.
    assert sum(squares) / probes == pytest.approx(expected, rel=4 * math.sqrt(2 / probes))


@pytest.mark.parametrize(("shape", "head"), OUTPUTS)
def test_changes_are_those_of_the_plain_loop(shape: tuple[int, ...], head: HeadKind | None) -> None:
    trajectory, y, copies = trajectory_of(shape, head), random(*shape), 3
    moved = y + torch.stack([0.1 * random(*shape, seed=s) for s in range(copies)])
    given = trajectory.task_change("output", y.float(), moved.flatten(0, 1).float(), copies)
    expected = torch.stack([plain_task(trajectory, y, m) for m in moved])
    assert given.shape == (copies,)
    torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(("shape", "head"), OUTPUTS)
def test_squares_of_roots_sum_to_the_task_term(shape: tuple[int, ...], head: HeadKind | None) -> None:
    trajectory, y = trajectory_of(shape, head), random(*shape)
    changes = torch.stack([random(*shape, seed=s) for s in range(3)])
    given = trajectory.task_root("output", y, changes.flatten(0, 1))
    assert given.shape == changes.shape
    for root, change in zip(given, changes, strict=True):
        expected = second_order(lambda step, change=change: plain_task(trajectory, y, y + step * change))
        assert float(root.square().sum()) == pytest.approx(expected, rel=1e-9)


def test_an_output_that_is_zero_gives_no_nan() -> None:
    trajectory, y = trajectory_of((3, 5), None), torch.zeros(3, 5)
    assert bool(trajectory.task_probe("output", y, torch.Generator()).isfinite().all())
    assert bool(trajectory.task_change("output", y, y, 1).isfinite().all())


@pytest.mark.parametrize("scale", [0.1, 1.0, 30.0])
def test_one_logit_loses_what_two_do(scale: float) -> None:
    """With z = z1 - z0 the sigmoid is the softmax of both, at every temperature."""
    one, two = trajectory_of((6, 1), "binary"), trajectory_of((6, 2), "classes")
    z, change = scale * random(6, 2), random(6, 2, seed=1)
    single, moved = (t[:, 1:] - t[:, :1] for t in (z, z + change))
    expected = two.task_change("output", z, z + change, 1)
    torch.testing.assert_close(one.task_change("output", single, moved, 1), expected, rtol=1e-9, atol=1e-300)
    root = one.task_root("output", single, moved - single)
    torch.testing.assert_close(
        root.square().sum(), two.task_root("output", z, change).square().sum(), rtol=1e-9, atol=0
    )


def test_a_logit_far_on_the_yes_side_counts_as_one_on_the_no_side() -> None:
    roots = trajectory_loss.sigmoid_root(torch.tensor([-200.0, 200.0]))
    assert float(roots[0]) == float(roots[1]) > 0


@pytest.mark.parametrize("shape", [(16, 4), (16, 1, 4), (16, 4, 1, 1), (16, 4, 1, 1, 1)])
def test_softmax_probes_have_the_fisher_information_as_covariance(
    shape: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    patterns = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0], dtype=torch.float64)] * 4)
    monkeypatch.setattr(trajectory_loss, "signs", lambda like, _: patterns.reshape(like.shape))
    logits = random(4)
    given = softmax_probe(logits.expand(16, 4).reshape(shape), torch.Generator()).reshape(16, 4)
    p = torch.softmax(logits / 4, dim=0)
    torch.testing.assert_close(given.T @ given / 16, 0.5 * (p.diag() - p.outer(p)))
    assert class_axis(torch.zeros(shape)) % len(shape) == shape.index(4)


@pytest.mark.parametrize("manifold", [0.0, 0.3])
def test_parts_of_the_loss_add_up(manifold: float, monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny.randomised(TwoHeads())
    network = replace(tiny.network_around(module, tiny.images("x", 2)), logits="output_0")
    structure = tiny.describe(module, network.inputs)
    trajectory = Trajectory(network, structure, network.inputs, seed=0)
    with torch.no_grad():
        blocks, outputs = trajectory.run()
    grams = {n: g.double() for n, g in trajectory.grams(blocks).items()}
    moves = {n: random(*g.shape, seed=3) for n, g in grams.items()}
    changes = {n: random(*y.shape, seed=4) for n, y in outputs.items()}
    factors = {"output_0": 2.0, "output_1": 0.7, "output_2": 0.0}

    def derivative() -> Tensor:
        """Of the loss when everything changes."""
        at = torch.zeros((), dtype=torch.float64, requires_grad=True)
        given = {n: g + at * moves[n] for n, g in grams.items()}, {n: y + at * changes[n] for n, y in outputs.items()}
        return torch.autograd.grad(
            probe_losses(trajectory, *given, LossSettings(factors, manifold), torch.Generator()), at
        )[0]

    expected = manifold * sum(float(m.square().sum()) for m in moves.values())
    for name, factor in factors.items():
        part = Trajectory(
            replace(network, logits=name if name == network.logits else None), structure, network.inputs, 0
        )
        y = outputs[name].double()
        expected += factor * second_order(lambda step, y=y, n=name, p=part: plain_task(p, y, y + step * changes[n]))
    assert mean_square(derivative, monkeypatch) == pytest.approx(expected, rel=1e-5)


class TwoHeads(nn.Module):
    """A ViT with class logits, an embedding, and class numbers, which nothing is compared on."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone, self.head = tiny._vit(num_classes=0), nn.Linear(tiny.WIDTH, 3)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.backbone(x)
        return self.head(x), x, x.tanh(), self.head(x).argmax(1)


def test_only_outputs_of_real_numbers_are_compared() -> None:
    network = tiny.network_around(tiny.randomised(TwoHeads()), tiny.images("x"))
    trajectory = Trajectory(network, tiny.describe(network.module, network.inputs), network.inputs, seed=0)
    assert list(trajectory.run()[1]) == ["output_0", "output_1", "output_2"]


@pytest.mark.parametrize("head", ["classes", "binary", "regression", None])
def test_padding_draws_no_signs(head: HeadKind | None) -> None:
    trajectory, y = trajectory_of((3, 7, 4), head), random(3, 7, 4)
    valid = trajectory.inputs["attention_mask"].bool()
    given = trajectory.task_probe("output", y, torch.Generator().manual_seed(0))
    assert not bool(given[~valid].any())
    trajectory.valid = torch.nn.functional.pad(valid, (0, 2))
    wider = trajectory.task_probe(
        "output", torch.nn.functional.pad(y, (0, 0, 0, 2), value=5.0), torch.Generator().manual_seed(0)
    )
    assert not bool(wider[:, 7:].any())
    torch.testing.assert_close(wider[:, :7], given)


def test_gradients_of_what_does_not_depend_on_a_leaf_are_zero() -> None:
    leaves = [torch.ones(2, requires_grad=True), torch.ones(3, requires_grad=True)]
    assert [g.tolist() for g in gradients(torch.ones(()), leaves, keep=True)] == [[0, 0], [0, 0, 0]]
    assert [g.tolist() for g in gradients(2 * leaves[0].sum(), leaves, keep=False)] == [[2, 2], [0, 0, 0]]
    assert float(probe_losses(trajectory_of((3, 5), None), {}, {}, LossSettings(manifold=0.0), torch.Generator())) == 0


# Gram matrices


def cosines(tokens: Tensor) -> Tensor:
    matrix = torch.zeros(len(tokens), len(tokens), dtype=torch.float64)
    for i, a in enumerate(tokens):
        # A position may be zero behind a ReLU.
        matrix[i] = (tokens @ a) / (tokens.norm(dim=1) * a.norm()).clamp_min(1e-12)
    return matrix


@pytest.mark.parametrize("name", ["vit", "bert", "resnet", "plain_resnet"])
def test_grams_of_blocks(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    batch = tiny.batches(network, 1)[0]
    trajectory = Trajectory(network, structure, batch, seed=0)
    with torch.no_grad():
        blocks, _ = trajectory.run()
        twice, _ = trajectory.run(copies=2)
    given, stacked = trajectory.grams(blocks), trajectory.grams(twice, copies=2)
    assert tuple(given) == structure.blocks
    for block, output in blocks.items():
        y = (output[0] if isinstance(output, tuple) else output).double()
        if y.dim() == 4:
            # Each position of a map is a token, its channels are the features.
            tokens = [y[b, :, i, j] for b in range(len(y)) for i in range(y.shape[2]) for j in range(y.shape[3])]
        else:
            mask = batch.get("attention_mask", torch.ones(y.shape[:2]))
            tokens = [y[b, t] for b in range(len(y)) for t in range(y.shape[1]) if mask[b, t]]
        expected = cosines(torch.stack(tokens)) * (0.5**0.5 if block == structure.blocks[-1] else 1.0)
        torch.testing.assert_close(given[block][0].double(), expected, rtol=0, atol=1e-5)
        for copy in stacked[block]:
            torch.testing.assert_close(copy, given[block][0], rtol=0, atol=1e-5)


def test_gram_of_stacked_copies() -> None:
    features = torch.randn(6, 2, 4, 5, generator=torch.Generator().manual_seed(0))
    tokens = torch.tensor([0, 3, 15])
    given = gram(features, tokens, copies=3)
    for copy, matrix in zip(features.chunk(3), given, strict=True):
        torch.testing.assert_close(matrix.double(), cosines(copy.reshape(-1, 5)[tokens].double()), rtol=0, atol=1e-6)


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


# Small parts


def test_signs() -> None:
    like = torch.zeros(100, 100, dtype=torch.float64)
    given, again, other = (signs(like, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert given.dtype == like.dtype
    assert given.unique().tolist() == [-1.0, 1.0]
    assert abs(float(given.mean())) < 0.04
    assert torch.equal(given, again)
    assert not torch.equal(given, other)


def test_chunks() -> None:
    batches = [tiny.texts(5), tiny.texts(2, seed=1)]
    given = chunks(batches, 2)
    assert [len(c["input_ids"]) for c in given] == [2, 2, 1, 2]
    for name in ("input_ids", "attention_mask"):
        assert torch.equal(torch.cat([c[name] for c in given]), torch.cat([b[name] for b in batches]))


def test_gradients_flow_to_no_parameter() -> None:
    network = tiny.network("vit")
    with torch.no_grad(), differentiable(network):
        assert torch.is_grad_enabled()
        assert not any(p.requires_grad for p in network.module.parameters())
    assert all(p.requires_grad for p in network.module.parameters())
