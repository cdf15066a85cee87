import copy

import pytest
import tiny
import torch

from optin_deploy.nn.freezing import freeze_parameters
from optin_deploy.nn.partial_forward import record_inputs, record_outputs
from optin_deploy.structure.masking import mask_units


def outputs(masks: dict[str, torch.Tensor], batch: tiny.Batch, name: str = "bert") -> torch.Tensor:
    network = tiny.network(name)
    with torch.no_grad(), mask_units(network.module, tiny.structure(name), masks):
        return next(iter(network.forward(batch).values()))


def test_a_mask_scales_the_features_of_its_units() -> None:
    network, group = tiny.network("bert"), tiny.structure("bert").groups[0]
    factors = torch.tensor([0.0, 1.0, 0.5, 2.0])
    with torch.no_grad(), record_inputs(network.module, (group.output,)) as dense:
        network.forward(network.inputs)
    with (
        torch.no_grad(),
        mask_units(network.module, tiny.structure("bert"), {group.name: factors}),
        record_inputs(network.module, (group.output,)) as scaled,
    ):
        network.forward(network.inputs)
    for head in range(4):
        features = slice(head * group.width, (head + 1) * group.width)
        expected = dense[group.output][..., features] * factors[head]
        assert torch.equal(scaled[group.output][..., features], expected)


def test_stacked_copies_are_masked_apart() -> None:
    batch = tiny.texts()
    masks = torch.rand(5, tiny.HEADS, generator=torch.Generator().manual_seed(0))
    group = tiny.structure("bert").without_widths().groups[2].name
    stacked = outputs({group: masks}, {n: t.repeat(5, 1) for n, t in batch.items()})
    for mask, given in zip(masks, stacked.chunk(5), strict=True):
        torch.testing.assert_close(given, outputs({group: mask}, batch), rtol=0, atol=1e-6)


@torch.no_grad()
def test_masks_of_channels() -> None:
    network, structure = tiny.network("resnet"), tiny.structure("resnet")
    group = structure.groups[2]
    masks = torch.rand(4, group.units, generator=torch.Generator().manual_seed(0))
    with record_inputs(network.module, (group.output,)) as dense:
        network.forward(network.inputs)
    for mask in masks:
        with (
            mask_units(network.module, structure, {group.name: mask}),
            record_inputs(network.module, (group.output,)) as scaled,
        ):
            network.forward(network.inputs)
        for channel, factor in enumerate(mask):
            assert torch.equal(scaled[group.output][:, channel], dense[group.output][:, channel] * factor)
    stacked = outputs({group.name: masks}, {n: t.repeat(4, 1, 1, 1) for n, t in network.inputs.items()}, "resnet")
    for mask, given in zip(masks, stacked.chunk(4), strict=True):
        alone = outputs({group.name: mask}, network.inputs, "resnet")
        torch.testing.assert_close(given, alone, rtol=0, atol=1e-6)


def test_the_gradient_of_a_mask_is_gradient_times_activation() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    group = structure.group("blocks.0.mlp")
    mask = torch.ones(group.units, requires_grad=True)
    seen = {}

    def keep(_: object, args: tuple[torch.Tensor]) -> None:
        seen["activation"] = args[0]
        args[0].retain_grad()

    with mask_units(network.module, structure, {group.name: mask}):
        handle = network.module.get_submodule(group.output).register_forward_pre_hook(keep)
        network.forward(network.inputs)["output"].square().sum().backward()
    handle.remove()
    network.module.zero_grad()
    activation = seen["activation"]
    torch.testing.assert_close(mask.grad, (activation * activation.grad).sum((0, 1)))


def test_masks_leave_with_the_context() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    with pytest.raises(KeyError), mask_units(network.module, structure, {"blocks.0.attn": torch.ones(4), "none": None}):
        pass
    with pytest.raises(ZeroDivisionError), mask_units(network.module, structure, {"blocks.0.attn": torch.zeros(4)}):
        raise ZeroDivisionError
    assert not any(m._forward_pre_hooks for m in network.module.modules())


def test_freezing_restores_gradients() -> None:
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with pytest.raises(ZeroDivisionError), freeze_parameters(module):
        assert not module.weight.requires_grad
        raise ZeroDivisionError
    assert module.weight.requires_grad
    assert not module.bias.requires_grad


# The width of heads


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "bert"])
def test_a_mask_on_width_scales_queries_and_what_all_heads_give(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    group = structure.groups[1]
    assert group.kind == "width" and group.qkv is not None
    factors = torch.tensor([0.0, 1.0, 0.5, 2.0])
    rows = (group.qkv.queries, group.qkv.keys, group.qkv.values)
    sources = tuple(r.module for r in rows)

    def projected() -> tuple[list[torch.Tensor], torch.Tensor]:
        with (
            record_inputs(network.module, (group.output,)) as given,
            record_outputs(network.module, sources) as seen,
        ):
            network.forward(network.inputs)
        parts = [seen[r.module][..., r.of(seen[r.module].shape[-1])] for r in rows]
        return parts, given[group.output]

    (queries, keys, values), given = projected()
    with mask_units(network.module, structure, {group.name: factors}):
        (masked_queries, masked_keys, masked_values), masked_given = projected()
    assert torch.equal(masked_queries, queries * factors.repeat(tiny.HEADS))
    assert torch.equal(masked_keys, keys) and torch.equal(masked_values, values)
    # Attention by hand: the dimensions that are left of queries, and of what the heads give.
    q, k, v = (x.unflatten(-1, (tiny.HEADS, 4)).transpose(1, 2) for x in (masked_queries, keys, values))
    logits = q @ k.transpose(-1, -2) / 4**0.5
    if name == "bert":
        logits = logits.masked_fill(network.inputs["attention_mask"][:, None, None] == 0, -torch.inf)
    expected = (torch.softmax(logits, -1) @ v).transpose(1, 2).flatten(2) * factors.repeat(tiny.HEADS)
    torch.testing.assert_close(masked_given, expected, rtol=0, atol=1e-5)
    assert not torch.allclose(masked_given, given * factors.repeat(tiny.HEADS), atol=1e-3)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.module.modules())


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_stacked_copies_have_widths_of_their_own(name: str) -> None:
    batch, structure = dict(tiny.network(name).inputs), tiny.structure(name)
    generator = torch.Generator().manual_seed(0)
    masks = {g.name: torch.rand(5, g.units, generator=generator) for g in structure.groups[:2]}
    stacked = outputs(masks, {n: t.repeat(5, *[1] * (t.dim() - 1)) for n, t in batch.items()}, name)
    for i, given in enumerate(stacked.chunk(5)):
        alone = outputs({n: m[i] for n, m in masks.items()}, batch, name)
        torch.testing.assert_close(given, alone, rtol=0, atol=1e-6)


def test_gradients_flow_into_masks_on_width() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    module = copy.deepcopy(network.module).double()
    batch, group = {"x": network.inputs["x"].double()}, structure.groups[1]
    weights = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)

    def loss(mask: torch.Tensor) -> torch.Tensor:
        with mask_units(module, structure, {group.name: mask}):
            return torch.sum(weights * module(**batch))

    mask = torch.ones(group.units, dtype=torch.float64, requires_grad=True)
    (given,) = torch.autograd.grad(loss(mask), mask)
    for unit, step in enumerate(1e-5 * torch.eye(group.units, dtype=torch.float64)):
        with torch.no_grad():
            expected = float(loss(mask + step) - loss(mask - step)) / 2e-5
        assert float(given[unit]) == pytest.approx(expected, rel=1e-5, abs=1e-8)
