"""Compensation of the maps that stand before units and behind the last block, and of convolutions."""

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy.compensation.pair import CompensationPair
from optin_deploy.compensation.refit import compensate
from optin_deploy.compensation.ridge import STRENGTHS
from optin_deploy.network import Network
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import output_bias, slice_network

pytestmark = pytest.mark.slow


RIDGE = 0.01
BATCHES = 6
# Of six batches, these are held out.
HELD_OUT = (1, 5)


@dataclass
class Compensated:
    """A network, its sliced copy as it was before, and after compensation."""

    network: Network
    structure: Structure
    plan: Plan
    before: nn.Module
    after: nn.Module
    strengths: Sequence[float]
    batches: list[tiny.Batch]

    @classmethod
    def of(
        cls, network: Network, structure: Structure, plan: Plan, strengths: Sequence[float] = (RIDGE,)
    ) -> "Compensated":
        before, after = (slice_network(network.module, structure, plan) for _ in range(2))
        batches = tiny.batches(network, BATCHES)
        compensate(CompensationPair(network, after, structure, plan), batches, strengths)
        return cls(network, structure, plan, before, after, strengths, batches)

    def maps(self) -> list[str]:
        """What is left of the maps that stand behind no units."""
        behind = {g.output for g in self.structure.groups}
        kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
        return [n for n, m in self.after.named_modules() if isinstance(m, kinds) and n not in behind]

    def changed(self, name: str) -> bool:
        pairs = zip(*(m.get_submodule(name).parameters() for m in (self.before, self.after)), strict=True)
        return any(not torch.equal(a, b) for a, b in pairs)


@torch.no_grad()
def seen(
    network: Network, module: nn.Module, batch: tiny.Batch, names: Sequence[str]
) -> dict[str, tuple[Tensor, Tensor]]:
    """First input and output of the named modules, as they are when these run."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    given: dict[str, Tensor] = {}
    handles = []
    for name in names:
        own = module.get_submodule(name)
        handles.append(own.register_forward_pre_hook(lambda _, a, name=name: given.update({name: a[0].clone()})))
        handles.append(
            own.register_forward_hook(lambda _, a, y, name=name: found.update({name: (given[name], y.clone())}))
        )
    network.forward(batch, module)
    for handle in handles:
        handle.remove()
    return found


def in_rows(y: Tensor, is_map: bool, batch: tiny.Batch) -> np.ndarray:
    """Features last, one row for each position; padding left out."""
    y = y.double().movedim(1, -1) if is_map else y.double()
    if "attention_mask" in batch and y.shape[:2] == batch["attention_mask"].shape:
        return y[batch["attention_mask"].bool()].numpy()
    return y.reshape(-1, y.shape[-1]).numpy()


def input_rows(module: nn.Module, x: Tensor, batch: tiny.Batch) -> np.ndarray:
    if isinstance(module, nn.Conv2d):
        x = F.unfold(x.double(), module.kernel_size, padding=module.padding, stride=module.stride).transpose(1, 2)
    if isinstance(module, nn.ConvTranspose2d):
        x = through_single_weights(module, x.double())
    return in_rows(x, False, batch)


def through_single_weights(conv: nn.ConvTranspose2d, x: Tensor) -> Tensor:
    """What each weight of one output channel gives alone: ``(batch, positions, weights)``."""
    columns = []
    for place in itertools.product(*(range(n) for n in (conv.weight.shape[0], *conv.weight.shape[2:]))):
        kernel = torch.zeros_like(conv.weight[:, :1]).double()
        kernel[place[0], 0, place[1], place[2]] = 1.0
        y = F.conv_transpose2d(x, kernel, None, conv.stride, conv.padding, conv.output_padding, dilation=conv.dilation)
        columns.append(y.flatten(1))
    return torch.stack(columns, dim=-1)


def ridge_solution(x: np.ndarray, target: np.ndarray, old: np.ndarray, ridge: float) -> np.ndarray:
    """Least squares on rows, the penalty as further rows; ``old`` has a last row for the bias, if there is one."""
    features = x.shape[1]
    design = np.hstack([x, np.ones((len(x), 1))])[:, : len(old)]
    penalty = np.sqrt(ridge * (x**2).sum(0).mean()) if features else 0.0
    design_and_penalty = np.vstack([design, penalty * np.eye(len(old))[:features]])
    missing = np.vstack([target - design @ old, np.zeros((features, target.shape[1]))])
    return old + scipy.linalg.lstsq(design_and_penalty, missing)[0]


def best_solution(
    xs: list[np.ndarray], targets: list[np.ndarray], old: np.ndarray, strengths: Sequence[float]
) -> tuple[np.ndarray, float | None]:
    """With the strength that does best on the batches held out, when fitted on the others; None: nothing helps."""
    x, target = np.concatenate(xs), np.concatenate(targets)
    if len(strengths) == 1:
        return ridge_solution(x, target, old, strengths[0]), strengths[0]
    parts = [
        [np.concatenate([each[i] for i in chosen]) for each in (xs, targets)]
        for chosen in ([i for i in range(BATCHES) if i not in HELD_OUT], HELD_OUT)
    ]

    def error(solution: np.ndarray) -> float:
        rows = np.hstack([parts[1][0], np.ones((len(parts[1][0]), 1))])[:, : len(old)]
        return float(np.square(parts[1][1] - rows @ solution).sum())

    errors = {s: error(ridge_solution(*parts[0], old, s)) for s in strengths}
    best = min(errors, key=errors.__getitem__)
    return (old, None) if errors[best] >= error(old) else (ridge_solution(x, target, old, best), best)


def kept_outputs(done: Compensated, name: str, features: int) -> list[int]:
    """Which of the features that ``name`` gives are left."""
    left = list(range(features))
    for group in done.structure.groups:
        if any(s.module == name and s.axis == "out" for s in group.sides):
            kept, size = done.plan.units(group), group.units * group.width
            left = [f for f in left if f % size // group.width in kept]
    return left


def as_matrix(module: nn.Module) -> np.ndarray:
    weight = module.weight.transpose(0, 1) if isinstance(module, nn.ConvTranspose2d) else module.weight
    rows = [weight.flatten(1).T, *([] if module.bias is None else [module.bias[None]])]
    return torch.cat(rows).detach().double().numpy()


def check_map(done: Compensated, name: str) -> float | None:
    """That a map gives the dense features by ridge regression on what it is given; the strength."""
    xs, targets = [], []
    before, after = done.before.get_submodule(name), done.after.get_submodule(name)
    for batch in done.batches:
        dense = seen(done.network, done.network.module, batch, [name])[name][1]
        target = in_rows(dense, isinstance(after, nn.Conv2d | nn.ConvTranspose2d), batch)
        targets.append(target[:, kept_outputs(done, name, target.shape[1])])
        xs.append(input_rows(after, seen(done.network, done.after, batch, [name])[name][0], batch))
    expected, strength = best_solution(xs, targets, as_matrix(before), done.strengths)
    assert np.abs(as_matrix(after) - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())
    return strength


def prepared(name: str, strengths: Sequence[float] = (RIDGE,)) -> Compensated:
    network, structure = tiny.network(name), tiny.structure(name).without_widths()
    return Compensated.of(network, structure, thinned(structure), strengths)


def thinned(structure: Structure) -> Plan:
    """Without every third unit."""
    return Plan({g.name: tuple(u for u in range(g.units) if u % 3 != 1) for g in structure.groups})


MODELS = {
    "vit": ["blocks.0.mlp.fc1", "blocks.1.attn.qkv", "blocks.1.mlp.fc1", "head"],
    "vit_gated": ["blocks.1.attn.qkv", "blocks.1.attn.gate", "head"],
    "vit_without_biases": ["blocks.1.attn.qkv", "head"],
    "deit_distilled": ["blocks.1.attn.qkv", "head", "head_dist"],
    "hf_vit": ["classifier"],
    "bert_classifier": ["bert.encoder.layer.1.attention.self.query", "bert.pooler.dense", "classifier"],
    "distilbert": [],
    "segmenter": ["backbone.blocks.1.mlp.fc1", "decoder.0"],
    "upsampler": ["backbone.blocks.1.mlp.fc1", "decoder.up1", "decoder.up3"],
    "resnet": ["layer2.0.conv1", "layer2.0.downsample.0", "fc"],
    "resnet_silu_se": ["layer2.0.conv1", "layer2.0.se.fc1", "layer2.0.se.fc2", "fc"],
    "plain_resnet": ["blocks.1.conv1", "linear"],
}


@pytest.mark.parametrize("name", MODELS)
def test_maps_follow_the_dense_features_that_are_left(name: str) -> None:
    done = prepared(name)
    changed = [m for m in done.maps() if done.changed(m)]
    assert set(MODELS[name]) <= set(changed)
    for each in changed:
        check_map(done, each)
    # All that runs behind the first projection has changed.
    first = done.structure.groups[0].output
    order = [n for n, _ in done.after.named_modules()]
    assert all(m in changed for m in done.maps() if order.index(m) > order.index(first) and "downsample" not in m)


@pytest.mark.parametrize("name", ["vit", "bert_classifier", "resnet"])
def test_every_map_gets_the_strength_that_suits_it(name: str) -> None:
    done = prepared(name, STRENGTHS)
    unlike = {m: check_map(done, m) for m in done.maps() if done.changed(m)}
    assert len(set(unlike.values())) > 1


@pytest.mark.parametrize("name", ["vit", "bert_classifier", "plain_resnet"])
def test_what_fits_no_better_stays(name: str) -> None:
    done = prepared(name, (1e12, 1e13))
    for each in done.maps():
        torch.testing.assert_close(done.after.get_submodule(each).weight, done.before.get_submodule(each).weight)


# Convolutions behind units


def shortcut_of(done: Compensated, module: nn.Module, block: str, batch: tiny.Batch) -> Tensor:
    """What the block adds its update to."""
    names = [f"{block}.{n}" for n, _ in module.get_submodule(block).named_children() if n in ("downsample", "shortcut")]
    found = seen(done.network, module, batch, [block, *names])
    return found[names[0]][1] if names else found[block][0]


def check_projection(done: Compensated, group: Group) -> None:
    """That conv2 and the bias behind it bring the sum before the last ReLU back by ridge regression."""
    block = done.structure.blocks[group.layer]
    conv, norm = f"{block}.conv2", f"{block}.bn2"
    old, new = done.before.get_submodule(norm), done.after.get_submodule(norm)
    scale = (old.weight / (old.running_var + old.eps).sqrt()).detach().double().numpy()
    xs, targets = [], []
    for batch in done.batches:
        dense = seen(done.network, done.network.module, batch, [norm])[norm][1]
        asked = dense + shortcut_of(done, done.network.module, block, batch)
        asked = in_rows(asked - shortcut_of(done, done.after, block, batch), True, batch)
        # What bn2 has to be given.
        shifted = asked - old.bias.detach().double().numpy()
        targets.append(shifted / scale + old.running_mean.double().numpy())
        vanished = not done.plan.kept[group.name]
        given = seen(done.network, done.after, batch, [] if vanished else [conv])
        xs.append(
            np.zeros((len(asked), 0)) if vanished else input_rows(done.after.get_submodule(conv), given[conv][0], batch)
        )
    before, after = output_bias(done.before, group), output_bias(done.after, group)
    bias = np.zeros_like(scale) if before is None else before.detach().double().numpy()
    weights = [
        m.get_submodule(conv).weight.flatten(1).T.detach().double().numpy()
        if xs[0].shape[1]
        else np.zeros((0, len(bias)))
        for m in (done.before, done.after)
    ]
    expected, _ = best_solution(xs, targets, np.vstack([weights[0], bias]), done.strengths)
    np.testing.assert_allclose(weights[1], expected[:-1], atol=2e-4)
    if after is None:
        moved = (new.bias - old.bias).detach().double().numpy() / scale
        np.testing.assert_allclose(moved, expected[-1], atol=2e-4)
    else:
        np.testing.assert_allclose(after.detach().double().numpy(), expected[-1], atol=2e-4)
        assert torch.equal(new.bias, old.bias)
    for part in ("weight", "running_mean", "running_var"):
        assert torch.equal(getattr(new, part), getattr(old, part))


@pytest.mark.parametrize("name", ["resnet", "plain_resnet"])
@pytest.mark.parametrize("plan", [thinned, tiny.uneven_plan])
def test_convolutions_bring_the_sum_with_the_shortcut_back(name: str, plan: Callable[[Structure], Plan]) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    done = Compensated.of(network, structure, plan(structure))
    for group in done.structure.groups:
        check_projection(done, group)


# What compensation has to leave alone, or to look at more closely


class Head(nn.Module):
    """Tied maps, a map that runs twice, and a map of its own behind a backbone."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny._vit(num_classes=0)
        self.one, self.other = nn.Linear(tiny.WIDTH, 5), nn.Linear(tiny.WIDTH, 5)
        self.twice, self.own = nn.Linear(tiny.WIDTH, tiny.WIDTH), nn.Linear(tiny.WIDTH, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        x = self.backbone(x)
        return self.one(x), self.other(x + 1), self.own(self.twice(self.twice(x)))


class Pyramid(nn.Module):
    """What the blocks of a ViT give, one after the other, is read by a head together."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone = tiny._vit(num_classes=0)
        self.between, self.head = nn.Linear(tiny.WIDTH, tiny.WIDTH), nn.Linear(2 * tiny.WIDTH, 4)

    def forward(self, x: Tensor) -> Tensor:
        features = self.backbone.forward_intermediates(x, intermediates_only=True, output_fmt="NLC")
        return self.head(torch.cat([self.between(features[0]), features[1]], dim=-1))


def of_module(build: Callable[[], nn.Module]) -> Compensated:
    network = tiny.network_around(tiny.randomised(build()), tiny.images("x"))
    structure = describe(network.module, network.inputs).without_widths()
    return Compensated.of(network, structure, thinned(structure))


def tied() -> nn.Module:
    head = Head()
    head.other.weight = head.one.weight
    return head


def test_tied_maps_are_left_alone_and_maps_that_run_twice_are_refitted() -> None:
    done = of_module(tied)
    assert [n for n in ("one", "other", "twice", "own") if done.changed(n)] == ["twice", "own"]
    assert done.after.one.weight is done.after.other.weight
    check_map(done, "own")


def test_a_head_may_read_all_blocks() -> None:
    done = of_module(Pyramid)
    assert len(done.structure.blocks) == 2
    for name in ("backbone.blocks.1.attn.qkv", "between", "head"):
        assert done.changed(name)
        check_map(done, name)


def test_narrower_heads_come_closer() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    plan = Plan({g.name: (0, 1, 2) for g in structure.groups if g.kind == "width"})
    if not plan.kept:
        pytest.skip("no heads that get narrower")
    done = Compensated.of(network, structure, plan)

    @torch.no_grad()
    def error(small: nn.Module) -> float:
        moved = [small(**b) - network.module(**b) for b in done.batches]
        return sum(float(m.square().sum()) for m in moved)

    assert error(done.after) < 0.7 * error(done.before)


def test_one_batch_is_enough() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit").without_widths()
    plan, small = tiny.uneven_plan(structure), partial(slice_network, network.module, structure)
    one, several = small(tiny.uneven_plan(structure)), small(plan)
    batches = tiny.batches(network, 1, size=8)
    compensate(CompensationPair(network, one, structure, plan), batches, STRENGTHS[len(STRENGTHS) // 2 :][:1])
    compensate(CompensationPair(network, several, structure, plan), batches, STRENGTHS)
    # None can be held out: the middle strength is taken.
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), several.parameters(), strict=True))
