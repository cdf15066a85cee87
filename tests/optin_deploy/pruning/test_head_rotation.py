import copy
from collections.abc import Sequence
from dataclasses import replace

import pytest
import timm.layers
import tiny
import torch
from torch import Tensor, nn

from optin_deploy.network import Network
from optin_deploy.nn.partial_forward import record_inputs, record_outputs
from optin_deploy.pruning.head_rotation import query_key_bases, rotate_heads_to_pca, value_bases
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Group, Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

pytestmark = pytest.mark.slow


NARROWABLE = [name for name in tiny.NAMES if name not in ("vit_qk_norm", "vit_gated")]


def widths(structure: Structure) -> list[Group]:
    return [g for g in structure.groups if g.kind == "width"]


def in_double(network: Network) -> Network:
    return replace(network, module=copy.deepcopy(network.module).double())


def doubles(batches: list[tiny.Batch]) -> list[tiny.Batch]:
    return [{n: t.double() if t.is_floating_point() else t for n, t in b.items()} for b in batches]


def second(rows: Tensor) -> Tensor:
    """Second moments of ``(heads, rows, width)``."""
    return rows.transpose(1, 2) @ rows


def random_rows(heads: int, count: int, width: int, seed: int) -> Tensor:
    """``(heads, count, width)`` in float64, as spread along some directions as data is."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(heads, count, width, generator=generator, dtype=torch.float64)
    mixing = torch.randn(heads, width, width, generator=generator, dtype=torch.float64)
    return drawn @ (mixing * torch.linspace(0.3, 2, width, dtype=torch.float64))


def error_of_rank(matrix: Tensor, rank: int) -> Tensor:
    """The least squared error of any approximation of that rank (Eckart & Young)."""
    return torch.linalg.svdvals(matrix)[:, rank:].square().sum(1)


# The network computes the same


@torch.no_grad()
@pytest.mark.parametrize("name", tiny.ALL_NAMES)
def test_the_function_is_unchanged(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    turned = rotate_heads_to_pca(network, structure, tiny.batches(network, 4))
    for batch in (network.inputs, *tiny.batches(network, 2, size=2)):
        expected, given = network.forward(batch), turned.forward(batch)
        for output in expected:
            torch.testing.assert_close(given[output], expected[output], rtol=0, atol=1e-5)
    assert (turned is network) == (not widths(structure))


@torch.no_grad()
def test_the_network_given_stays_as_it_is() -> None:
    network, structure = tiny.network("vit"), tiny.structure("vit")
    before = {n: t.clone() for n, t in network.module.state_dict().items()}
    turned = rotate_heads_to_pca(network, structure, tiny.batches(network, 2))
    assert all(torch.equal(t, before[n]) for n, t in network.module.state_dict().items())
    assert any(not torch.equal(t, before[n]) for n, t in turned.module.state_dict().items())
    assert turned.inputs is network.inputs and turned.outputs is network.outputs
    own, shared = turned.module.state_dict(keep_vars=True), network.module.state_dict(keep_vars=True)
    assert {n for n, t in own.items() if t is not shared[n]} == {n for n in own if ".attn." in n}
    for module in (network.module, turned.module):
        assert not any(m._forward_hooks or m._forward_pre_hooks for m in module.modules())


@pytest.mark.parametrize("name", ["vit", "bert", "vit_gated", "resnet"])
def test_without_widths_it_is_the_same_object(name: str) -> None:
    network = tiny.network(name)
    assert rotate_heads_to_pca(network, tiny.structure(name).without_widths(), tiny.batches(network, 1)) is network


@torch.no_grad()
def test_data_without_spread_does_no_harm() -> None:
    """One token, which is its own mean, and a head that gives nothing."""
    network = tiny.vit(class_token=False, global_pool="avg", patch_size=16)
    for parameter in network.module.blocks[0].attn.qkv.parameters():
        parameter[2 * tiny.WIDTH : 2 * tiny.WIDTH + 4] = 0
    structure = describe(network.module, network.inputs)
    assert widths(structure)
    turned = rotate_heads_to_pca(network, structure, [network.inputs])
    assert all(t.isfinite().all() for t in turned.module.state_dict().values())
    expected = network.module(**network.inputs)
    torch.testing.assert_close(turned.module(**network.inputs), expected, rtol=0, atol=1e-4)


@torch.no_grad()
def test_heads_wider_than_what_they_write() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = timm.layers.Attention(8, 2, attn_head_dim=12)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x)

    module = tiny.randomised(nn.Sequential(Block()))
    network = tiny.network_around(module, {"input": torch.randn(3, 9, 8)})
    structure = describe(module, network.inputs)
    turned = rotate_heads_to_pca(network, structure, [network.inputs])
    expected = module(**network.inputs)
    torch.testing.assert_close(turned.module(**network.inputs), expected, rtol=0, atol=1e-5)
    # Eight dimensions of a head are all that eight outputs can tell apart.
    (width,) = widths(structure)
    values = turned.module[0].attention.proj.weight.unflatten(1, (2, 12))
    assert float(values[..., 8:].abs().max()) <= 1e-4 * float(values.abs().max())
    assert width.units == 12


# The first dimensions are the best


def attentions(network: Network, group: Group, batches: Sequence[tiny.Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys (centred over each sample's tokens) and what heads give, ``(heads, valid tokens, width)``."""
    assert group.qkv is not None
    parts: list[list[Tensor]] = [[], [], []]
    for batch in batches:
        sources = (group.qkv.queries.module, group.qkv.keys.module)
        with (
            record_outputs(network.module, sources) as seen,
            record_inputs(network.module, (group.output,)) as given,
        ):
            network.forward(batch)
        q, k = (seen[r.module][..., r.of(seen[r.module].shape[-1])] for r in (group.qkv.queries, group.qkv.keys))
        for i in range(len(q)):
            length = int(batch["attention_mask"][i].sum()) if "attention_mask" in batch else q.shape[1]
            for kept, rows in zip(parts, (q, k, given[group.output]), strict=True):
                kept.append(rows[i, :length].reshape(length, -1, group.units))
            parts[1][-1] = parts[1][-1] - parts[1][-1].mean(0)
    queries, keys, given = (torch.cat(rows).double().transpose(0, 1) for rows in parts)
    return queries, keys, given


@pytest.mark.parametrize("width", [1, 2, 5, 8])
def test_logits_of_fewer_dimensions_are_the_best_of_their_rank(width: int) -> None:
    queries, keys = random_rows(3, 60, width, 1), random_rows(3, 40, width, 2)
    keys = keys - keys.mean(1, keepdim=True)
    a, b = query_key_bases(second(queries), second(keys))
    one = torch.eye(width, dtype=torch.float64).expand(3, -1, -1)
    torch.testing.assert_close(a @ b.transpose(1, 2), one, rtol=0, atol=1e-9)
    turned_queries, turned_keys = queries @ a, keys @ b
    logits = queries @ keys.transpose(1, 2)
    for rank in range(width + 1):
        truncated = turned_queries[..., :rank] @ turned_keys[..., :rank].transpose(1, 2)
        error = (logits - truncated).square().sum((1, 2))
        scale = logits.square().sum((1, 2))
        # The damping of moments costs about its size.
        assert ((error - error_of_rank(logits, rank)) / scale).abs().max() < 1e-6


@pytest.mark.parametrize(("width", "outputs"), [(1, 6), (4, 16), (8, 8), (6, 4)])
def test_values_of_fewer_dimensions_are_the_best_of_their_rank(width: int, outputs: int) -> None:
    given = random_rows(3, 50, width, 3)
    given = given - given.mean(1, keepdim=True)
    heads = random_rows(3, width, outputs, 4)
    basis = value_bases(second(given), heads)
    assert basis.shape == (3, width, width)
    one = torch.eye(width, dtype=torch.float64).expand(3, -1, -1)
    torch.testing.assert_close(basis.transpose(1, 2) @ basis, one, rtol=0, atol=1e-9)
    contribution = given @ heads
    scale = contribution.square().sum((1, 2))
    for rank in range(width + 1):
        # The values kept, with the weights that make the most of them: no others of this rank do better.
        kept = given @ basis[..., :rank]
        weights = torch.linalg.pinv(kept) @ contribution
        error = (contribution - kept @ weights).square().sum((1, 2))
        assert ((error - error_of_rank(contribution, rank)) / scale).abs().max() < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", ["vit", "vit_layer_scale", "hf_vit", "bert", "distilbert"])
def test_a_networks_heads_are_in_these_bases(name: str) -> None:
    network = in_double(tiny.network(name))
    structure, batches = tiny.structure(name), doubles(tiny.batches(network, 6))
    turned = rotate_heads_to_pca(network, structure, batches)
    for group in widths(structure):
        queries, keys, given = attentions(network, group, batches)
        turned_queries, turned_keys, turned_given = attentions(turned, group, batches)
        logits = queries @ keys.transpose(1, 2)
        torch.testing.assert_close(turned_queries @ turned_keys.transpose(1, 2), logits, rtol=1e-6, atol=1e-8)
        weight = network.module.get_parameter(f"{group.output}.weight")
        heads = weight.T.reshape(-1, group.units, len(weight))
        contribution = (given - given.mean(1, keepdim=True)) @ heads
        for rank in range(1, group.units):
            truncated = turned_queries[..., :rank] @ turned_keys[..., :rank].transpose(1, 2)
            error = (logits - truncated).square().sum((1, 2))
            assert (error <= 1.001 * error_of_rank(logits, rank) + 1e-6 * logits.square().sum((1, 2))).all()
            kept = (turned_given - turned_given.mean(1, keepdim=True))[..., :rank]
            left = (contribution - kept @ (torch.linalg.pinv(kept) @ contribution)).square().sum((1, 2))
            bound = 1.001 * error_of_rank(contribution, rank) + 1e-6 * contribution.square().sum((1, 2))
            assert (left <= bound).all()


@torch.no_grad()
def test_what_all_keys_have_in_common_does_not_count() -> None:
    network, structure = tiny.vit(qkv_bias=True), tiny.structure("vit")
    batches = tiny.batches(network, 3)
    first = rotate_heads_to_pca(network, structure, batches)
    for block in network.module.blocks:
        block.attn.qkv.bias[tiny.WIDTH : 2 * tiny.WIDTH] += 7.0
    second_time = rotate_heads_to_pca(network, structure, batches)
    for group in widths(structure):
        ours, theirs = (n.module.get_parameter(f"{group.parent}.qkv.weight") for n in (first, second_time))
        torch.testing.assert_close(ours, theirs, rtol=1e-2, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("name", ["bert", "distilbert"])
def test_what_stands_at_padding_does_not_matter(name: str) -> None:
    network, structure = tiny.network(name), tiny.structure(name)
    batch = tiny.texts(4, 9)
    padding = batch["attention_mask"] == 0
    other = {**batch, "input_ids": torch.where(padding, 17, batch["input_ids"])}
    longer = {n: torch.nn.functional.pad(t, (0, 4), value=3 if n == "input_ids" else 0) for n, t in batch.items()}
    expected = rotate_heads_to_pca(network, structure, [batch]).module.state_dict()
    for changed in (other, longer):
        given = rotate_heads_to_pca(network, structure, [changed]).module.state_dict()
        for key, value in expected.items():
            torch.testing.assert_close(given[key], value, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_samples_count_alike_however_they_are_batched() -> None:
    network, structure = tiny.network("bert"), tiny.structure("bert")
    batch = tiny.texts(4, 9)
    each = [{n: t[i : i + 1] for n, t in batch.items()} for i in range(4)]
    ours, theirs = (rotate_heads_to_pca(network, structure, b).module.state_dict() for b in ([batch], each))
    for key, value in ours.items():
        torch.testing.assert_close(theirs[key], value, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_narrow_heads_are_nearer_to_the_dense_ones_in_these_bases() -> None:
    network = tiny.vit(embed_dim=32, num_heads=2)
    structure = describe(network.module, network.inputs)
    turned = rotate_heads_to_pca(network, structure, tiny.batches(network, 10))
    plan = Plan({g.name: tuple(range(8)) for g in widths(structure)})
    unseen = tiny.images("x", 16, seed=100)
    dense = network.module(**unseen)
    errors = [float((slice_network(n.module, structure, plan)(**unseen) - dense).norm()) for n in (turned, network)]
    assert errors[0] < 0.7 * errors[1]
