import copy
from collections.abc import Callable

import pytest
import tiny
import torch
from tiny_models import resnet_network
from torch import nn

from optin_deploy.compensation.batchnorm import reestimate
from optin_deploy.models.custom import custom_network
from optin_deploy.network import Network
from optin_deploy.pruning.pruner import prune
from optin_deploy.pruning.removal import Remover
from optin_deploy.pruning.space import analyze
from optin_deploy.structure.plan import Plan


def batches(count: int) -> list[dict[str, torch.Tensor]]:
    network, made = resnet_network(), torch.Generator().manual_seed(0)
    name, sample = next(iter(network.inputs.items()))
    return [{name: torch.randn(8, *sample.shape[1:], generator=made)} for _ in range(count)]


def test_statistics_are_those_of_all_batches_together() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 2, 1)).eval()
    given = [torch.randn(6, 3, 5, 5) for _ in range(3)]
    reestimate(module, [{"input": x} for x in given])
    with torch.no_grad():
        seen = [module[0](x) for x in given]
    torch.testing.assert_close(module[1].running_mean, torch.cat(seen).mean((0, 2, 3)))
    torch.testing.assert_close(module[1].running_var, torch.stack([x.var((0, 2, 3)) for x in seen]).mean(0))
    assert not any(part.training for part in module.modules()) and module[1].momentum == 0.1


def test_without_batches_or_norms_nothing_happens() -> None:
    module = nn.Sequential(nn.BatchNorm1d(3)).eval()
    reestimate(module, [])
    assert module[0].num_batches_tracked == 0
    reestimate(nn.Linear(2, 2), [{"input": torch.ones(1, 2)}])


@pytest.mark.parametrize("ridge", [None, 0.01])
def test_only_without_compensation_statistics_are_new(ridge: float | None) -> None:
    network = resnet_network()
    small = prune(network, batches(2), 0.6, align=8, ridge=ridge).network.module
    tracked = {int(m.num_batches_tracked) for m in small.modules() if isinstance(m, nn.BatchNorm2d)}
    assert tracked == ({2} if ridge is None else {0})


def test_batches_of_one_value_count_where_there_are_no_others() -> None:
    module, given = nn.Sequential(nn.BatchNorm1d(3)).eval(), [torch.randn(1, 3) for _ in range(4)]
    reestimate(module, [{"input": x} for x in given])
    torch.testing.assert_close(module[0].running_mean, torch.cat(given).mean(0))
    torch.testing.assert_close(module[0].running_var, torch.cat(given).var(0))
    several = torch.randn(5, 3)
    reestimate(module, [{"input": given[0]}, {"input": several}, {"input": given[1]}])
    torch.testing.assert_close(module[0].running_mean, several.mean(0))
    assert not module[0].training


def plain_resnet() -> Network:
    return custom_network(tiny.randomised(tiny.PlainResNet()), tiny.images("x"))


@pytest.mark.parametrize("make", [resnet_network, plain_resnet])
def test_channels_that_are_all_gone_leave_what_masking_them_would(make: Callable[[], Network]) -> None:
    network = make()
    space, given = analyze(network), tiny.batches(network, 3)
    gone = [g for g in space.structure.groups if g.kind == "channel" and g.parent is None]
    small = Remover(network, space, given, None).remove(Plan({g.name: () for g in gone}))
    masked = copy.deepcopy(network.module)
    for group in gone:
        masked.get_submodule(group.output).weight.data.zero_()
    reestimate(masked, given)
    with torch.no_grad():
        torch.testing.assert_close(small(**given[0]), masked(**given[0]), rtol=1e-4, atol=1e-5)


def test_statistics_of_instance_norms() -> None:
    module = nn.Sequential(nn.Conv2d(3, 4, 1), nn.InstanceNorm2d(4, track_running_stats=True)).eval()
    given = [torch.randn(6, 3, 5, 5) for _ in range(3)]
    reestimate(module, [{"input": x} for x in given])
    with torch.no_grad():
        seen = torch.cat([module[0](x) for x in given])
    torch.testing.assert_close(module[1].running_mean, seen.mean((2, 3)).mean(0))
    torch.testing.assert_close(module[1].running_var, seen.var((2, 3)).mean(0))
    assert not module[1].training and not module[1]._forward_pre_hooks
