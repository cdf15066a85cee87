from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from optin_deploy.errors import UserError
from optin_deploy.latency.block_stacks import BlockType, Stack, block_types, build_stack, part_name
from optin_deploy.latency.target import Target, write_module
from optin_deploy.network import Network
from profilers import open_runner

pytestmark = pytest.mark.slow


def types_of(name: str) -> tuple[Network, list[BlockType]]:
    network = tiny.network(name)
    return network, block_types(network.module, tiny.structure(name), network.inputs)


def block_of(module: nn.Module, kind: BlockType) -> nn.Module:
    """The block itself; of two convolutions in a row, all that runs from the first to the second."""
    if kind.groups[0][0].output != kind.blocks[0]:
        return module.get_submodule(kind.blocks[0])
    *before, last = (module.get_submodule(side.module) for side in kind.groups[0][0].sides)
    return nn.Sequential(*before, nn.ReLU(), last)


def first_tensor(output: object) -> Tensor:
    return pytree.tree_leaves(output)[0]


@pytest.mark.parametrize("name", tiny.ALL_NAMES)
def test_every_block_is_of_one_type(name: str) -> None:
    _, types = types_of(name)
    structure = tiny.structure(name)
    assert sorted(b for t in types for b in t.blocks) == sorted(structure.blocks)
    assert sorted(g.name for t in types for groups in t.groups for g in groups) == sorted(
        g.name for g in structure.groups
    )
    # Transformers repeat one block; the blocks of a ResNet differ, and so do convolutions in a row.
    pairs = [g for g in structure.groups if g.output in structure.blocks]
    assert name in tiny.CNN_NAMES or len(types) == 1 + len(pairs)


@pytest.mark.parametrize("name", tiny.ALL_NAMES)
def test_a_stack_runs_its_block_again_and_again(name: str) -> None:
    network, types = types_of(name)
    for kind in types:
        block = block_of(network.module, kind)
        args, kwargs = kind.call
        made, inputs = build_stack(network.module, tiny.structure(name), kind, {}, depth=3)
        stream = inputs["x0"]
        with torch.no_grad():
            once = first_tensor(block(*args, **kwargs))
            if once.shape != stream.shape:
                expected = 3 * once
            else:
                leaves, layout = pytree.tree_flatten(kind.call)
                place = next(i for i, leaf in enumerate(leaves) if leaf is stream)
                expected = stream
                for _ in range(3):
                    leaves[place] = expected
                    again_args, again_kwargs = pytree.tree_unflatten(leaves, layout)
                    expected = first_tensor(block(*again_args, **again_kwargs))
            torch.testing.assert_close(made(**inputs), expected)


@pytest.mark.parametrize(("name", "number"), [("vit", 0), ("bert", 0), ("resnet", 0), ("upsampler", 1)])
def test_a_stack_is_cut_to_size(name: str, number: int) -> None:
    network, types = types_of(name)
    kind = types[number]
    sizes = {g.name: max(1, g.units // 2) for g in kind.groups[0]}
    dense, inputs = build_stack(network.module, tiny.structure(name), kind, {}, depth=2)
    small, _ = build_stack(network.module, tiny.structure(name), kind, sizes, depth=2)
    empty, _ = build_stack(network.module, tiny.structure(name), kind, {kind.groups[0][0].name: 0}, depth=2)
    count = [sum(p.numel() for p in made.parameters()) for made in (dense, small, empty)]
    assert count[1] < count[0]
    assert count[2] < count[0]
    with torch.no_grad():
        assert small(**inputs).shape == empty(**inputs).shape == dense(**inputs).shape


@pytest.mark.parametrize(
    ("name", "number", "runtime"),
    [("vit", 0, "ort-cpu"), ("bert", 0, "ort-cpu"), ("resnet", 0, "torch"), ("upsampler", 2, "ort-cpu")],
)
def test_a_stack_is_exported_for_any_batch_size(name: str, number: int, runtime: str, tmp_path: Path) -> None:
    network, types = types_of(name)
    made, inputs = build_stack(network.module, tiny.structure(name), types[number], {}, depth=2)
    axes = {n: {0: "batch"} for n in inputs}
    path = write_module(made, inputs, axes, Target(runtime, 1, 1), tmp_path / "stack")
    five = {n: t[:1].repeat_interleave(5, 0) for n, t in inputs.items()}
    with open_runner(runtime, path, 1) as runner, torch.no_grad():
        (found,) = runner.infer({n: t.numpy() for n, t in five.items()}).values()
        np.testing.assert_allclose(found, made(**five), rtol=1e-4, atol=1e-4)


def test_names_of_parts_are_those_within_the_block() -> None:
    _, (kind,) = types_of("vit")
    assert kind.parts == ("attn", "mlp")
    assert [part_name(kind.blocks[1], g) for g in kind.groups[1] if g.kind != "width"] == ["attn", "mlp"]


def test_the_part_of_two_convolutions_is_their_channels() -> None:
    assert [kind.parts for kind in types_of("upsampler")[1]] == [("attn", "mlp"), ("channel",), ("channel",)]


def test_what_describes_a_type_is_the_same_for_each_of_its_blocks_and_any_weights() -> None:
    _, (kind,) = types_of("vit")
    other = tiny.vit()
    (again,) = block_types(other.module, tiny.structure("vit"), other.inputs)
    assert again.describe() == kind.describe()


def test_a_block_without_a_tensor_per_sample_is_told() -> None:
    with pytest.raises(UserError, match=r"Linear .*no tensor"):
        Stack(nn.Linear(2, 2), 1, ((torch.zeros(1, 2),), {}))
