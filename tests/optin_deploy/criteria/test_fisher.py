import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import tiny
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from optin_deploy.criteria.fisher import fisher_scores, mask_gradients
from optin_deploy.errors import UserError
from optin_deploy.network import Network
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Group, Structure

pytestmark = pytest.mark.slow


STEP = 1e-4


class Maps(nn.Module):
    """Class logits for every patch, as a map: ``(batch, classes, patches)``."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x).movedim(-1, 1)


def in_double(network: Network) -> Network:
    return replace(network, module=copy.deepcopy(network.module).double())


def doubles(batches: list[tiny.Batch]) -> list[tiny.Batch]:
    return [{n: t.double() if t.is_floating_point() else t for n, t in b.items()} for b in batches]


@contextmanager
def scaled(module: nn.Module, group: Group, unit: int, factor: float) -> Iterator[None]:
    """A unit times a factor; a dimension of heads in all queries, and in what all heads give."""
    width = group.kind == "width"
    own = slice(unit, None, group.units) if width else slice(unit * group.width, (unit + 1) * group.width)

    def before(_: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        x = args[0].clone()
        x[..., own] *= factor
        return (x,)

    def after(_: nn.Module, __: object, output: Tensor) -> Tensor:
        output = output.clone()
        output[..., group.qkv.queries.of(output.shape[-1])][..., own] *= factor
        return output

    handles = [module.get_submodule(group.output).register_forward_pre_hook(before)]
    if width:
        handles.append(module.get_submodule(group.qkv.queries.module).register_forward_hook(after))
    yield
    for handle in handles:
        handle.remove()


@torch.no_grad()
def differences(
    network: Network, structure: Structure, batches: list[tiny.Batch], loss: Callable[[int, Tensor], Tensor]
) -> dict[str, Tensor]:
    """Central differences for each mask of each sample on its own. ``loss`` is told the number of the sample."""
    samples = [{n: t[i : i + 1] for n, t in b.items()} for b in batches for i in range(len(next(iter(b.values()))))]
    found = {g.name: torch.zeros(len(samples), g.units, dtype=torch.float64) for g in structure.groups}
    for group in structure.groups:
        for unit in range(group.units):
            for sign in (1, -1):
                with scaled(network.module, group, unit, 1 + sign * STEP):
                    for number, sample in enumerate(samples):
                        value = loss(number, network.forward(sample)[network.logits])
                        found[group.name][number, unit] += sign * float(value) / (2 * STEP)
    return found


def assert_gradients_close(given: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert given.keys() == expected.keys()
    for name, gradient in expected.items():
        assert given[name].dtype == torch.float64
        torch.testing.assert_close(given[name], gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["vit", "bert_classifier"])
def test_gradients_are_those_of_each_sample(name: str) -> None:
    network, structure = in_double(tiny.network(name)), tiny.structure(name)
    batches = doubles(tiny.batches(network, 2, size=2))
    labels = [torch.tensor([0, 2]), torch.tensor([1, 1])]
    given = mask_gradients(network, structure, batches, labels)
    flat = torch.cat(labels)
    expected = differences(network, structure, batches, lambda i, z: F.cross_entropy(z, flat[i : i + 1]))
    assert_gradients_close(given, expected)


def in_maps(network: Network) -> Network:
    return tiny.network_around(Maps(network.module), dict(network.inputs), logits=True)


def dense_network() -> Network:
    """Logits for every token, ``(batch, tokens, classes)``."""
    module = tiny.vit(global_pool="").module.double()
    return tiny.network_around(module, doubles([tiny.images("x")])[0], logits=True)


def test_dense_labels_count_where_they_are_given() -> None:
    network = dense_network()
    structure = describe(network.module, network.inputs)
    batch = doubles([tiny.images("x", 3, seed=1)])
    labels = torch.tensor([[0, 1, 2, 1, 0], [-100, 1, -100, -100, 2], [-100] * 5])

    def loss(number: int, logits: Tensor) -> Tensor:
        pairs = [(z, c) for z, c in zip(logits[0], labels[number], strict=True) if c >= 0]
        return sum((-torch.log_softmax(z, 0)[c] for z, c in pairs), torch.zeros(())) / max(len(pairs), 1)

    given = mask_gradients(network, structure, batch, [labels])
    assert_gradients_close(given, differences(network, structure, batch, loss))
    assert all(float(g[2].abs().max()) == 0.0 for g in given.values())


def test_classes_of_maps_lie_on_the_second_axis() -> None:
    batch = doubles([tiny.images("x", 2, seed=1)])
    labels = [torch.tensor([[0, 1, 2, 1, 0], [-100, 1, -100, -100, 2]])]
    found = []
    plain = dense_network()
    for network in (plain, in_maps(plain)):
        gradients = mask_gradients(network, describe(network.module, network.inputs), batch, labels)
        found.append(list(gradients.values()))
    for tokens, maps in zip(*found, strict=True):
        torch.testing.assert_close(maps, tokens)


def test_networks_and_labels_that_do_not_suit_are_told() -> None:
    network, structure = tiny.network("bert"), tiny.structure("bert")
    with pytest.raises(UserError, match="class logits"):
        mask_gradients(network, structure, tiny.batches(network, 1), [torch.zeros(3).long()])
    network, structure = tiny.network("vit"), tiny.structure("vit")
    with pytest.raises(UserError, match=r"0 .* 1"):
        mask_gradients(network, structure, tiny.batches(network, 1), [])
    with pytest.raises(UserError, match="do not fit"):
        mask_gradients(network, structure, tiny.batches(network, 1), [torch.zeros(2).long()])


def test_scores_are_the_diagonal_of_the_fisher_information() -> None:
    gradients = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    information = sum(g.outer(g) for g in gradients) / 7
    torch.testing.assert_close(fisher_scores({"a": gradients})["a"], information.diagonal())
