"""``torch.nn.MultiheadAttention`` and the layers of ``torch.nn.Transformer``."""

from functools import cache
from pathlib import Path

import onnxruntime
import pytest
import tiny
import torch
import torchvision
from torch import Tensor, nn

from exporters import onnx_from_program, trace
from optin_deploy.models import checkpoint
from optin_deploy.models.custom import custom_network
from optin_deploy.network import Network, TensorOutputs
from optin_deploy.nn.flops import count_flops
from optin_deploy.pruning.pruner import prune
from optin_deploy.pruning.space import analyze
from optin_deploy.search.knapsack import BUDGET_WINDOW
from optin_deploy.structure.adapters.torch_attention import Attention, replace_torch_attention
from optin_deploy.structure.describe import describe
from optin_deploy.structure.masking import mask_units
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

pytestmark = pytest.mark.slow


WIDTH, HEADS, NEURONS = 16, 4, 24


class Classifier(nn.Module):
    """A ``TransformerEncoder`` with padding, and a classifier of the mean."""

    def __init__(self, batch_first: bool = True, norm_first: bool = False) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(
            WIDTH, HEADS, NEURONS, activation="gelu", batch_first=batch_first, norm_first=norm_first
        )
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.batch_first = batch_first
        self.head = nn.Linear(WIDTH, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        if self.batch_first:
            x = self.encoder(x, src_key_padding_mask=padding)
        else:
            x = self.encoder(x.transpose(0, 1), src_key_padding_mask=padding).transpose(0, 1)
        return self.head((x * ~padding[..., None]).mean(1))


class Translator(nn.Module):
    """A ``Transformer`` with a causal mask."""

    def __init__(self) -> None:
        super().__init__()
        self.transformer = nn.Transformer(WIDTH, HEADS, 1, 1, NEURONS, batch_first=True)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(y.shape[1])
        return self.transformer(x, y, tgt_mask=mask, tgt_is_causal=True)


def _tokens(batch: int = 3, seed: int = 0) -> dict[str, Tensor]:
    x = torch.randn(batch, 5, WIDTH, generator=torch.Generator().manual_seed(seed))
    padding = torch.arange(5) >= 5 - torch.arange(batch)[:, None] % 3
    return {"x": x, "padding": padding}


def _pairs(batch: int = 3, seed: int = 0) -> dict[str, Tensor]:
    x = torch.randn(batch, 9, WIDTH, generator=torch.Generator().manual_seed(seed))
    return {"x": x[:, :5].clone(), "y": x[:, 5:].clone()}


def _vit() -> nn.Module:
    return torchvision.models.VisionTransformer(16, 8, 2, HEADS, WIDTH, NEURONS, num_classes=3)


MODULES = {
    "encoder": (Classifier, _tokens),
    "pre-norm encoder": (lambda: Classifier(norm_first=True), _tokens),
    "sequence first": (lambda: Classifier(batch_first=False), _tokens),
    "transformer": (Translator, _pairs),
    "torchvision": (_vit, lambda batch=3, seed=0: tiny.images("x", batch, seed)),
}


@cache
def _dense(name: str) -> nn.Module:
    return tiny.randomised(MODULES[name][0]())


@cache
def _network(name: str) -> Network:
    return custom_network(_dense(name), MODULES[name][1]())


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("sizes", [{}, {"kdim": 6, "vdim": 5}, {"bias": False}])
def test_attention_through_modules_computes_the_same(sizes: dict, need_weights: bool, batch_first: bool) -> None:
    dense = tiny.randomised(nn.MultiheadAttention(8, 2, batch_first=batch_first, **sizes))
    ours = replace_torch_attention(dense)
    assert isinstance(ours, Attention)
    query, key, value = (torch.randn(3, n, d) for n, d in ((4, 8), (5, dense.kdim), (5, dense.vdim)))
    padding = torch.zeros(3, 5, dtype=torch.bool)
    padding[1, 3:] = True
    given = [x if batch_first else x.transpose(0, 1) for x in (query, key, value)]
    pairs = torch.rand(4, 5, generator=torch.Generator().manual_seed(0)) > 0.8
    # Some key stays for every query.
    pairs[:, 0] = False
    for mask in (None, pairs, torch.randn(4, 5), torch.randn(3 * 2, 4, 5)):
        for of_keys in (None, padding if mask is None or mask.dtype == torch.bool else torch.randn(3, 5)):
            for average in (True, False):
                arguments = {"need_weights": need_weights, "average_attn_weights": average}
                arguments |= {"attn_mask": mask, "key_padding_mask": of_keys}
                for a, b in zip(ours(*given, **arguments), dense(*given, **arguments), strict=True):
                    assert (a is None) == (b is None)
                    if a is not None:
                        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_one_sample_without_a_batch() -> None:
    dense = tiny.randomised(nn.MultiheadAttention(8, 2))
    x = torch.randn(4, 8)
    mask = torch.zeros(4, dtype=torch.bool)
    mask[3] = True
    for a, b in zip(replace_torch_attention(dense)(x, x, x, mask), dense(x, x, x, mask), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", MODULES)
def test_the_replacement_computes_the_same_and_leaves_the_module(name: str) -> None:
    dense, network = _dense(name), _network(name)
    assert not any(isinstance(m, Attention) for m in dense.modules())
    assert not any(isinstance(m, nn.MultiheadAttention) for m in network.module.modules())
    with torch.no_grad():
        for seed in range(2):
            batch = MODULES[name][1](4, seed)
            torch.testing.assert_close(network.module(**batch), dense(**batch), rtol=0, atol=1e-5)
    # No memory is taken for weights: the pointers are those of the dense module's storage.
    own = {t.untyped_storage().data_ptr() for t in dense.parameters()}
    assert {t.untyped_storage().data_ptr() for t in network.module.parameters()} <= own


def test_modules_without_such_attention_stay_themselves() -> None:
    module = nn.Sequential(nn.Linear(2, 2))
    assert replace_torch_attention(module) is module


@pytest.mark.parametrize("name", MODULES)
def test_sliced_is_masked(name: str) -> None:
    network = _network(name)
    structure = analyze(network).structure
    kinds = [g.kind for g in structure.groups]
    attentions = 3 if name == "transformer" else 2
    assert kinds.count("head") == kinds.count("width") == attentions and kinds.count("neuron") == 2
    assert structure.left_dense == ()
    for plan in (tiny.uneven_plan(structure.without_widths()), tiny.empty_plan(structure, "head")):
        small = slice_network(network.module, structure, plan)
        with torch.no_grad(), mask_units(network.module, structure, tiny.masks_of(structure, plan)):
            expected = network.forward(network.inputs)["output"]
        torch.testing.assert_close(network.forward(network.inputs, small)["output"], expected, rtol=0, atol=1e-5)
        assert analyze(network).costs.of(plan) == pytest.approx(count_flops(small, network.inputs))


def test_masks_of_single_heads_go_with_the_heads() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 4, batch_first=True)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return x + self.attention(x, x, x, attn_mask=mask.flatten(0, 1), need_weights=False)[0]

    inputs = {"x": torch.randn(2, 5, 8), "mask": torch.randn(2, 4, 5, 5)}
    network = custom_network(tiny.randomised(Masked()), inputs)
    structure = describe(network.module, inputs)
    plan = Plan({"attention": (1, 3)})
    with torch.no_grad(), mask_units(network.module, structure, tiny.masks_of(structure, plan)):
        expected = network.module(**inputs)
    torch.testing.assert_close(slice_network(network.module, structure, plan)(**inputs), expected, rtol=0, atol=1e-5)


def test_layers_of_ones_own_with_sequences_first_are_left_dense() -> None:
    class SequencesFirst(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2)
            self.ffn = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))

        def forward(self, x: Tensor) -> Tensor:
            x = x.transpose(0, 1)
            x = x + self.attention(x, x, x)[0]
            return (x + self.ffn(x)).transpose(0, 1)

    # As many tokens as samples, so that sizes do not tell.
    network = custom_network(tiny.randomised(SequencesFirst()), {"x": torch.randn(4, 4, 8)})
    structure = describe(network.module, network.inputs)
    assert structure.groups == ()
    assert [left.module for left in structure.left_dense] == ["attention", "ffn"]
    assert all("batch_first=True" in left.reason for left in structure.left_dense)


def test_keys_of_its_own_leave_it_dense() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, add_bias_kv=True, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x, x, x)[0]

    network = custom_network(tiny.randomised(Own()), {"x": torch.randn(2, 5, 8)})
    (left,) = describe(network.module, network.inputs).left_dense
    assert "bias_k" in left.reason


@pytest.mark.parametrize("name", ["sequence first", "transformer"])
def test_a_run_with_compensation_checkpoint_and_export(name: str, tmp_path: Path) -> None:
    network, make = _network(name), MODULES[name][1]
    costs = analyze(network).costs
    pruned = prune(network, [make(4, seed) for seed in range(4)], 0.6, align=1)
    small = pruned.network.module
    assert 0.6 - BUDGET_WINDOW <= count_flops(small, network.inputs) / costs.total <= 0.6
    expected = pruned.network.forward(network.inputs)["output"]
    assert bool(expected.isfinite().all())

    checkpoint.save(pruned.network, pruned.plan, tmp_path / "checkpoint")
    again = checkpoint.load(tmp_path / "checkpoint", _dense(name))
    assert torch.equal(network.forward(network.inputs, again)["output"], expected)

    axes = {n: {0: "batch"} for n in network.inputs}
    program = trace(TensorOutputs(small, pruned.network.outputs), network.inputs, axes)
    onnx_from_program(program, tmp_path / "m.onnx", output_names=["output"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch in (make(1), make(5, 7)):
        (given,) = session.run(None, {n: t.numpy() for n, t in batch.items()})
        wanted = pruned.network.forward(batch)["output"].detach()
        torch.testing.assert_close(torch.from_numpy(given), wanted, rtol=0, atol=1e-4)
