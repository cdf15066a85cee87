"""Weights that are made anew in every forward pass are baked in, and wrappers taken off; the network is left alone."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from pathlib import Path
from types import MethodType

import pytest
import timm.layers
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune

from optin_deploy.compensation.linear_layers import refit_layers_of
from optin_deploy.compensation.pair import CompensationPair
from optin_deploy.errors import UserError
from optin_deploy.models import checkpoint
from optin_deploy.models.custom import custom_network
from optin_deploy.pruning import pruner
from optin_deploy.structure.canonicalize import canonicalize
from optin_deploy.structure.describe import describe
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

pytestmark = pytest.mark.slow


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.norm = nn.Conv2d(6, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.two = nn.Conv2d(8, 6, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.two(F.relu(self.norm(self.one(x))))


class Small(nn.Module):
    """Two residual blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def small() -> nn.Module:
    torch.manual_seed(0)
    return tiny.randomised(Small())


class Symmetric(nn.Module):
    """A parametrisation of anybody's."""

    def forward(self, weight: Tensor) -> Tensor:
        return weight + weight.flip(-1)


class Pieces(nn.Module):
    """One of two tensors."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return torch.cat([left, right])

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight[:2].clone(), weight[2:].clone()


def old_norm(norm: Callable[..., nn.Module]) -> Callable[[nn.Module], object]:
    def apply(layer: nn.Module) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            norm(layer)

    return apply


def twice(layer: nn.Module) -> None:
    prune.random_unstructured(layer, "weight", 0.3)
    prune.l1_unstructured(layer, "weight", 0.3)


def pruned_and_normed(layer: nn.Module) -> None:
    parametrizations.weight_norm(layer)
    if layer.bias is not None:
        prune.random_unstructured(layer, "bias", 0.5)


def both(layer: nn.Module) -> None:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    parametrizations.spectral_norm(layer)


REPARAMETRISED: dict[str, Callable[[nn.Module], object]] = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm of hooks": old_norm(nn.utils.weight_norm),
    "spectral_norm": parametrizations.spectral_norm,
    "spectral_norm of hooks": old_norm(nn.utils.spectral_norm),
    "orthogonal": parametrizations.orthogonal,
    "of anybody's": lambda layer: parametrize.register_parametrization(layer, "weight", Symmetric()),
    "in pieces": lambda layer: parametrize.register_parametrization(layer, "weight", Pieces()),
    "one after the other": both,
    "masked": lambda layer: prune.ln_structured(layer, "weight", 0.4, n=2, dim=0),
    "masked twice": twice,
    "normed, masked biases": pruned_and_normed,
}


def reparametrised(how: Callable[[nn.Module], object]) -> nn.Module:
    torch.manual_seed(1)
    module = small()
    for layer in list(module.modules()):
        if isinstance(layer, nn.Conv2d | nn.Linear):
            how(layer)
    # Norms begin with what the weight was.
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name.endswith(("original0", "weight_g")):
                parameter.mul_(torch.rand_like(parameter) + 0.5)
    return module


def images(batch: int = 3, seed: int = 0) -> dict[str, Tensor]:
    return {"x": torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))}


@pytest.mark.parametrize("name", REPARAMETRISED)
def test_weights_are_baked_in_and_the_module_is_left_as_it_was(name: str) -> None:
    module = reparametrised(REPARAMETRISED[name]).eval()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    with torch.no_grad():
        expected = module(**images())
        network = custom_network(module, images())
        torch.testing.assert_close(network.module(**images()), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(module(**images()), expected, rtol=0, atol=0)
    assert set(network.module.state_dict()) == set(small().state_dict())
    assert {n for n, _ in network.module.named_parameters()} == {n for n, _ in small().named_parameters()}
    assert all(p.requires_grad for p in network.module.parameters())
    after = module.state_dict()
    assert all(torch.equal(after[n], t) for n, t in before.items()) and set(after) == set(before)
    # What is not changed is shared.
    assert network.module.blocks[0].norm.weight.data_ptr() == module.blocks[0].norm.weight.data_ptr()
    groups = describe(network.module, network.inputs).groups
    assert [g.name for g in groups] == ["blocks.0.one", "blocks.1.one"]
    # The user may go on training.
    module.train()(**images()).sum().backward()


@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm of hooks", "masked"])
def test_from_end_to_end(name: str, tmp_path: Path) -> None:
    network = custom_network(reparametrised(REPARAMETRISED[name]), images(), logits="output")
    pruned = pruner.prune(network, [images(8, s) for s in range(3)], 0.6, align=1)
    expected = pruned.network.forward(images())["output"]
    checkpoint.save(pruned.network, pruned.plan, tmp_path / "c")
    again = checkpoint.load(tmp_path / "c", reparametrised(REPARAMETRISED[name]))
    assert torch.equal(again(**images()), expected)


class Compiled(Small):
    @torch.compile(backend="eager")
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x)


def compiled_in_place() -> nn.Module:
    module = small()
    module.compile(backend="eager")
    module.blocks[1].compile(backend="eager")
    return module


def compiled_block() -> nn.Module:
    module = small()
    module.blocks[0] = torch.compile(module.blocks[0], backend="eager")
    return module


def compiled_forward() -> nn.Module:
    module = small()
    module.forward = torch.compile(module.forward, backend="eager")
    return module


def compiled_class() -> nn.Module:
    module = small()
    made = Compiled().eval()
    made.load_state_dict(module.state_dict())
    return made


def averaged() -> nn.Module:
    return torch.optim.swa_utils.AveragedModel(small())


def shared_wrapper() -> nn.Module:
    module = small()
    module.blocks[1] = nn.DataParallel(module.blocks[0])
    return module


WRAPPED: dict[str, Callable[[], nn.Module]] = {
    "compiled": lambda: torch.compile(small(), backend="eager"),
    "compiled twice": lambda: nn.DataParallel(torch.compile(nn.DataParallel(small()), backend="eager")),
    "in place": compiled_in_place,
    "a block": compiled_block,
    "its forward": compiled_forward,
    "its class": compiled_class,
    "parallel": lambda: nn.DataParallel(small()),
    "averaged": averaged,
    "ema": lambda: timm.utils.ModelEmaV3(small()),
}


@pytest.mark.parametrize("name", WRAPPED)
def test_wrappers_are_taken_off(name: str) -> None:
    module = WRAPPED[name]().eval()
    with torch.no_grad():
        expected = small()(**images())
        network = custom_network(module, images())
        torch.testing.assert_close(network.module(**images()), expected, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(module(**images()), expected, rtol=1e-5, atol=1e-6)
    assert set(network.module.state_dict()) == set(small().state_dict())
    structure = describe(network.module, network.inputs)
    assert [g.name for g in structure.groups] == ["blocks.0.one", "blocks.1.one"]
    # A copy does not run the parameters of what it is a copy of.
    other = copy.deepcopy(network.module)
    with torch.no_grad():
        other.head.weight.zero_()
        torch.testing.assert_close(other(**images()), other.head.bias.expand(3, -1))


def test_a_module_with_and_without_a_wrapper_stays_one_module() -> None:
    form = canonicalize(shared_wrapper())
    assert form.blocks[0] is form.blocks[1]


def test_modules_without_any_are_themselves() -> None:
    module = small()
    assert canonicalize(module) is module


class Noisy(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight + torch.randn_like(weight)


def test_weights_that_differ_each_time_are_refused() -> None:
    module = small()
    parametrize.register_parametrization(module.blocks[0].one, "weight", Noisy())
    with pytest.raises(UserError, match=r"blocks\.0\.one\.weight: its parametrisation gives another tensor each time"):
        canonicalize(module)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("kind", ["qat", "fake"])
def test_quantized_networks_are_refused(kind: str) -> None:
    module = small()
    quantizer = torch.ao.quantization.FakeQuantize()
    if kind == "fake":
        module.blocks[0].add_module("quantizer", quantizer)
    else:
        module.stem.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
        module.stem = torch.ao.nn.qat.Conv2d.from_float(module.stem.train())
    with pytest.raises(UserError, match=r"(blocks\.0\.quantizer|stem) is quantized or prepared for it \(\w+\)"):
        canonicalize(module)


class Equalised(nn.Conv2d):
    """An equalised learning rate."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * 0.3, None if self.bias is None else 2 * self.bias, padding=self.padding)


class EqualisedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight * 0.3, self.bias)


class Plain(nn.Conv2d):
    """A forward of its own that does nothing of its own."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class Activated(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).relu()


class Dynamic(nn.Conv2d):
    """Weights that depend on the input."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight * x.mean(), self.bias, padding=self.padding)


class Sharp(nn.Conv2d):
    """Computes its parameter under another name."""

    def __init__(self, *args: int, **kwargs: int) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5)

    @property
    def scaled(self) -> Tensor:
        return self.gain * (self.weight - self.weight.mean((1, 2, 3), keepdim=True))

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.scaled, self.bias)


def with_convolutions(cls: type[nn.Conv2d]) -> nn.Module:
    module = Small()
    for block in module.blocks:
        block.one, block.two = cls(6, 8, 3, padding=1), cls(8, 6, 3, padding=1, bias=False)
    module.head = EqualisedLinear(6, 4)
    return tiny.randomised(module)


@pytest.mark.parametrize(
    "cls", [timm.layers.StdConv2d, timm.layers.ScaledStdConv2d, Equalised, Plain, Sharp], ids=lambda cls: cls.__name__
)
def test_subclasses_that_change_the_weights_only_become_plain(cls: type[nn.Conv2d]) -> None:
    module = with_convolutions(cls)
    network = custom_network(module, images())
    with torch.no_grad():
        torch.testing.assert_close(network.module(**images()), module(**images()), rtol=0, atol=0)
    assert {type(m) for m in network.module.modules() if isinstance(m, nn.Conv2d | nn.Linear)} == {nn.Conv2d, nn.Linear}
    assert isinstance(module.blocks[0].one, cls)
    assert [g.name for g in describe(network.module, network.inputs).groups] == ["blocks.0.one", "blocks.1.one"]


@pytest.mark.parametrize("cls", [Activated, Dynamic, timm.layers.Conv2dSame])
def test_subclasses_that_do_more_are_left_as_they_are(cls: type[nn.Conv2d]) -> None:
    module = with_convolutions(cls)
    network = custom_network(module, images())
    with torch.no_grad():
        torch.testing.assert_close(network.module(**images()), module(**images()), rtol=0, atol=0)
    assert type(network.module.blocks[0].one) is cls
    assert describe(network.module, network.inputs).groups == ()


class ActivatedLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).tanh()


class Product(nn.Linear):
    """Computes as its class does, in another way."""

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight.T + self.bias


@pytest.mark.parametrize("cls", [ActivatedLinear, Product])
def test_projections_that_give_more_than_their_weights_are_left_dense(cls: type[nn.Linear]) -> None:
    class Ffn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 8), cls(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(x).relu())

    structure = describe(tiny.randomised(nn.Sequential(Ffn(), Ffn())), {"input": torch.randn(2, 3, 4)})
    assert len(structure.groups) == (2 if cls is Product else 0)
    reason = "down has a forward of its own, which gives more than its weights make"
    assert all(left.reason.endswith(reason) for left in structure.left_dense)


@pytest.mark.parametrize("cls", [ActivatedLinear, Product])
def test_maps_that_give_more_than_their_weights_are_not_refitted(cls: type[nn.Linear]) -> None:
    module = small()
    module.head = tiny.randomised(cls(6, 4))
    network = custom_network(module, images())
    structure = describe(network.module, network.inputs)
    plan = Plan({g.name: tuple(range(4)) for g in structure.groups})
    pruned = slice_network(network.module, structure, plan)
    maps = refit_layers_of(CompensationPair(network, pruned, structure, plan))
    assert ("head" in maps) == (cls is Product)
    assert "blocks.0.two" in maps


def test_a_function_of_one_convolution_alone_is_seen() -> None:
    module = small()
    layer = module.blocks[0].one
    layer._conv_forward = MethodType(lambda self, x, weight, bias: F.conv2d(x.flip(1), weight, bias, padding=1), layer)
    assert [g.name for g in describe(canonicalize(module), images()).groups] == ["blocks.1.one"]
