import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_models import TinyModule, own_network, resnet_network, save_bert, save_tokenizer, texts, vision_network
from torch import Tensor, nn

from optin_deploy.errors import UserError
from optin_deploy.models import checkpoint
from optin_deploy.models.custom import custom_network
from optin_deploy.models.load import load_network
from optin_deploy.network import Network
from optin_deploy.structure.describe import describe
from optin_deploy.structure.plan import Plan
from optin_deploy.structure.slicing import slice_network

pytestmark = pytest.mark.slow


def bert(path: Path, head: bool = True) -> Network:
    save_bert(path / "bert", head=head)
    return load_network(str(path / "bert"), sequence_length=12)


MAKERS: dict[str, Callable[[Path], Network]] = {
    "timm": lambda _: vision_network(),
    "resnet": lambda _: resnet_network(),
    "own_resnet": lambda _: custom_network(tiny.randomised(tiny.PlainResNet()), tiny.images("x"), logits="output"),
    "classifier": bert,
    "encoder": lambda path: bert(path, head=False),
    "custom": lambda _: own_network(),
}


def some_plan(network: Network) -> Plan:
    """Uneven: the first group vanishes, the second keeps one unit, the others every second or all but the first; heads
    that stay keep every third dimension."""
    keep = [lambda n: (), lambda n: (n - 1,), lambda n: tuple(range(0, n, 2)), lambda n: tuple(range(1, n))]
    structure = describe(network.module, network.inputs)
    kept = {g.name: keep[i % 4](g.units) for i, g in enumerate(structure.without_widths().groups)}
    kept |= {g.name: tuple(range(0, g.units, 3)) for g in structure.groups if g.kind == "width"}
    return Plan(kept)


def pruned(network: Network, plan: Plan) -> Network:
    return network.with_module(slice_network(network.module, describe(network.module, network.inputs), plan))


def saved(path: Path, kind: str) -> tuple[Network, Path]:
    """A pruned network, and the checkpoint of it."""
    network = MAKERS[kind](path)
    plan = some_plan(network)
    small = pruned(network, plan)
    checkpoint.save(small, plan, path / "checkpoint")
    return small, path / "checkpoint"


def outputs(network: Network, module: nn.Module | None = None) -> list[Tensor]:
    with torch.inference_mode():
        return list(network.forward(network.inputs, module).values())


def unwrap_module(kind: str) -> nn.Module | None:
    return {"custom": lambda: own_network(seed=9).module, "own_resnet": tiny.PlainResNet}.get(kind, lambda: None)()


def refusal(path: Path, module: nn.Module | None = None) -> str:
    with pytest.raises(UserError) as caught:
        checkpoint.load(path, module)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("kind", MAKERS)
def test_round_trip_is_exact(tmp_path: Path, kind: str) -> None:
    small, path = saved(tmp_path, kind)
    loaded = checkpoint.load(path, unwrap_module(kind))
    assert not loaded.training
    for ours, theirs in zip(outputs(small), outputs(small, loaded), strict=True):
        assert torch.equal(ours, theirs)
    assert checkpoint.read_plan(path) == some_plan(MAKERS[kind](tmp_path / "again"))


@pytest.mark.parametrize("kind", MAKERS)
def test_network_of_a_checkpoint(tmp_path: Path, kind: str) -> None:
    small, path = saved(tmp_path, kind)
    loaded = checkpoint.load_network(path, unwrap_module(kind))
    for name in ("outputs", "sequence_inputs", "token_mask", "logits"):
        assert getattr(loaded, name) == getattr(small, name)
    assert {n: (t.shape, t.dtype) for n, t in loaded.inputs.items()} == {
        n: (t.shape, t.dtype) for n, t in small.inputs.items()
    }
    if kind in ("timm", "resnet"):
        assert loaded.preprocessing == small.preprocessing
        assert loaded.weights == "random"
    else:
        assert loaded.weights == f"checkpoint {path}"


@pytest.mark.parametrize("kind", ["timm", "classifier"])
def test_files(tmp_path: Path, kind: str) -> None:
    _, path = saved(tmp_path, kind)
    names = {p.name for p in path.iterdir()}
    assert {"optin.json", "model.safetensors"} <= names
    assert all(name.endswith((".json", ".safetensors", ".txt", ".jinja")) for name in names), "no pickles"
    assert all(p.stat().st_mode & 0o777 == 0o644 for p in (path / "optin.json", path / "model.safetensors"))
    assert path.stat().st_mode & 0o777 == 0o755


def test_tokenizer_travels(tmp_path: Path) -> None:
    small, path = saved(tmp_path, "classifier")
    (tmp_path / "bert" / "tokenizer.json").unlink()
    moved = path.rename(tmp_path / "moved")
    loaded = checkpoint.load_network(moved)
    for name, tensor in small.preprocessing(texts(5)).items():
        assert torch.equal(loaded.preprocessing(texts(5))[name], tensor)


def test_module_of_the_user_is_needed_and_not_changed(tmp_path: Path) -> None:
    _, path = saved(tmp_path, "custom")
    with pytest.raises(UserError, match="dense module"):
        checkpoint.load(path)
    module = TinyModule().eval()
    before = {n: t.clone() for n, t in module.state_dict().items()}
    checkpoint.load(path, module)
    assert all(torch.equal(t, before[n]) for n, t in module.state_dict().items())


def test_other_module_is_refused(tmp_path: Path) -> None:
    _, path = saved(tmp_path, "custom")
    refusal(path, nn.Linear(8, 3))


def test_pruning_twice_composes(tmp_path: Path) -> None:
    network = vision_network()
    first = some_plan(network)
    once = pruned(network, first)
    checkpoint.save(once, first, tmp_path / "once")
    loaded = load_network(str(tmp_path / "once"))
    second = some_plan(loaded)
    twice = pruned(loaded, second)
    both = second.after(checkpoint.read_plan(tmp_path / "once"))
    checkpoint.save(twice, both, tmp_path / "twice")
    again = checkpoint.load(tmp_path / "twice")
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in loaded.module.parameters())
    assert torch.equal(outputs(twice)[0], outputs(twice, again)[0])
    # Queries are rescaled in two steps, or in one.
    torch.testing.assert_close(outputs(twice)[0], outputs(twice, pruned(network, both).module)[0], rtol=0, atol=1e-6)


def test_any_input_type_can_be_saved(tmp_path: Path) -> None:
    class Masked(TinyModule):
        def forward(self, features: Tensor, mask: Tensor) -> Tensor:
            return super().forward(features.float() * mask[..., None])

    inputs = {"features": torch.randn(2, 5, 8, dtype=torch.float64), "mask": torch.ones(2, 5, dtype=torch.bool)}
    network = custom_network(Masked(), inputs)
    checkpoint.save(network, Plan({}), tmp_path / "c")
    loaded = checkpoint.load_network(tmp_path / "c", Masked())
    assert {n: t.dtype for n, t in loaded.inputs.items()} == {n: t.dtype for n, t in inputs.items()}


# Damage


def change(path: Path, **changes: object) -> None:
    file = path / "optin.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def test_damaged_description(tmp_path: Path) -> None:
    _, path = saved(tmp_path, "timm")
    good = (path / "optin.json").read_bytes()
    for content in (b"", b"[]", b"{}", good[: len(good) // 2], b"\xff\xfe\x00"):
        (path / "optin.json").write_bytes(content)
        refusal(path)


@pytest.mark.parametrize(
    "changes",
    [
        {"format": 2},
        {"extra": 1},
        {"source": {"library": "pickle", "name": "x", "arguments": {}}},
        {"source": {"library": "timm", "name": "no_such_model", "arguments": {}}},
        {"source": {"library": "timm", "name": "test_vit", "arguments": {"no_such": 33}}},
        {"source": {"library": "transformers", "name": "BertModel", "arguments": {"hidden_size": "wide"}}},
        {"inputs": {"y": {"shape": [2, 3, 32, 32], "dtype": "float32"}}},
        {"kept": {"no.such": [1]}},
        {"kept": {"blocks.0.attn": [7]}},
        {"kept": {"blocks.0.attn": [1, 0]}},
        {"kept": {}},
    ],
)
def test_wrong_description(tmp_path: Path, changes: dict[str, object]) -> None:
    _, path = saved(tmp_path, "timm")
    change(path, **changes)
    refusal(path)


def test_damaged_weights(tmp_path: Path) -> None:
    _, path = saved(tmp_path, "timm")
    # Copies: the file is mapped into memory, and is cut short below.
    state = {n: t.clone() for n, t in load_file(path / "model.safetensors").items()}
    file = path / "model.safetensors"
    os.truncate(file, 100)
    assert "damaged" in refusal(path)
    save_file({**state, "head.weight": torch.zeros(3, 3)}, file)
    assert "belongs to another network" in refusal(path)
    save_file({"head.weight": state["head.weight"]}, file)
    refusal(path)
    file.unlink()
    refusal(path)


def test_damaged_tokenizer(tmp_path: Path) -> None:
    _, path = saved(tmp_path, "classifier")
    (path / "tokenizer.json").write_text("no json")
    with pytest.raises(UserError, match="tokenizer") as caught:
        checkpoint.load_network(path)
    assert "\n" not in str(caught.value)


def test_foreign_directory(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    assert not checkpoint.is_checkpoint(tmp_path)
    assert "not a checkpoint of optin-deploy" in refusal(tmp_path)
    assert "not a checkpoint of optin-deploy" in refusal(tmp_path / "none")


def test_existing_path_is_not_overwritten(tmp_path: Path) -> None:
    small, path = saved(tmp_path, "timm")
    before = (path / "model.safetensors").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        checkpoint.save(small, Plan({}), path)
    assert (path / "model.safetensors").read_bytes() == before


def test_interrupted_save_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    network = vision_network()
    monkeypatch.setattr(Path, "write_text", fail)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.save(network, Plan({}), tmp_path / "checkpoint")
    assert not list(tmp_path.iterdir())


# Conventions of the Hugging Face hub


@pytest.mark.parametrize("cls", [transformers.AutoModel, transformers.BertForSequenceClassification])
@pytest.mark.parametrize("options", [{}, {"ignore_mismatched_sizes": True}])
def test_transformers_refuses_the_weights(tmp_path: Path, cls: Any, options: dict[str, bool]) -> None:
    _, path = saved(tmp_path, "classifier")
    with pytest.raises(ValueError, match=r"optin_deploy\.load"):
        cls.from_pretrained(path, **options)


def test_tokenizer_and_configuration_are_read_by_transformers(tmp_path: Path) -> None:
    small, path = saved(tmp_path, "classifier")
    tokenizer = transformers.AutoTokenizer.from_pretrained(path)
    encoded = tokenizer(texts(3), padding=True, return_tensors="pt")
    loaded = checkpoint.load(path)
    assert isinstance(loaded, transformers.PreTrainedModel)
    assert loaded.config.id2label == transformers.AutoConfig.from_pretrained(path).id2label
    with torch.no_grad():
        assert torch.equal(loaded(**encoded).logits, small.module(**encoded).logits)


def save_vit(path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ViTConfig(
        image_size=16, patch_size=8, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64
    )
    transformers.ViTForImageClassification(config).save_pretrained(path)
    size = {"height": 16, "width": 16}
    processor = {"image_processor_type": "ViTImageProcessor", "size": size, "image_mean": [0.4] * 3}
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    (path / "README.md").write_text("---\nlicense: mit\nbase_model: someone/other\n---\n# A card\n")


def test_image_processor_travels_twice(tmp_path: Path) -> None:
    save_vit(tmp_path / "vit")
    network = load_network(str(tmp_path / "vit"))
    assert (network.origin.license, network.origin.base_model) == ("mit", None)
    plan = some_plan(network)
    checkpoint.save(pruned(network, plan), plan, tmp_path / "once")
    checkpoint.save(checkpoint.load_network(tmp_path / "once"), plan, tmp_path / "twice")
    before = (tmp_path / "vit" / "preprocessor_config.json").read_bytes()
    for path in (tmp_path / "once", tmp_path / "twice"):
        assert (path / "preprocessor_config.json").read_bytes() == before
    assert list(transformers.AutoImageProcessor.from_pretrained(tmp_path / "twice").image_mean) == [0.4] * 3


def test_what_was_pruned_is_told_by_our_own_cards(tmp_path: Path) -> None:
    _, path = saved(tmp_path, "timm")
    (path / "README.md").write_text("---\nbase_model: timm/test_vit\nlicense: mit\ntags: [optin-deploy]\n---\n")
    origin = checkpoint.load_network(path).origin
    assert (origin.base_model, origin.license, origin.files) == ("timm/test_vit", "mit", {})
    (path / "README.md").write_text("---\n: [\n---\n")
    assert checkpoint.load_network(path).origin.license is None


def test_a_decoder_still_generates_as_it_did(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=44, n_positions=24, n_embd=32, n_layer=2, n_head=4, bos_token_id=2)
    module = transformers.GPT2LMHeadModel(config)
    module.generation_config.max_new_tokens = 5
    module.save_pretrained(tmp_path / "gpt")
    save_tokenizer(tmp_path / "gpt")
    network = load_network(str(tmp_path / "gpt"), sequence_length=12)
    plan = Plan({g.name: tuple(range(g.units // 2)) for g in describe(network.module, network.inputs).groups})
    small = pruned(network, plan)
    checkpoint.save(small, plan, tmp_path / "checkpoint")
    loaded = checkpoint.load(tmp_path / "checkpoint")
    assert loaded.generation_config.max_new_tokens == 5
    given = torch.tensor([[2, 5, 6]])
    ours, theirs = (m.generate(given, do_sample=False, pad_token_id=0) for m in (small.module, loaded))
    assert torch.equal(ours, theirs) and theirs.shape == (1, 8)


def test_without_what_is_for_others_it_loads_all_the_same(tmp_path: Path) -> None:
    small, path = saved(tmp_path, "classifier")
    (path / "config.json").unlink()
    for ours, theirs in zip(outputs(small), outputs(small, checkpoint.load(path)), strict=True):
        assert torch.equal(ours, theirs)
