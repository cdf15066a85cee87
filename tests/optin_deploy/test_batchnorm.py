import copy

import pytest
import tiny
import torch
from torch import Tensor, nn

from optin_deploy.batchnorm import reestimate
from optin_deploy.errors import UserError


def batches(sizes: tuple[int, ...]) -> list[tiny.Batch]:
    return [tiny.images("x", size, seed) for seed, size in enumerate(sizes)]


@torch.no_grad()
def expected(module: nn.Module, given: list[tiny.Batch]) -> dict[str, tuple[Tensor, Tensor]]:
    """Mean and variance of all that each norm is given, in float64, with the batch norms in training."""
    module = copy.deepcopy(module)
    seen: dict[str, list[Tensor]] = {}
    for name, norm in module.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.train()
            norm.register_forward_pre_hook(lambda _, args, name=name: seen.setdefault(name, []).append(args[0]))
    for batch in given:
        module(**batch)
    rows = {name: torch.cat([x.movedim(1, -1).flatten(0, 2) for x in xs]).double() for name, xs in seen.items()}
    return {name: (r.mean(0), r.var(0)) for name, r in rows.items()}


@pytest.mark.parametrize("name", tiny.CNN_NAMES)
@pytest.mark.parametrize("sizes", [(5,), (4, 4, 4), (8, 2, 5)])
def test_statistics_are_those_of_all_values(name: str, sizes: tuple[int, ...]) -> None:
    module, given = copy.deepcopy(tiny.network(name).module), batches(sizes)
    wanted = expected(module, given)
    reestimate(module, iter(given))
    assert len(wanted) > 5
    for norm, (mean, variance) in wanted.items():
        torch.testing.assert_close(module.get_buffer(f"{norm}.running_mean"), mean.float())
        torch.testing.assert_close(module.get_buffer(f"{norm}.running_var"), variance.float())


def test_one_batch_gives_what_training_gives() -> None:
    module, given = copy.deepcopy(tiny.network("resnet").module), batches((6,))
    trained = copy.deepcopy(module).train()
    for norm in trained.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = 1.0
    with torch.no_grad():
        trained(**given[0])
    reestimate(module, given)
    for name, value in trained.named_buffers():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(module.get_buffer(name), value, rtol=1e-4, atol=1e-5)


def test_nothing_else_changes() -> None:
    module = copy.deepcopy(tiny.network("resnet").module)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    flags = [m.training for m in module.modules()]
    reestimate(module, batches((4, 4)))
    changed = {n for n, t in module.state_dict().items() if not torch.equal(t, before[n])}
    assert changed == {n for n in before if n.endswith(("running_mean", "running_var"))}
    assert [m.training for m in module.modules()] == flags
    assert not any(m._forward_pre_hooks for m in module.modules())
    assert not any(p.grad is not None for p in module.parameters())


def test_a_failure_leaves_everything_as_it_was() -> None:
    module = copy.deepcopy(tiny.network("resnet").module)
    before = {n: t.clone() for n, t in module.state_dict().items()}
    bad = {"x": torch.zeros(2, 5, 16, 16)}
    with pytest.raises(RuntimeError):
        reestimate(module, [*batches((4,)), bad])
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())
    assert not any(m.training or m._forward_pre_hooks for m in module.modules())


def test_norms_without_statistics_or_use_stay_as_they_are() -> None:
    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.free, self.unused = nn.BatchNorm2d(3, track_running_stats=False), nn.BatchNorm2d(3)
            self.dropout = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            assert not self.dropout.training
            return self.dropout(self.free(x))

    module = Odd().eval()
    reestimate(module, batches((3,)))
    assert torch.equal(module.unused.running_var, torch.ones(3))
    assert not module.free.training


def test_one_value_per_channel_is_refused() -> None:
    with pytest.raises(UserError, match="more samples per batch") as caught:
        reestimate(copy.deepcopy(tiny.network("resnet").module), batches((4, 1)))
    assert "\n" not in str(caught.value)


def test_the_caller_says_how_a_batch_runs() -> None:
    network = tiny.network("plain_resnet")
    modules = [copy.deepcopy(network.module) for _ in range(2)]
    reestimate(modules[0], batches((4,)))
    reestimate(modules[1], batches((4,)), lambda module, batch: network.forward(batch, module))
    for ours, theirs in zip(modules[0].buffers(), modules[1].buffers(), strict=True):
        assert torch.equal(ours, theirs)
