"""Networks that cut their own derivatives off, and units whose scores rightly or wrongly are nothing."""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import torch.utils.checkpoint
from together import together
from torch import Tensor, nn

from optin_deploy.criteria.gradient_reach import find_reach
from optin_deploy.criteria.restored_gradients import plain_checkpoints, restore_gradients, watch_cuts
from optin_deploy.criteria.scoring import Scoring, score
from optin_deploy.criteria.trajectory_loss import is_saturated
from optin_deploy.distributed.ranks import SINGLE_PROCESS, Ranks, Shared
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.pruning.pruner import prune
from optin_deploy.pruning.space import analyze
from optin_deploy.search.costs import flop_costs
from optin_deploy.structure.groups import Structure
from optin_deploy.tokens.merge_loss import measure_merge_loss

pytestmark = pytest.mark.slow


Call = Callable[..., Any]


def in_no_grad(call: Call, args: Any, kwargs: Any) -> Any:
    with torch.no_grad():
        return call(*args, **kwargs)


def in_inference_mode(call: Call, args: Any, kwargs: Any) -> Any:
    with torch.inference_mode():
        return call(*args, **kwargs)


def switched_off(call: Call, args: Any, kwargs: Any) -> Any:
    before = torch.is_grad_enabled()
    torch.set_grad_enabled(False)
    given = call(*args, **kwargs)
    torch.set_grad_enabled(before)
    return given


def detached_after(call: Call, args: Any, kwargs: Any) -> Any:
    return call(*args, **kwargs).detach()


def detached_and_switched_off(call: Call, args: Any, kwargs: Any) -> Any:
    return call(*args, **kwargs).detach().requires_grad_(False)


def half_detached(call: Call, args: Any, kwargs: Any) -> Any:
    y = call(*args, **kwargs)
    return torch.cat([y[..., :5].detach(), y[..., 5:]], dim=-1)


def masked_without_gradients(call: Call, args: Any, kwargs: Any) -> Any:
    """What has no derivative anyway."""
    with torch.no_grad():
        keep = (args[0].abs().sum(-1, keepdim=True) > 0).float()
    return call(args[0] * keep, *args[1:], **kwargs)


def detached_before(call: Call, args: Any, kwargs: Any) -> Any:
    return call(args[0].detach(), *args[1:], **kwargs)


def data_before(call: Call, args: Any, kwargs: Any) -> Any:
    return call(args[0].data, *args[1:], **kwargs)


def reentrant(call: Call, args: Any, kwargs: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(call, *args, use_reentrant=True)


def checkpointed(call: Call, args: Any, kwargs: Any) -> Any:
    return torch.utils.checkpoint.checkpoint(call, *args, use_reentrant=False)


class Table:
    """Made at the first call, as tables of positions are; the first is in inference mode."""

    def __init__(self) -> None:
        self.values: Tensor | None = None

    def __call__(self, call: Call, args: Any, kwargs: Any) -> Any:
        if self.values is None:
            with torch.inference_mode():
                self.values = torch.ones(args[0].shape[-1])
        return call(args[0] * self.values, *args[1:], **kwargs)


def rounded(call: Call, args: Any, kwargs: Any) -> Any:
    return (50 * call(*args, **kwargs)).round() / 50


def straight_through(call: Call, args: Any, kwargs: Any) -> Any:
    y = call(*args, **kwargs)
    return y + ((500 * y).round() / 500 - y).detach()


def without_torch(call: Call, args: Any, kwargs: Any) -> Any:
    return torch.from_numpy(call(*args, **kwargs).detach().numpy().copy())


class _Kernel(torch.autograd.Function):
    @staticmethod
    def forward(_: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return torch.zeros_like(gradient)


def kernel(call: Call, args: Any, kwargs: Any) -> Any:
    return _Kernel.apply(call(*args, **kwargs))


def changed(name: str, where: str, way: Callable[[Call, Any, Any], Any]) -> Network:
    """The tiny network of that name with ``way`` around the forward pass of one of its modules, in place."""
    network = tiny.network(name)
    module = copy.deepcopy(network.module)
    inner = module.get_submodule(where)
    plain = type(inner)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return way(lambda *a, **k: plain.forward(self, *a, **k), args, kwargs)

    inner.__class__ = type("Around", (plain,), {"forward": forward})
    return network.with_module(module)


def scores_of(
    network: Network, structure: Structure, scoring: Scoring, told: list[str] | None = None
) -> dict[str, Tensor]:
    batches = tiny.batches(network, 2)
    labels = [torch.zeros(len(next(iter(b.values()))), dtype=torch.long) for b in batches]
    costs = flop_costs(tiny.network("vit").module, structure, network.inputs) if "x" in network.inputs else None
    tell = (told if told is not None else []).append
    return score(network, structure, costs, batches, scoring, labels=labels, tell=tell)  # type: ignore[arg-type]


def same(given: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    for name, scores in expected.items():
        torch.testing.assert_close(given[name], scores, rtol=tolerance, atol=tolerance * float(scores.max()))


OBS, SKETCH, EXACT, FORWARD = (
    Scoring(),
    Scoring("trajectory"),
    Scoring("trajectory", "exact"),
    Scoring("trajectory", "forward"),
)
CUTS = [in_no_grad, in_inference_mode, switched_off, detached_after]
MORE_CUTS = [detached_and_switched_off, half_detached]


@pytest.mark.parametrize("where", ["blocks.0", "blocks.1", "blocks.1.mlp", "blocks.0.attn"])
@pytest.mark.parametrize("way", [*CUTS, *MORE_CUTS, detached_before, data_before])
def test_what_is_cut_off_is_brought_back(where: str, way: Any) -> None:
    structure, told = tiny.structure("vit"), []
    given = scores_of(changed("vit", where, way), structure, OBS, told)
    same(given, scores_of(tiny.network("vit"), structure, OBS), 1e-3)
    # What no unit stands before loses nothing.
    early = where in ("blocks.0", "blocks.0.attn") and way in (detached_before, data_before)
    assert len(told) == (0 if early else 1)


@pytest.mark.parametrize("way", CUTS)
def test_the_whole_network_may_run_without_gradients(way: Any) -> None:
    structure = tiny.structure("vit")
    same(scores_of(changed("vit", "", way), structure, OBS), scores_of(tiny.network("vit"), structure, OBS))


def test_a_mask_made_without_gradients_changes_nothing() -> None:
    structure, told = tiny.structure("vit"), []
    given = scores_of(changed("vit", "blocks.1", masked_without_gradients), structure, OBS, told)
    same(given, scores_of(tiny.network("vit"), structure, OBS))
    assert told == []


@pytest.mark.parametrize("scoring", [SKETCH, EXACT, Scoring("fisher")], ids=["sketch", "exact", "fisher"])
@pytest.mark.parametrize("way", CUTS)
def test_by_every_criterion_that_takes_derivatives(scoring: Scoring, way: Any) -> None:
    structure = tiny.structure("vit")
    given = scores_of(changed("vit", "blocks.1", way), structure, scoring)
    same(given, scores_of(tiny.network("vit"), structure, scoring))


@pytest.mark.parametrize(
    ("name", "where"), [("bert_classifier", "bert.encoder"), ("resnet", "layer2"), ("bert", "encoder")]
)
def test_in_any_network(name: str, where: str) -> None:
    network = tiny.network(name)
    found = find_reach(changed(name, where, in_no_grad), tiny.structure(name), tiny.batches(network, 1)[0])
    assert found.restoring and not found.cut and not found.wrong


@pytest.mark.parametrize("way", [reentrant, checkpointed, Table()], ids=["reentrant", "checkpoint", "table"])
@pytest.mark.parametrize("where", ["blocks.0.mlp", "blocks.1"])
def test_checkpoints_and_tables_made_in_inference_mode(where: str, way: Any) -> None:
    structure = tiny.structure("vit")
    given = scores_of(changed("vit", where, way), structure, OBS)
    same(given, scores_of(tiny.network("vit"), structure, OBS))


def test_checkpoints_are_as_they_were_behind() -> None:
    before = torch.utils.checkpoint.CheckpointFunction.apply
    with plain_checkpoints():
        assert torch.utils.checkpoint.CheckpointFunction.apply != before
    x = torch.ones(2, requires_grad=True)
    for way in (True, False):
        torch.utils.checkpoint.checkpoint(torch.sin, x, use_reentrant=way).sum().backward()
    torch.testing.assert_close(x.grad, 2 * torch.ones(2).cos())


@pytest.mark.parametrize(
    "scoring", [OBS, SKETCH, FORWARD, Scoring("fisher")], ids=["obs", "sketch", "forward", "fisher"]
)
@pytest.mark.parametrize("way", [rounded, without_torch])
def test_what_cannot_be_brought_back_is_refused(scoring: Scoring, way: Any) -> None:
    with pytest.raises(UserError, match=r"blocks\.0\.mlp.*--scorer exact") as caught:
        scores_of(changed("vit", "blocks.0.mlp", way), tiny.structure("vit"), scoring)
    assert "\n" not in str(caught.value)


def test_a_kernel_without_a_derivative_is_refused() -> None:
    with pytest.raises(UserError, match=r"blocks\.0\.attn and 3 more.*derivative"):
        scores_of(changed("vit", "blocks.1", kernel), tiny.structure("vit").without_widths(), OBS)


@pytest.mark.parametrize("way", [without_torch, kernel])
def test_masking_units_needs_no_derivative(way: Any) -> None:
    """The weight of the task part comes from few masked units then; the manifold is the same."""
    structure, alone = tiny.structure("vit"), replace(EXACT, task_weight=0.0)
    network = changed("vit", "blocks.1", way)
    same(scores_of(network, structure, alone), scores_of(tiny.network("vit"), structure, alone))
    given, whole = (scores_of(n, structure, EXACT) for n in (network, tiny.network("vit")))
    for name, scores in whole.items():
        both = torch.stack([given[name], scores])
        assert float(torch.corrcoef(both)[0, 1]) > 0.9 or len(scores) < 3
        assert 0.3 < float(both[0].sum() / both[1].sum()) < 3


def test_the_derivative_behind_a_detached_rounding_is_the_networks_own() -> None:
    structure = tiny.structure("vit")
    given = scores_of(changed("vit", "blocks.1", straight_through), structure, OBS)
    same(given, scores_of(tiny.network("vit"), structure, OBS), 0.05)


def test_networks_that_cut_nothing_are_left_alone() -> None:
    for name in ("vit", "bert_classifier", "resnet", "segmenter"):
        network = tiny.network(name)
        batch = tiny.batches(network, 1)[0]
        found = find_reach(network, tiny.structure(name), batch)
        assert (found.restoring, found.cut, found.wrong, found.reason) == (False, (), (), None)


def test_modes_end_with_the_pass_and_see_nothing_without_gradients() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    x = torch.ones(1, 2, requires_grad=True)
    with watch_cuts(module) as seen:
        with torch.no_grad():
            module(x)
        module(x).detach()
        x.detach()
    assert seen == []
    with restore_gradients(module):
        assert not module(x).detach().requires_grad
        with pytest.raises(RuntimeError):
            module(torch.ones(1, 3))
        assert not x.detach().requires_grad


def test_merging_tokens_counts_in_a_network_that_cuts_its_derivatives_off() -> None:
    plain, network = tiny.network("vit"), changed("vit", "blocks.1.mlp", in_no_grad)
    space = analyze(plain, tokens=True)
    assert space.stack is not None
    given, expected = (
        measure_merge_loss(n, space.structure, space.stack, tiny.batches(plain, 1), OBS).loss for n in (network, plain)
    )
    torch.testing.assert_close(torch.tensor(given), torch.tensor(expected))
    assert expected.max() > 0


# Scores of nothing


def without(name: str, where: str, scale: float = 0.0) -> Network:
    network = tiny.network(name)
    module = copy.deepcopy(network.module)
    with torch.no_grad():
        for parameter in module.get_submodule(where).parameters():
            parameter.mul_(scale)
    return network.with_module(module)


@pytest.mark.parametrize("scoring", [OBS, SKETCH, EXACT, FORWARD, Scoring("magnitude")])
def test_units_and_groups_that_change_nothing_are_pruned(scoring: Scoring) -> None:
    network = without("vit", "blocks.1.mlp.fc2")
    with torch.no_grad():
        # Dead neurons in another block.
        network.module.blocks[0].mlp.fc1.weight[:9] = 0
        network.module.blocks[0].mlp.fc1.bias[:9] = 0
    told: list[str] = []
    scores = scores_of(network, tiny.structure("vit"), scoring, told)
    assert not told
    if scoring.criterion != "magnitude":
        assert float(scores["blocks.1.mlp"].max()) < 1e-12 * float(scores["blocks.0.attn"].max())
        assert float(scores["blocks.0.mlp"][:9].mean()) < 0.2 * float(scores["blocks.0.mlp"][9:].mean())


@pytest.mark.parametrize("scoring", [OBS, Scoring("fisher")], ids=["obs", "fisher"])
def test_a_head_that_tells_always_the_same_is_refused(scoring: Scoring) -> None:
    network = replace(without("vit", "head"), weights="pretrained")
    with torch.no_grad():
        network.module.norm.weight.zero_()
    with pytest.raises(UserError, match="no unit changes"):
        scores_of(network, tiny.structure("vit"), scoring)
    # Of random weights, speed alone is wanted.
    told: list[str] = []
    scores_of(replace(network, weights="random"), tiny.structure("vit"), scoring, told)
    assert any("which units stay is arbitrary" in each for each in told)


@pytest.mark.parametrize("head", ["classes", "binary"])
@pytest.mark.parametrize("scoring", [OBS, replace(SKETCH, task_weight=1.0)], ids=["obs", "sketch"])
def test_saturated_heads_are_scored_by_their_logits(head: Any, scoring: Scoring) -> None:
    network = replace(tiny.network("vit"), head=head)
    module = copy.deepcopy(network.module)
    with torch.no_grad():
        module.head.bias.add_(torch.tensor([3e4, 1e4, -2e4]))
    told: list[str] = []
    given = scores_of(network.with_module(module), tiny.structure("vit"), scoring, told)
    assert len(told) == 1 and "saturated" in told[0]
    expected = scores_of(replace(network, head="regression", module=module), tiny.structure("vit"), scoring)
    same(given, expected)
    assert all(float(scores.max()) > 1e-200 for scores in given.values())


def test_one_sample_that_is_undecided_is_enough() -> None:
    network = replace(tiny.network("vit"), module=nn.Identity(), outputs={"logits": "output"}, logits="logits")
    network.module.forward = lambda x: x
    sure = {"x": torch.tensor([[1e5, 0.0, 0.0]] * 4)}
    unsure = {"x": torch.cat([sure["x"][:3], torch.tensor([[1.0, 0.0, 0.0]])])}
    assert is_saturated(network, [sure, sure])
    assert not is_saturated(network, [sure, unsure])
    assert not is_saturated(replace(network, head="regression"), [sure])
    assert is_saturated(replace(network, head="binary"), [{"x": torch.tensor([[-1e5], [1e5]])}])
    assert not is_saturated(replace(network, head="binary"), [{"x": torch.tensor([[-1e5], [10.0]])}])


def test_equal_magnitudes_of_units_that_differ_are_refused() -> None:
    network = tiny.network("vit")
    module = copy.deepcopy(network.module)
    with torch.no_grad():
        for layer in (module.blocks[0].mlp.fc1, module.blocks[0].mlp.fc2):
            layer.weight.sign_()
    with pytest.raises(UserError, match=r"blocks\.0\.mlp.*equal"):
        scores_of(network.with_module(module), tiny.structure("vit"), Scoring("magnitude"))


def test_equal_scores_of_units_that_are_equal_are_scores() -> None:
    network = tiny.network("vit")
    module = copy.deepcopy(network.module)
    with torch.no_grad():
        mlp = module.blocks[0].mlp
        mlp.fc1.weight[:] = mlp.fc1.weight[:1]
        mlp.fc1.bias[:] = mlp.fc1.bias[:1]
        mlp.fc2.weight[:] = mlp.fc2.weight[:, :1]
    scores = scores_of(network.with_module(module), tiny.structure("vit"), Scoring("magnitude"))["blocks.0.mlp"]
    assert float(scores.max()) == pytest.approx(float(scores.min()))


def shared_scores(way: Callable[[Call, Any, Any], Any], scoring: Scoring, ranks: Ranks) -> dict[str, Tensor]:
    network, structure = changed("vit", "blocks.1", way), tiny.structure("vit")
    costs = flop_costs(tiny.network("vit").module, structure, network.inputs)
    return score(network, structure, costs, Shared(tiny.batches(network, 3), ranks), scoring)


@pytest.mark.parametrize("scoring", [OBS, SKETCH], ids=["obs", "sketch"])
def test_several_processes_bring_back_the_same(scoring: Scoring, tmp_path: Path) -> None:
    work = partial(shared_scores, in_no_grad, scoring)
    expected = work(SINGLE_PROCESS)
    for found in together(work, 2, tmp_path):
        same(found, expected)


def refused_scores(ranks: Ranks) -> dict[str, Tensor]:
    with pytest.raises(UserError, match="no derivative reaches"):
        shared_scores(without_torch, OBS, ranks)
    return {"done": torch.ones(1)}


def test_several_processes_refuse_together(tmp_path: Path) -> None:
    assert len(together(refused_scores, 2, tmp_path)) == 2


def test_a_whole_pruning_is_the_plain_networks() -> None:
    plain, network = tiny.network("vit"), changed("vit", "blocks.0", in_inference_mode)
    batches = tiny.batches(plain, 3)
    given, expected = (prune(n, batches, 0.6, align=1) for n in (network, plain))
    assert given.plan == expected.plan
    for name, tensor in expected.network.module.state_dict().items():
        torch.testing.assert_close(given.network.module.state_dict()[name], tensor, rtol=1e-4, atol=1e-5)
