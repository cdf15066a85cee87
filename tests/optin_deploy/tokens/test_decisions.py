"""Files below float32 that merge tokens: they pass the parity gate where they are right, and only there."""

from pathlib import Path
from typing import Any, get_args

import numpy as np
import onnx
import pytest
import torch
from onnx import helper, numpy_helper
from tiny_models import POSITIONS, classifier, save_bert
from torch import Tensor

from exporters import Precision
from optin_deploy.config.recipe import Recipe
from optin_deploy.export.onnx_file import check_onnx, export_files
from optin_deploy.models.load import load_network
from optin_deploy.network import Network
from optin_deploy.pruning.space import analyze
from optin_deploy.structure.plan import Plan
from optin_deploy.tokens.choices import Choice, choose, regret
from optin_deploy.tokens.decisions import decision_names
from optin_deploy.tokens.merging import with_merging

pytestmark = pytest.mark.slow


LOW: tuple[Precision, ...] = ("fp16", "bf16", "int8")


def merging(network: Network, schedule: tuple[int, ...]) -> Network:
    space = analyze(network, tokens=True)
    assert space.stack is not None
    with_merging(network.module, space.structure, space.stack, Plan({}, schedule))
    return network


def pictures(seed: int) -> Network:
    network = classifier(10, depth=2, patch_size=4)
    torch.manual_seed(seed)
    for parameter in network.module.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    return merging(network, (50, 36))


def texts(folder: Path, seed: int) -> Network:
    torch.manual_seed(seed)
    save_bert(folder)
    return merging(load_network(str(folder), sequence_length=POSITIONS), (POSITIONS, POSITIONS // 2 + 1))


def held_out(network: Network, count: int, seed: int) -> dict[str, Tensor]:
    made = torch.Generator().manual_seed(seed)
    batch = {}
    for name, tensor in network.inputs.items():
        shape = (count, *tensor.shape[1:])
        if tensor.is_floating_point():
            batch[name] = torch.randn(shape, generator=made)
        elif name == network.token_mask:
            batch[name] = (torch.arange(shape[1]) < torch.randint(8, shape[1], (count, 1), generator=made)).long()
        else:
            batch[name] = torch.randint(0, 2 if "type" in name else 40, shape, generator=made)
    return batch


def export(network: Network, path: Path, precision: Precision) -> tuple[Recipe, Any]:
    runtimes = ("torch-cuda",) if precision == "bf16" else ("ort-cpu",)
    recipe = Recipe(model="mine", flops=0.5, precision=precision, runtimes=runtimes, threads=1)
    batches = (held_out(network, 8, 1),)
    export_files(network, path, path.with_suffix(".pt2"), recipe, batches)
    return recipe, (held_out(network, 8, 2),)


@pytest.mark.parametrize("precision", LOW)
@pytest.mark.parametrize("seed", range(2))
def test_pictures_pass(tmp_path: Path, precision: Precision, seed: int) -> None:
    network, path = pictures(seed), tmp_path / "net.onnx"
    recipe, batches = export(network, path, precision)
    (parity,) = check_onnx(network, path, batches, recipe)
    assert parity.passed, parity
    assert [v.name for v in onnx.load(path).graph.output] == ["logits"]


@pytest.mark.parametrize("precision", LOW)
def test_texts_pass(tmp_path: Path, precision: Precision) -> None:
    network, path = texts(tmp_path / "model", 0), tmp_path / "net.onnx"
    recipe, batches = export(network, path, precision)
    assert all(parity.passed for parity in check_onnx(network, path, batches, recipe))


@pytest.mark.parametrize("precision", LOW)
def test_a_wrong_weight_fails(tmp_path: Path, precision: Precision) -> None:
    network, path = pictures(0), tmp_path / "net.onnx"
    recipe, batches = export(network, path, precision)
    model = onnx.load(path)
    product = [n for n in model.graph.node if n.op_type in ("MatMul", "Gemm")][-1]
    weights = {t.name: t for t in model.graph.initializer}
    made = {output: node for node in model.graph.node for output in node.output}
    name = product.input[1]
    while name not in weights:
        name = made[name].input[0]
    values = numpy_helper.to_array(weights[name])
    weights[name].CopyFrom(numpy_helper.from_array(np.roll(values, 1, axis=-1).copy(), name))
    onnx.save(model, path)
    (parity,) = check_onnx(network, path, batches, recipe)
    assert not parity.passed


@pytest.mark.parametrize("precision", LOW)
def test_merging_what_is_least_alike_fails(tmp_path: Path, precision: Precision) -> None:
    network, path = pictures(0), tmp_path / "net.onnx"
    recipe, batches = export(network, path, precision)
    model = onnx.load(path)
    swapped = 0
    for node in list(model.graph.node):
        if node.op_type in ("ArgMax", "ReduceMax") and any("blocks" in p.value for p in node.metadata_props):
            (source,) = (node.input[0],)
            position = list(model.graph.node).index(node)
            negative = helper.make_node("Neg", [source], [f"{source}.neg.{swapped}"])
            model.graph.node.insert(position, negative)
            node.input[0] = negative.output[0]
            swapped += 1
    assert swapped
    onnx.save(model, path)
    (parity,) = check_onnx(network, path, batches, recipe)
    assert not parity.passed


def test_decisions_are_named_below_float32_alone() -> None:
    network = pictures(0)
    named = {precision: decision_names(network, precision) for precision in get_args(Precision)}
    assert named["fp32"] == named["tf32"] == ()
    assert named["fp16"][:2] == ("blocks.0.merging.leaves", "blocks.0.merging.nearest") and len(named["fp16"]) == 4
    assert decision_names(classifier(10), "fp16") == ()


def slow_regret(similarity: Tensor, given: Choice, real: Tensor) -> float:
    """Of one sample, by comparing each pair that the choice decides."""
    worst, rows = 0.0, range(len(similarity))
    best = [2.0 if not real[i] else float(similarity[i].max()) for i in rows]
    for i in rows:
        if given.leaves[0, i] and real[i]:
            worst = max(worst, best[i] - float(similarity[i, given.nearest[0, i]]))
        for j in rows:
            if given.leaves[0, i] and not given.leaves[0, j]:
                worst = max(worst, best[j] - best[i])
    return worst


@pytest.mark.parametrize("seed", range(20))
def test_regret_is_the_largest_difference_decided_the_other_way(seed: int) -> None:
    made = torch.Generator().manual_seed(seed)
    similarity, count = torch.rand(1, 6, 5, generator=made) * 2 - 1, 3
    real = torch.rand(1, 6, generator=made) > 0.2
    leaves = torch.zeros(1, 6, dtype=torch.bool)
    leaves[0, torch.randperm(6, generator=made)[:count]] = True
    given = Choice(leaves, torch.randint(0, 5, (1, 6), generator=made))
    expected = slow_regret(similarity[0], given, real[0])
    assert float(regret(similarity, count, given, real)) == pytest.approx(expected, abs=1e-6)
    assert float(regret(similarity, count, choose(similarity, count, real), real)) == 0


def test_what_is_no_choice_is_regretted_without_end() -> None:
    similarity = torch.rand(1, 4, 3)
    fewer = Choice(torch.tensor([[True, False, False, False]]), torch.zeros(1, 4, dtype=torch.int64))
    outside = Choice(torch.tensor([[True, True, False, False]]), torch.full((1, 4), 3))
    assert regret(similarity, 2, fewer).tolist() == regret(similarity, 2, outside).tolist() == [torch.inf]
