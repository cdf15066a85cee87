import pytest
import tiny
import torch

from optin_deploy.masking import frozen, masked
from optin_deploy.replay import recorded_inputs


def outputs(masks: dict[str, torch.Tensor], batch: tiny.Batch, name: str = "bert") -> torch.Tensor:
    network = tiny.network(name)
    with torch.no_grad(), masked(network.module, tiny.structure(name), masks):
        return next(iter(network.forward(batch).values()))


def test_a_mask_scales_the_features_of_its_units() -> None:
    network, group = tiny.network("bert"), tiny.structure("bert").groups[0]
    factors = torch.tensor([0.0, 1.0, 0.5, 2.0])
    with torch.no_grad(), recorded_inputs(network.module, (group.output,)) as dense:
        network.forward(network.inputs)
    with (
        torch.no_grad(),
        masked(network.module, tiny.structure("bert"), {group.name: factors}),
        recorded_inputs(network.module, (group.output,)) as scaled,
    ):
        network.forward(network.inputs)
    for head in range(4):
        features = slice(head * group.width, (head + 1) * group.width)
        expected = dense[group.output][..., features] * factors[head]
        assert torch.equal(scaled[group.output][..., features], expected)


def test_stacked_copies_are_masked_apart() -> None:
    batch = tiny.texts()
    masks = torch.rand(5, tiny.HEADS, generator=torch.Generator().manual_seed(0))
    group = tiny.structure("bert").groups[2].name
    stacked = outputs({group: masks}, {n: t.repeat(5, 1) for n, t in batch.items()})
    for mask, given in zip(masks, stacked.chunk(5), strict=True):
        torch.testing.assert_close(given, outputs({group: mask}, batch), rtol=0, atol=1e-6)


def test_the_gradient_of_a_mask_is_gradient_times_activation() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    group = structure.group("blocks.0.mlp")
    mask = torch.ones(group.units, requires_grad=True)
    seen = {}

    def keep(_: object, args: tuple[torch.Tensor]) -> None:
        seen["activation"] = args[0]
        args[0].retain_grad()

    with masked(network.module, structure, {group.name: mask}):
        handle = network.module.get_submodule(group.output).register_forward_pre_hook(keep)
        network.forward(network.inputs)["output"].square().sum().backward()
    handle.remove()
    network.module.zero_grad()
    activation = seen["activation"]
    torch.testing.assert_close(mask.grad, (activation * activation.grad).sum((0, 1)))


def test_masks_leave_with_the_context() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    with pytest.raises(KeyError), masked(network.module, structure, {"blocks.0.attn": torch.ones(4), "none": None}):
        pass
    with pytest.raises(ZeroDivisionError), masked(network.module, structure, {"blocks.0.attn": torch.zeros(4)}):
        raise ZeroDivisionError
    assert not any(m._forward_pre_hooks for m in network.module.modules())


def test_frozen_gives_back_what_was_there() -> None:
    module = torch.nn.Linear(2, 2)
    module.bias.requires_grad_(False)
    with pytest.raises(ZeroDivisionError), frozen(module):
        assert not module.weight.requires_grad
        raise ZeroDivisionError
    assert module.weight.requires_grad
    assert not module.bias.requires_grad
