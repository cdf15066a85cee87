from typing import Any

import pytest
import tiny
import torch
from torch import Tensor, nn

from optin_deploy.nn.calls import first_tensor
from optin_deploy.nn.partial_forward import forward_until, record_inputs, record_outputs, replay_blocks

pytestmark = pytest.mark.slow


def hooks(module: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in module.modules())


def forwards(module: nn.Module) -> list[Any]:
    return [m.__dict__.get("forward") for m in module.modules()]


@torch.no_grad()
def block_outputs(name: str) -> dict[str, Any]:
    network = tiny.network(name)
    with record_outputs(network.module, tiny.structure(name).blocks) as seen:
        network.forward(network.inputs)
    return seen


@pytest.mark.parametrize("name", tiny.ALL_NAMES)
@torch.no_grad()
def test_running_on_from_a_block_gives_the_full_run(name: str) -> None:
    network, blocks = tiny.network(name), tiny.structure(name).blocks
    expected, seen = network.forward(network.inputs), block_outputs(name)
    ran = []
    handle = network.module.get_submodule(f"{blocks[0]}").register_forward_pre_hook(lambda *_: ran.append(1))
    inner = next(n for n, _ in network.module.get_submodule(blocks[0]).named_children())
    inner_handle = network.module.get_submodule(f"{blocks[0]}.{inner}").register_forward_pre_hook(
        lambda *_: pytest.fail("a skipped block ran")
    )
    with replay_blocks(network.module, {blocks[0]: seen[blocks[0]]}):
        given = network.forward(network.inputs)
    handle.remove()
    inner_handle.remove()
    assert ran
    assert all(torch.equal(given[n], expected[n]) for n in expected)


@pytest.mark.parametrize("name", tiny.ALL_NAMES)
@torch.no_grad()
def test_running_until_a_block_gives_its_output(name: str) -> None:
    network, seen = tiny.network(name), block_outputs(name)
    for block, output in seen.items():
        given = forward_until(network.module, network.inputs, block)
        assert type(given) is type(output)
        assert torch.equal(first_tensor(given), first_tensor(output))
    first, second = list(seen)[:2]
    with replay_blocks(network.module, {first: seen[first]}):
        given = forward_until(network.module, network.inputs, second)
    assert torch.equal(first_tensor(given), first_tensor(seen[second]))
    assert hooks(network.module) == 0


def test_later_blocks_do_not_run() -> None:
    network = tiny.network("vit")
    handle = network.module.blocks[1].register_forward_pre_hook(lambda *_: pytest.fail("ran"))
    forward_until(network.module, network.inputs, "blocks.0")
    handle.remove()


def test_a_block_that_does_not_run_is_an_error() -> None:
    network = tiny.network("vit")
    module = nn.ModuleDict({"used": nn.Identity(), "unused": nn.Identity()})
    module.forward = lambda x: module["used"](x)
    with pytest.raises(RuntimeError, match="unused"):
        forward_until(module, network.inputs, "unused")
    assert hooks(module) == 0


def test_everything_is_restored_after_an_exception() -> None:
    network = tiny.network("vit")
    before = forwards(network.module)
    with (
        pytest.raises(ZeroDivisionError),
        replay_blocks(network.module, {"blocks.0": torch.zeros(1)}),
        record_inputs(network.module, ("blocks.1",)),
        record_outputs(network.module, ("blocks.1",)),
    ):
        raise ZeroDivisionError
    assert forwards(network.module) == before
    assert hooks(network.module) == 0
    with pytest.raises(TypeError):
        forward_until(network.module, {}, "blocks.0")
    assert hooks(network.module) == 0


def test_a_forward_that_was_overridden_comes_back() -> None:
    block = nn.Linear(2, 2)
    module = nn.Sequential(block)
    block.forward = lambda x: x + 1
    overridden = block.forward
    with replay_blocks(module, {"0": torch.ones(1)}):
        assert torch.equal(module(torch.zeros(1)), torch.ones(1))
    assert block.forward is overridden


def test_recording_keyword_inputs() -> None:
    module = nn.Sequential(nn.Identity())
    x = torch.ones(2)
    with record_inputs(module, ("0",)) as given, record_outputs(module, ("0",)) as returned:
        module[0](input=x)
    assert given["0"] is x
    assert returned["0"] is x


def test_several_runs_are_concatenated() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.linear(self.linear(x))

    module, x = Twice(), torch.randn(2, 3)
    once = module.linear(x)
    # A name that is given twice is still one module.
    with record_inputs(module, ("linear", "linear")) as given, record_outputs(module, ("linear",)) as returned:
        twice = module(x)
    assert torch.equal(given["linear"], torch.cat([x, once]))
    assert torch.equal(returned["linear"], torch.cat([once, twice]))
