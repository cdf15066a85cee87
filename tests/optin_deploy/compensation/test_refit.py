import copy
from dataclasses import replace

import numpy as np
import pytest
import scipy.linalg
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models.vision_transformer import ResPostBlock
from torch import nn

from optin_deploy.compensation.pair import CompensationPair
from optin_deploy.compensation.refit import compensate
from optin_deploy.network import Network
from optin_deploy.nn.calls import first_tensor
from optin_deploy.nn.partial_forward import record_inputs, record_outputs
from optin_deploy.structure.describe import describe
from optin_deploy.structure.groups import Group, Stream, Structure
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import output_bias, slice_network

pytestmark = pytest.mark.slow


RIDGE = 0.01
BATCHES = 6


def structure_of(name: str) -> Structure:
    """Heads, neurons and channels."""
    return tiny.structure(name).without_widths()


def compensated(network: Network, structure: Structure, plan: Plan, ridge: float = RIDGE) -> nn.Module:
    small = slice_network(network.module, structure, plan)
    compensate(CompensationPair(network, small, structure, plan), tiny.batches(network, BATCHES), (ridge,))
    return small


def as_matrix(module: nn.Module, group: Group, plan: Plan) -> np.ndarray:
    """Weights and, in the last row, the bias behind the units of ``group``, in float64."""
    bias = output_bias(module, group)
    weight = module.get_parameter(f"{group.output}.weight").T if plan.kept[group.name] else torch.zeros(0, tiny.WIDTH)
    return torch.cat([weight, bias[None] if bias is not None else weight[:0]]).detach().double().numpy()


# Where the residual stream enters a sublayer, and where it stands after it: block-relative module, and whether that
# module's input or output is meant.
STREAMS = {
    "vit": {"head": ("norm1", "norm2", "input"), "neuron": ("norm2", "", "output")},
    "vit_layer_scale": {"head": ("norm1", "norm2", "input"), "neuron": ("norm2", "", "output")},
    "vit_without_biases": {"head": ("norm1", "norm2", "input"), "neuron": ("norm2", "", "output")},
    "dinov2": {"head": ("norm1", "norm2", "input"), "neuron": ("norm2", "", "output")},
    "hf_vit": {"head": ("layernorm_before", "layernorm_after", "input"), "neuron": ("layernorm_after", "", "output")},
    "bert": {
        "head": ("attention", "attention.output.LayerNorm", "input"),
        "neuron": ("intermediate", "output.LayerNorm", "input"),
    },
    "distilbert": {
        "head": ("attention", "sa_layer_norm", "input"),
        "neuron": ("ffn", "output_layer_norm", "input"),
    },
}


@torch.no_grad()
def rows(name: str, small: nn.Module, group: Group, plan: Plan, network: Network) -> tuple[np.ndarray, np.ndarray]:
    """Activations behind the kept units in the pruned network, and what the projection should give; no padding."""
    block = structure_of(name).blocks[group.layer]
    before, after, side = STREAMS[name][group.kind]
    stream_at, target_at = f"{block}.{before}", f"{block}.{after}".rstrip(".")
    xs, targets = [], []
    for batch in tiny.batches(network, BATCHES):
        record = record_inputs if side == "input" else record_outputs
        with record(network.module, (target_at,)) as dense:
            network.forward(batch)
        inside = (group.output,) if plan.kept[group.name] else ()
        with record_inputs(small, (stream_at, *inside)) as pruned:
            network.forward(batch, small)
        target = first_tensor(dense[target_at]) - pruned[stream_at]
        x = pruned[group.output] if inside else target[..., :0]
        valid = batch["attention_mask"].bool() if "attention_mask" in batch else torch.ones(x.shape[:2]).bool()
        xs.append(x[valid])
        targets.append(target[valid])
    gamma = network.module.get_parameter(group.stream.scale) if group.stream.scale else torch.ones(tiny.WIDTH)
    return torch.cat(xs).double().numpy(), (torch.cat(targets) / gamma).double().numpy()


def ridge_solution(x: np.ndarray, target: np.ndarray, old: np.ndarray, ridge: float) -> np.ndarray:
    """Least squares on rows, the penalty as further rows."""
    features = x.shape[1]
    design = np.hstack([x, np.ones((len(x), 1))])[:, : len(old)]
    penalty = np.sqrt(ridge * (x**2).sum(0).mean()) if features else 0.0
    design_and_penalty = np.vstack([design, penalty * np.eye(len(old))[:features]])
    missing = np.vstack([target - design @ old, np.zeros((features, target.shape[1]))])
    return old + scipy.linalg.lstsq(design_and_penalty, missing)[0]


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("which", ["uneven", "vanished heads", "vanished neurons"])
def test_every_refit_is_the_ridge_solution(name: str, which: str) -> None:
    network, structure = tiny.network(name), structure_of(name)
    vanished = tiny.empty_plan(structure, which[9:-1]).kept if which != "uneven" else {}
    plan = Plan({**tiny.uneven_plan(structure).kept, **vanished})
    before, small = slice_network(network.module, structure, plan), compensated(network, structure, plan)
    for group in structure.groups:
        x, target = rows(name, small, group, plan, network)
        expected = ridge_solution(x, target, as_matrix(before, group, plan), RIDGE)
        given = as_matrix(small, group, plan)
        assert np.abs(given - expected).max() <= 1e-4 * max(1.0, np.abs(expected).max())


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_the_bias_of_a_vanished_group_is_the_mean_target(name: str) -> None:
    network, structure = tiny.network(name), structure_of(name)
    plan = tiny.empty_plan(structure)
    small = compensated(network, structure, plan)
    for group in structure.groups:
        _, target = rows(name, small, group, plan, network)
        np.testing.assert_allclose(as_matrix(small, group, plan)[0], target.mean(0), atol=1e-5)


@pytest.mark.parametrize("vanished", [False, True])
def test_without_a_known_stream_the_dense_output_is_the_target(vanished: bool) -> None:
    network = tiny.vit(block_fn=ResPostBlock)
    structure = describe(network.module, network.inputs).without_widths()
    group = structure.groups[-1]
    assert group.stream.residual is None
    plan = Plan({"blocks.0.attn": (1, 2), group.name: () if vanished else (0, 3, 4, 5)})
    before, small = slice_network(network.module, structure, plan), compensated(network, structure, plan)
    xs, targets = [], []
    for batch in tiny.batches(network, BATCHES):
        with torch.no_grad(), record_outputs(network.module, (group.output,)) as dense:
            network.forward(batch)
        targets.append(dense[group.output].flatten(0, 1))
        if not vanished:
            with torch.no_grad(), record_inputs(small, (group.output,)) as pruned:
                network.forward(batch, small)
            xs.append(pruned[group.output].flatten(0, 1))
    target = torch.cat(targets).double().numpy()
    x = torch.cat(xs).double().numpy() if xs else np.zeros((len(target), 0))
    expected = ridge_solution(x, target, as_matrix(before, group, plan), RIDGE)
    np.testing.assert_allclose(as_matrix(small, group, plan), expected, atol=1e-5)


@torch.no_grad()
def error(network: Network, structure: Structure, small: nn.Module) -> float:
    """Squared distance of the last block's valid tokens from the dense ones."""
    total, last = 0.0, structure.blocks[-1]
    for batch in tiny.batches(network, BATCHES):
        with record_outputs(network.module, (last,)) as dense, record_outputs(small, (last,)) as pruned:
            network.forward(batch)
            network.forward(batch, small)
        moved = first_tensor(pruned[last]) - first_tensor(dense[last])
        valid = network.valid_tokens(batch)
        total += float(moved.square().sum() if valid is None else moved[valid].square().sum())
    return total


@pytest.mark.parametrize("name", tiny.ALL_NAMES)
def test_the_network_comes_closer_to_the_dense_one(name: str) -> None:
    network, structure = tiny.network(name), structure_of(name)
    plan = tiny.uneven_plan(structure)
    masked = error(network, structure, slice_network(network.module, structure, plan))
    assert error(network, structure, compensated(network, structure, plan)) < 0.7 * masked


@settings(max_examples=10)
@given(data=st.data())
def test_any_plan_can_be_compensated(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(tiny.ALL_NAMES))
    network, structure = tiny.network(name), structure_of(name)
    small = compensated(network, structure, data.draw(tiny.plans(structure)))
    assert all(p.isfinite().all() for p in small.parameters())
    network.forward(network.inputs, small)


@pytest.mark.parametrize("name", ["vit", "bert"])
def test_with_nothing_pruned_nothing_changes(name: str) -> None:
    network, structure = tiny.network(name), structure_of(name)
    for plan in (Plan({}), Plan({g.name: tuple(range(g.units)) for g in structure.groups})):
        given = compensated(network, structure, plan).state_dict()
        assert all(torch.equal(given[k], v) for k, v in network.module.state_dict().items())


def test_all_behind_the_first_pruned_units_changes_and_nothing_before() -> None:
    network, structure = tiny.network("bert_classifier"), structure_of("bert_classifier")
    group = structure.groups[1]
    assert (group.kind, group.layer) == ("neuron", 0)
    plan = Plan({group.name: tuple(range(5))})
    dense = {k: v.clone() for k, v in network.module.state_dict().items()}
    before = slice_network(network.module, structure, plan).state_dict()
    after = compensated(network, structure, plan).state_dict()
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    linear = [n for n, m in network.module.named_modules() if isinstance(m, nn.Linear)]
    behind = linear[linear.index(group.output) :]
    assert len(behind) == 1 + 6 + 2
    assert changed == {f"{name}.{kind}" for name in behind for kind in ("weight", "bias")}
    assert all(torch.equal(v, dense[k]) for k, v in network.module.state_dict().items())


@pytest.mark.parametrize("where", ["blocks.0.mlp", "blocks.0.attn"])
def test_a_duplicate_can_leave_without_a_trace(where: str) -> None:
    network = tiny.vit(init_values=0.5)
    structure = describe(network.module, network.inputs).without_widths()
    group = structure.group(where)
    up = next(s for s in group.sides if s.axis == "out")
    linear = network.module.get_submodule(up.module)
    for parameter in linear.parameters():
        units = parameter.data.unflatten(0, (-1, group.units, group.width))
        units[:, 2] = units[:, 0]
    plan = Plan({where: tuple(u for u in range(group.units) if u != 2)})
    small = compensated(network, structure, plan, ridge=1e-5)
    batch = tiny.images("x", 4, seed=99)
    with torch.no_grad():
        expected, given = network.module(**batch), small(**batch)
        without_repair = slice_network(network.module, structure, plan)(**batch)
    assert float((given - expected).abs().max()) <= 1e-3
    assert float((without_repair - expected).abs().max()) > 0.1


def test_a_large_ridge_keeps_the_weights() -> None:
    network, structure = tiny.network("vit"), structure_of("vit")
    plan = Plan({"blocks.0.mlp": (0, 1, 2)})
    weight = "blocks.0.mlp.fc2.weight"
    before = slice_network(network.module, structure, plan).get_parameter(weight)
    after = compensated(network, structure, plan, ridge=1e6).get_parameter(weight)
    torch.testing.assert_close(after, before, rtol=0, atol=1e-4)


def test_content_of_padding_does_not_matter() -> None:
    network, structure = tiny.network("bert"), structure_of("bert")
    plan, results = tiny.uneven_plan(structure), []
    for padding in (1, 7):
        batches = copy.deepcopy(tiny.batches(network, 3))
        for batch in batches:
            batch["input_ids"][batch["attention_mask"] == 0] = padding
        small = slice_network(network.module, structure, plan)
        compensate(CompensationPair(network, small, structure, plan), batches, (RIDGE,))
        results.append(small.state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-4, atol=1e-4)


def test_progress_is_one_step_a_block_and_no_hooks_stay() -> None:
    network, structure = tiny.network("vit"), structure_of("vit")
    plan = tiny.uneven_plan(structure)
    small = slice_network(network.module, structure, plan)
    compensate(CompensationPair(network, small, structure, plan), tiny.batches(network, 1), (RIDGE,))
    for module in (network.module, small):
        assert not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in module.modules())


def test_layer_scale_does_not_matter_where_the_stream_is_unknown() -> None:
    network, known = tiny.network("vit_layer_scale"), structure_of("vit_layer_scale")
    plan, results = tiny.uneven_plan(known), []
    for change in ({"residual": None}, {"residual": None, "scale": None}):
        structure = replace(known, groups=tuple(replace(g, stream=replace(g.stream, **change)) for g in known.groups))
        results.append(compensated(network, structure, plan).state_dict())
    for key, value in results[0].items():
        torch.testing.assert_close(results[1][key], value, rtol=1e-4, atol=1e-5)


def test_a_structure_may_hide_its_stream() -> None:
    network, known = tiny.network("vit"), structure_of("vit")
    unknown = replace(known, groups=tuple(replace(g, stream=Stream()) for g in known.groups))
    plan = Plan({"blocks.0.attn": (0, 1)})
    with_stream, without = (compensated(network, s, plan).get_submodule("blocks.0.attn.proj") for s in (known, unknown))
    # Nothing before the first sublayer is pruned, so both targets are the dense output.
    torch.testing.assert_close(without.weight, with_stream.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(without.bias, with_stream.bias, rtol=1e-4, atol=1e-5)
