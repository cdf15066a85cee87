"""What stays dense is named with its share of the FLOPs; counted by hand, and against all that groups can remove."""

from __future__ import annotations

import re

import pytest
import timm.layers
import tiny
import torch
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.nn.flops import count_flops
from optin_deploy.pruning.space import analyze
from optin_deploy.search.costs import flop_costs
from optin_deploy.structure.describe import describe, prunable
from optin_deploy.structure.results import Unpruned
from optin_deploy.structure.unpruned import find_unpruned


class Mixer(nn.Module):
    """Mixes tokens by a product of its own and one linear layer: nothing that an adapter knows."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Parameter(torch.randn(4, 4))
        self.channels = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.channels(self.tokens @ x)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixer, self.mlp = Mixer(), timm.layers.Mlp(8, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(x)
        return x + self.mlp(x)


class Mixed(nn.Module):
    """Two blocks of an unknown mixer and an Mlp, a product in its own forward, and a head that takes little."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head((x @ self.weight).mean(1))


def shares(module: nn.Module, inputs: dict[str, Tensor]) -> dict[str, Unpruned]:
    return {each.module: each for each in find_unpruned(module, describe(module, inputs), inputs)}


def test_unknown_modules_are_named_with_their_share() -> None:
    inputs = {"x": torch.randn(2, 4, 8)}
    mixer, mlp, own, head = 2 * 4 * 4 * 8 + 2 * 4 * 8 * 8, 2 * 2 * 4 * 8 * 16, 2 * 4 * 8 * 8, 2 * 8
    total = 2 * (mixer + mlp) + own + head
    found = shares(Mixed(), inputs)
    # The head takes less than a hundredth.
    assert list(found) == ["blocks.*.mixer", "(the network itself)"]
    assert found["blocks.*.mixer"].count == 2
    assert found["blocks.*.mixer"].flops_share == pytest.approx(2 * mixer / total)
    assert "Mixer" in found["blocks.*.mixer"].reason
    assert found["(the network itself)"].flops_share == pytest.approx(own / total)


@pytest.mark.parametrize("name", tiny.ALL_NAMES)
def test_listed_modules_are_those_that_no_plan_removes(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    costs = flop_costs(network.module, structure, network.inputs)
    told = find_unpruned(network.module, structure, network.inputs)
    shares = sum(each.flops_share for each in told if each.module not in {g.name for g in structure.groups})
    fixed = costs.floor / costs.total
    # Up to a hundredth each may be left untold.
    assert fixed - 0.03 <= shares <= fixed + 1e-9


def test_refused_modules_are_listed_at_any_size_and_without_the_groups_inside() -> None:
    module = nn.Sequential(
        nn.Linear(8, 2000), timm.layers.Mlp(2000, 8, norm_layer=nn.RMSNorm), timm.layers.Mlp(2000, 4)
    )
    inputs = {"input": torch.randn(2, 8)}
    found = shares(module, inputs)
    assert "norm" in found["1"].reason
    total = count_flops(module, inputs)
    assert found["1"].flops_share == pytest.approx(2 * 2 * 2000 * 8 / total)
    assert found["0"].reason == "a Linear in no prunable group"


def test_nothing_prunable_says_what_was_looked_for_and_where_the_flops_are() -> None:
    network = tiny.network_around(nn.Sequential(Mixer(), nn.Linear(8, 8)), {"input": torch.randn(2, 4, 8)})
    with pytest.raises(UserError) as raised:
        analyze(network)
    message = str(raised.value)
    assert "\n" not in message
    assert re.search(r"nothing prunable .*Sequential", message)
    assert all(line in message for line in prunable())
    assert re.search(r" 0 \(60\.0 %: a Mixer.*\), 1 \(40\.0 %", message)
