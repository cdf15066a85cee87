import pytest
import tiny
import torch
from torch import Tensor, nn

from optin_deploy.nn.names import child, join
from optin_deploy.structure.adapters import registry
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import CostModules, Group, LayerAxis, LeftDense
from optin_deploy.structure.masking import mask_units
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

pytestmark = pytest.mark.slow


class Gated(nn.Module):
    """A feed-forward network that no adapter of ours knows."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.shift, self.down = (*(nn.Linear(4, 6) for _ in range(3)), nn.Linear(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x).sigmoid() * self.up(x) + self.shift(x))


def gated(name: str, module: nn.Module, parent_name: str, parent: nn.Module) -> Group | LeftDense | None:
    """Neurons of Gated."""
    if not isinstance(module, Gated):
        return None
    return Group(
        name=name,
        kind="neuron",
        units=module.up.out_features,
        width=1,
        output=f"{name}.down",
        sides=(*(LayerAxis(f"{name}.{n}", "out") for n in ("up", "gate", "shift")), LayerAxis(f"{name}.down", "in")),
        cost=CostModules((name,)),
        placeholders=((name, "constant"),),
    )


@pytest.mark.parametrize("kept", [(0, 4), ()])
def test_a_registered_adapter_makes_a_module_prunable(kept: tuple[int, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    module = tiny.randomised(nn.Sequential(nn.Linear(4, 4), Gated()))
    inputs = {"input": torch.randn(2, 3, 4)}
    assert describe(module, inputs).groups == ()

    monkeypatch.setattr("optin_deploy.structure.describe.ADAPTERS", [*registry.ADAPTERS, gated])
    structure = describe(module, inputs)
    assert [(g.name, g.layer) for g in structure.groups] == [("1", 0)]
    plan = Plan({"1": kept})
    with torch.no_grad(), mask_units(module, structure, tiny.masks_of(structure, plan)):
        expected = module(**inputs)
    torch.testing.assert_close(slice_network(module, structure, plan)(**inputs), expected, rtol=0, atol=1e-6)


def test_the_adapter_registered_last_has_the_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def mine(name: str, module: nn.Module, parent_name: str, parent: nn.Module) -> LeftDense | None:
        return LeftDense(name, "by mine") if isinstance(module, nn.Linear) else None

    def known(name: str, module: nn.Module, parent_name: str, parent: nn.Module) -> LeftDense | None:
        return LeftDense(name, "known") if isinstance(module, nn.Linear | nn.GELU) else None

    monkeypatch.setattr("optin_deploy.structure.describe.ADAPTERS", [known, mine])
    module = nn.Sequential(nn.Linear(4, 4), nn.GELU())
    found = describe(module, {"input": torch.randn(2, 4)}).left_dense
    assert found == (LeftDense("0", "by mine"), LeftDense("1", "known"))


def test_registering_and_listing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(registry, "ADAPTERS", [*registry.ADAPTERS])
    assert registry.adapter(gated) is gated
    assert registry.supported()[-1] == "Neurons of Gated."
    assert all(registry.supported())


def test_child_and_join() -> None:
    module = nn.ModuleDict({"a": nn.ModuleDict({"b": nn.ReLU()})})
    assert isinstance(child(module, "a.b"), nn.ReLU)
    assert child(module, "a.c") is None
    assert child(module, "training") is None
    assert join("", "a", "", "b") == "a.b"
