"""Networks wrapped in something: adapters, batch norms for layer norms, tied weights, modules of one's own."""

import copy
import re
from pathlib import Path

import onnx
import onnxruntime
import peft
import pytest
import tiny
import torch
from torch import Tensor, nn

from exporters import onnx_from_program, trace
from optin_deploy.errors import UserError
from optin_deploy.models import checkpoint
from optin_deploy.models.custom import custom_network
from optin_deploy.network import Network, TensorOutputs
from optin_deploy.nn.flops import count_flops
from optin_deploy.pruning.pruner import Pruned, prune
from optin_deploy.pruning.space import analyze
from optin_deploy.search.knapsack import BUDGET_WINDOW
from optin_deploy.structure.adapters import registry
from optin_deploy.structure.canonicalize import canonicalize
from optin_deploy.structure.describe import describe

pytestmark = pytest.mark.slow


DOCS = Path(__file__).parents[3] / "docs"


def adapted(kind: str = "model") -> nn.Module:
    """A vision transformer with LoRA of which nothing is zero."""
    config = peft.LoraConfig(r=2, target_modules=["qkv", "fc1"], init_lora_weights=False)
    module = tiny.vit().module
    if kind == "model":
        return peft.get_peft_model(module, config).eval()
    return peft.inject_adapter_in_model(config, module).eval()


@pytest.mark.parametrize("kind", ["model", "injected"])
def test_adapters_are_merged_and_the_module_is_left_as_it_was(kind: str) -> None:
    module = adapted(kind)
    images = tiny.images("x")
    with torch.no_grad():
        expected = module(**images)
        network = custom_network(module, images)
        torch.testing.assert_close(network.module(**images), expected, rtol=0, atol=1e-5)
        torch.testing.assert_close(module(**images), expected, rtol=0, atol=0)
    assert not any(type(m).__module__.startswith("peft.") for m in network.module.modules())
    assert any(type(m).__module__.startswith("peft.") for m in module.modules())
    names = [g.name for g in describe(network.module, images).groups]
    assert names == [g.name for g in tiny.structure("vit").groups]


def test_an_adapted_network_inside_another() -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.scale = adapted(), nn.Parameter(torch.tensor(2.0))

        def forward(self, x: Tensor) -> Tensor:
            return self.scale * self.net(x)

    module, images = Outer().eval(), tiny.images("x")
    with torch.no_grad():
        torch.testing.assert_close(canonicalize(module)(**images), module(**images), rtol=0, atol=1e-5)


def test_adapters_of_attention() -> None:
    class Attends(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attention(x, x, x, need_weights=False)[0]

    config = peft.LoraConfig(r=2, target_modules=["attention"], init_lora_weights=False)
    module = peft.get_peft_model(tiny.randomised(Attends()), config).eval()
    inputs = {"x": torch.randn(2, 5, 8)}
    with torch.no_grad():
        expected = module(**inputs)
        network = custom_network(module, inputs)
        torch.testing.assert_close(network.module(**inputs), expected, rtol=0, atol=1e-5)
    assert [g.kind for g in describe(network.module, inputs).groups] == ["head", "width"]


def test_prompts_cannot_be_merged() -> None:
    config = peft.PromptTuningConfig(
        task_type="SEQ_CLS", num_virtual_tokens=2, token_dim=16, num_layers=2, num_attention_heads=4
    )
    module = peft.get_peft_model(copy.deepcopy(tiny.network("bert_classifier").module), config)
    with pytest.raises(UserError, match="adds tokens and not weights"):
        canonicalize(module)


class Reparameterised(nn.Module):
    """A batch norm of features in place of a layer norm, with a part of its input."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.bn, self.alpha = nn.BatchNorm1d(features), nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return (self.bn(x) + self.alpha * x).transpose(1, 2)


def without_layer_norms() -> nn.Module:
    module = tiny.vit(class_token=False, global_pool="avg").module
    for block in module.blocks:
        block.norm1, block.norm2 = Reparameterised(tiny.WIDTH), Reparameterised(tiny.WIDTH)
    return tiny.randomised(module)


class Tied(nn.Module):
    """A language model whose head is its embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(tiny.VOCABULARY, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)
        self.layers = nn.ModuleList([layer, nn.TransformerEncoderLayer(16, 4, 24, batch_first=True)])
        self.head = nn.Linear(16, tiny.VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embedding(ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


def token_ids(batch: int = 3, seed: int = 0) -> dict[str, Tensor]:
    return {"ids": tiny.texts(batch, seed=seed)["input_ids"]}


def run(network: Network, batches: list, dense: nn.Module, path: Path) -> Pruned:
    """Prune, save, load and export; the budget and the outputs are checked on the way."""
    total = analyze(network).costs.total
    pruned = prune(network, batches, 0.6, align=1)
    small = pruned.network.module
    assert 0.6 - BUDGET_WINDOW <= count_flops(small, network.inputs) / total <= 0.6
    expected = pruned.network.forward(network.inputs)["output"].detach()

    checkpoint.save(pruned.network, pruned.plan, path / "checkpoint")
    again = checkpoint.load(path / "checkpoint", dense)
    torch.testing.assert_close(network.forward(network.inputs, again)["output"], expected, rtol=0, atol=0)

    axes = {n: {0: "batch"} for n in network.inputs}
    program = trace(TensorOutputs(small, pruned.network.outputs), network.inputs, axes)
    onnx_from_program(program, path / "m.onnx", output_names=["output"], dynamic_axes=axes)
    session = onnxruntime.InferenceSession(path / "m.onnx", providers=["CPUExecutionProvider"])
    for batch in batches[:2]:
        (given,) = session.run(None, {n: t.numpy() for n, t in batch.items()})
        torch.testing.assert_close(torch.from_numpy(given), pruned.network.forward(batch)["output"].detach())
    return pruned


def test_an_adapted_network_from_end_to_end(tmp_path: Path) -> None:
    network = custom_network(adapted(), tiny.images("x"), logits="output")
    run(network, [tiny.images("x", 4, s) for s in range(4)], adapted(), tmp_path)


def test_batch_norms_in_place_of_layer_norms_from_end_to_end(tmp_path: Path) -> None:
    network = custom_network(without_layer_norms(), tiny.images("x"), logits="output")
    structure = describe(network.module, network.inputs)
    assert [g.kind for g in structure.groups] == ["head", "width", "neuron"] * 2
    assert all(g.stream.residual is not None for g in structure.groups)
    run(network, [tiny.images("x", 4, s) for s in range(4)], without_layer_norms(), tmp_path)
    operators = [node.op_type for node in onnx.load(tmp_path / "m.onnx").graph.node]
    assert "BatchNormalization" not in operators


def test_a_tied_head_stays_tied_from_end_to_end(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Tied().eval()
    network = custom_network(module, token_ids(), logits="output")
    pruned = run(network, [token_ids(4, s) for s in range(4)], module, tmp_path)
    small = pruned.network.module
    assert small.head.weight is small.embedding.weight
    assert torch.equal(small.head.weight, module.head.weight)


def test_groups_whose_weights_are_tied_are_left_dense() -> None:
    class Ffn(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(4, 6), nn.Linear(6, 4)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.down(self.up(x).relu())

    module = nn.Sequential(Ffn(), Ffn(), Ffn())
    module[2].up.weight = module[0].up.weight
    structure = describe(tiny.randomised(module), {"input": torch.randn(2, 3, 4)})
    assert len(structure.groups) == 1 and structure.groups[0].output == "1.down"
    assert len(structure.left_dense) == 2
    assert all("are tied to those of" in left.reason for left in structure.left_dense)


def test_the_example_of_the_documentation_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = [*registry.ADAPTERS]
    monkeypatch.setattr(registry, "ADAPTERS", adapters)
    monkeypatch.setattr("optin_deploy.structure.describe.ADAPTERS", adapters)
    text = (DOCS / "how-to" / "custom-modules.md").read_text(encoding="utf-8")
    (example,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    exec(compile(example, "custom-modules.md", "exec"), {"__name__": "example"})
    found, kept = capsys.readouterr().out.splitlines()
    assert found == "['0.mixture', '1.mixture', '2.mixture']"
    assert kept.startswith("{'0.mixture': ")
