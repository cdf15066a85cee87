"""Families of transformers: what is found in them can be cut, counted, compensated, saved and exported."""

from pathlib import Path

import families
import onnxruntime
import pytest
import tiny
import torch
from torch import Tensor

from exporters import onnx_from_program, trace
from optin_deploy.criteria.scoring import Scoring
from optin_deploy.models import checkpoint
from optin_deploy.network import Network, TensorOutputs
from optin_deploy.nn.flops import count_flops
from optin_deploy.pruning.pruner import prune
from optin_deploy.search.costs import flop_costs
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Structure
from optin_deploy.structure.masking import mask_units
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

pytestmark = pytest.mark.slow


# What is left dense in them, besides what nothing is known of.
_DENSE = {
    "mask2former": ("sequences first", "cannot be run", "mask_embedder: runs several times"),
    "swinv2": ("continuous_position_bias_mlp",),
    # In the oldest releases these take all heads together to be as wide as the attention's input.
    "detr": ("attn: cannot be run",),
    "siglip_vision": ("attn: cannot be run",),
}
_EXPORTED = ("albert", "t5_encoder")


def errors(given: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    return max(float((given[n].double() - t.double()).norm() / t.double().norm()) for n, t in expected.items())


def small_plan(structure: Structure) -> Plan:
    """As few units as may stay; widths, which are no units, left out."""
    return Plan({g.name: tuple(range(g.min_units)) for g in structure.without_widths().groups})


@torch.no_grad()
@pytest.mark.parametrize("name", families.FAMILIES)
def test_sliced_is_masked_and_costs_what_was_planned(name: str) -> None:
    network = families.network(name)
    structure = describe(network.module, network.inputs)
    assert {g.kind for g in structure.groups} >= ({"neuron"} if "attn" in str(_DENSE.get(name)) else {"head", "neuron"})
    dense = [f"{left.module}: {left.reason}" for left in structure.left_dense]
    assert not [line for line in dense if not any(words in line for words in _DENSE.get(name, ()))]
    costs = flop_costs(network.module, structure, network.inputs)
    batch = families.batches(network, 1)[0]
    whole = network.forward(batch)
    uneven = tiny.uneven_plan(structure)
    uneven = Plan({n: kept or tuple(range(structure.group(n).min_units)) for n, kept in uneven.kept.items()})
    for plan in (uneven, small_plan(structure)):
        with mask_units(network.module, structure, tiny.masks_of(structure, plan)):
            expected = network.forward(batch)
        small = slice_network(network.module, structure, plan)
        assert errors(network.forward(batch, small), expected) < 1e-5
        assert errors(expected, whole) > 1e-3
        assert count_flops(small, network.inputs) == pytest.approx(costs.of(plan), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "criterion"),
    [
        *((name, "trajectory-obs") for name in ("albert", "clip", "gpt2", "mask2former", "mpnet", "qwen3", "t5")),
        *((name, "trajectory") for name in ("albert", "clip")),
    ],
)
def test_pruned_under_a_budget_compensated_and_loaded_again(name: str, criterion: str, tmp_path: Path) -> None:
    network = families.network(name)
    batches = families.batches(network, 2)
    flops = 0.6 if name == "mask2former" else 0.5
    pruned = prune(network, batches, flops, align=8, scoring=Scoring(criterion=criterion))
    part = count_flops(pruned.network.module, network.inputs) / count_flops(network.module, network.inputs)
    assert flops - 0.02 < part <= flops
    checkpoint.save(pruned.network, pruned.plan, tmp_path / "small")
    again = checkpoint.load_network(tmp_path / "small")
    with torch.no_grad():
        expected, given = pruned.network.forward(batches[0]), again.forward(batches[0])
    assert errors(given, expected) < 1e-6


@torch.no_grad()
@pytest.mark.parametrize("name", ["albert", "t5", "gpt2", "llama"])
def test_repair_brings_the_pruned_network_nearer(name: str) -> None:
    network = families.network(name)
    batches = families.batches(network, 6)
    dense = network.forward(batches[0])
    plain, compensated = (prune(network, batches, 0.5, align=8, ridge=ridge).network for ridge in (None, 0.01))
    assert errors(compensated.forward(batches[0]), dense) < 0.8 * errors(plain.forward(batches[0]), dense)


@torch.no_grad()
def test_layers_with_shared_biases_keep_heads_of_their_own_in_several_rounds() -> None:
    network = families.network("t5")
    batches = families.batches(network, 2)
    structure = describe(network.module, network.inputs)
    pruned = prune(network, batches, 0.6, align=8, rounds=2, ridge=None, narrow=False)
    with mask_units(network.module, structure, tiny.masks_of(structure, pruned.plan)):
        expected = network.forward(batches[0])
    assert errors(pruned.network.forward(batches[0]), expected) < 1e-5
    heads = {g.name: pruned.plan.kept[g.name] for g in structure.groups if g.kind == "head"}
    assert len(set(heads.values())) > 1


@pytest.mark.parametrize("name", _EXPORTED)
def test_onnx_gives_what_torch_does_at_other_sizes(name: str, tmp_path: Path) -> None:
    network = families.network(name)
    structure = describe(network.module, network.inputs)
    small = network.with_module(slice_network(network.module, structure, tiny.uneven_plan(structure.without_widths())))
    names, path = tuple(network.outputs), tmp_path / "model.onnx"
    module = TensorOutputs(small.module, small.outputs)
    program = trace(module, network.inputs, network.dynamic_axes)
    onnx_from_program(program, path, output_names=names, dynamic_axes=network.dynamic_axes)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (families.batches(network, 1)[0], _shorter(network)):
        given = session.run(None, {n: t.numpy() for n, t in batch.items()})
        with torch.no_grad():
            expected = small.forward(batch)
        assert errors(dict(zip(names, map(torch.from_numpy, given), strict=True)), expected) < 1e-4


def _shorter(network: Network) -> tiny.Batch:
    """One sample, with sequences two tokens shorter."""
    sequences = network.sequence_inputs
    return {n: t[:1, :-2] if n in sequences else t[:1] for n, t in families.batches(network, 1)[0].items()}
