import json
import os
import re
from pathlib import Path

import huggingface_hub.constants
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny_models import VISION, WORDS, save_bert, vision_network

from optin_deploy.errors import UserError
from optin_deploy.models import checkpoint, hub
from optin_deploy.models.load import load_network
from optin_deploy.models.timm_models import full_name, prunable_names
from optin_deploy.structure.describe import describe
from optin_deploy.structure.plan import Plan


@pytest.fixture
def no_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither network nor cache."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "no-cache"))


def refusal(model: str | Path, **options: object) -> str:
    with pytest.raises(UserError) as caught:
        load_network(str(model), **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Names


@pytest.mark.parametrize(
    ("given", "name"),
    [
        ("deit_small", "deit_small_patch16_224"),
        ("deit_tiny", "deit_tiny_patch16_224"),
        ("vit_base", "vit_base_patch16_224"),
        ("vit_base.augreg_in1k", "vit_base_patch16_224.augreg_in1k"),
        ("swin_tiny", "swin_tiny_patch4_window7_224"),
        ("test_vit", "test_vit"),
        ("bert-base-uncased", None),
        ("", None),
    ],
)
def test_short_names(given: str, name: str | None) -> None:
    assert full_name(given) == name


def test_short_name_loads() -> None:
    network = load_network("deit_tiny", weights="random")
    assert network.source.name == "deit_tiny_patch16_224"
    assert network.inputs["x"].shape == (2, 3, 224, 224)
    assert network.logits == "logits"


@pytest.mark.parametrize(("name", "near"), [("deit_smal", "deit_small"), ("vit_bse", "vit_base")])
@pytest.mark.usefixtures("no_hub")
def test_unknown_model_gives_near_names(name: str, near: str) -> None:
    assert near in refusal(name)


@pytest.mark.usefixtures("no_hub")
def test_unknown_model_without_near_names() -> None:
    assert "optin-deploy models" in refusal("some-org/zzzzqqqq")
    assert "optin-deploy models" in refusal("not a / valid name !")


@pytest.mark.usefixtures("no_hub")
def test_pretrained_weights_out_of_reach() -> None:
    message = refusal("deit_small")
    for choice in ("pretrained weights of deit_small", "--weights random", "--weights FILE.safetensors", "--model"):
        assert choice in message


def test_hub_setting_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_reachable", lambda: False)
    with pytest.raises(ZeroDivisionError), hub.cached_if_unreachable("some/model"):
        assert huggingface_hub.constants.HF_HUB_OFFLINE
        raise ZeroDivisionError
    assert not huggingface_hub.constants.HF_HUB_OFFLINE


def test_the_hub_is_not_asked_about_local_directories(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_reachable", lambda: 1 / 0)
    with hub.cached_if_unreachable(str(tmp_path)):
        assert huggingface_hub.constants.HF_HUB_OFFLINE


# timm


def test_random_weights_follow_the_seed() -> None:
    state = torch.random.get_rng_state()
    first, same, other = (vision_network(seed).module.state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[n], same[n]) for n in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert torch.equal(torch.random.get_rng_state(), state)


def test_weights_file(tmp_path: Path) -> None:
    state = vision_network(seed=5).module.state_dict()
    save_file({n: t.half() for n, t in state.items()}, tmp_path / "w.safetensors")
    network = load_network(**{**VISION, "weights": str(tmp_path / "w.safetensors")})
    assert network.weights == str(tmp_path / "w.safetensors")
    for name, tensor in network.module.state_dict().items():
        assert tensor.dtype == torch.float32
        torch.testing.assert_close(tensor, state[name].half().float(), rtol=0, atol=0)


def test_wrong_weights_files(tmp_path: Path) -> None:
    state = vision_network().module.state_dict()
    short, damaged, pickle = tmp_path / "short.safetensors", tmp_path / "damaged.safetensors", tmp_path / "w.pth"
    save_file({"head.weight": state["head.weight"]}, short)
    damaged.write_bytes(b"no safetensors")
    torch.save(state, pickle)
    for path, reason in [
        (short, "does not fit the model"),
        (damaged, "cannot be read"),
        (tmp_path / "none.safetensors", "cannot be read"),
        (pickle, "pickles are never loaded"),
    ]:
        message = refusal("test_vit", image_size=32, weights=str(path))
        assert reason in message
        assert str(path) in message


@pytest.mark.usefixtures("no_hub")
def test_a_file_as_model(tmp_path: Path) -> None:
    (tmp_path / "mine.safetensors").touch()
    assert "--weights" in refusal(tmp_path / "mine.safetensors")


def test_weights_without_counts_of_batches_fit(tmp_path: Path) -> None:
    # Of torch before 0.4; its loader knows them.
    state = load_network("test_resnet", weights="random", image_size=32).module.state_dict()
    save_file({n: t for n, t in state.items() if "num_batches" not in n}, tmp_path / "w.safetensors")
    found = load_network("test_resnet", weights=str(tmp_path / "w.safetensors"), image_size=32).module.state_dict()
    assert found.keys() == state.keys()
    assert all(torch.equal(found[n], t) for n, t in state.items() if "num_batches" not in n)


def test_the_command_that_converts_pickles(tmp_path: Path) -> None:
    state = vision_network(seed=5).module.state_dict()
    torch.save({**state, "head.weight": state["head.weight"].T.contiguous().T}, tmp_path / "w.pth")
    code = refusal("test_vit", weights=str(tmp_path / "w.pth")).split('python -c "')[1].removesuffix('"')
    exec(code, {})
    network = load_network(**{**VISION, "weights": str(tmp_path / "w.safetensors")})
    torch.testing.assert_close(network.module.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("size", [0, -3, 225, 33, 8])
def test_wrong_image_size(size: int) -> None:
    assert f"image size {size}" in refusal("test_vit", weights="random", image_size=size)


def test_a_resnet_takes_any_image_size() -> None:
    dense, small = (load_network("test_resnet", weights="random", image_size=size) for size in (None, 32))
    assert small.inputs["x"].shape == (2, 3, 32, 32)
    assert small.preprocessing.size == (32, 32)
    assert all(torch.equal(a, b) for a, b in zip(dense.module.parameters(), small.module.parameters(), strict=True))


def test_names_listed_as_prunable() -> None:
    names = {"resnet18", "resnet50", "seresnet18", "resnext50_32x4d", "vgg16", "regnety_004", "deit_small_patch16_224"}
    assert names <= {*prunable_names()}
    structure = describe(timm.create_model("resnet10t").eval(), {"x": torch.randn(1, 3, 64, 64)})
    assert [g.name for g in structure.groups if g.layer >= 0 and "layer" in g.name] == [
        f"layer{i}.0.conv1" for i in (1, 2, 3, 4)
    ]


def test_image_size_for_models_that_take_none(tmp_path: Path) -> None:
    assert "img_size" in refusal("test_convnext", weights="random", image_size=64)
    save_bert(tmp_path)
    assert "--image-size 64" in refusal(tmp_path, image_size=64)


# transformers


def test_directory_with_head(tmp_path: Path) -> None:
    written = save_bert(tmp_path)
    network = load_network(str(tmp_path), sequence_length=16)
    assert list(network.inputs) == ["input_ids", "attention_mask"]
    assert network.inputs["input_ids"].shape == (2, 16)
    assert (network.logits, network.token_mask) == ("logits", "attention_mask")
    assert network.sequence_inputs == ("input_ids", "attention_mask")
    with torch.inference_mode():
        torch.testing.assert_close(
            network.forward(network.inputs)["logits"], written(**network.inputs).logits, rtol=0, atol=0
        )


def test_plain_encoder_loses_its_pooler(tmp_path: Path) -> None:
    save_bert(tmp_path, head=False)
    network = load_network(str(tmp_path))
    assert list(network.outputs) == ["last_hidden_state"]
    assert network.logits is None
    assert not [name for name, _ in network.module.named_parameters() if "pooler" in name]


def test_sequences_are_at_most_as_long_as_the_positions(tmp_path: Path) -> None:
    save_bert(tmp_path)
    network = load_network(str(tmp_path), sequence_length=500)
    assert network.inputs["input_ids"].shape[1] == 24
    assert network.preprocessing([" ".join(WORDS)])["input_ids"].shape == (1, 24)


def test_half_precision_directory_loads_in_fp32(tmp_path: Path) -> None:
    written = save_bert(tmp_path, dtype=torch.float16)
    network = load_network(str(tmp_path))
    state = written.state_dict()
    for name, tensor in network.module.state_dict().items():
        if tensor.is_floating_point():
            assert tensor.dtype == torch.float32
            assert torch.equal(tensor, state[name].float())


def test_random_weights_of_a_directory(tmp_path: Path) -> None:
    save_bert(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    first, same, other = (load_network(str(tmp_path), weights="random", seed=s).module.state_dict() for s in (0, 0, 1))
    assert all(torch.equal(first[n], same[n]) for n in first)
    assert not torch.equal(first["classifier.weight"], other["classifier.weight"])


@pytest.mark.parametrize("head", [True, False])
def test_weights_file_for_a_directory(tmp_path: Path, head: bool) -> None:
    save_bert(tmp_path, head=head)
    expected = load_network(str(tmp_path))
    (tmp_path / "model.safetensors").rename(tmp_path / "other.safetensors")
    network = load_network(str(tmp_path), weights=str(tmp_path / "other.safetensors"))
    for name, tensor in network.module.state_dict().items():
        assert torch.equal(tensor, expected.module.state_dict()[name])


def test_directory_without_tokenizer(tmp_path: Path) -> None:
    save_bert(tmp_path, tokenizer=False)
    assert "tokenizer" in refusal(tmp_path)


def test_directory_without_weights(tmp_path: Path) -> None:
    save_bert(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    assert f"weights of {tmp_path}" in refusal(tmp_path)


def test_missing_weights_are_never_made_up(tmp_path: Path) -> None:
    save_bert(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    del state["classifier.weight"], state["classifier.bias"]
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert re.search(r"classifier\.bias and 1 more", refusal(tmp_path))


def test_weights_of_other_shapes(tmp_path: Path) -> None:
    save_bert(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    state["classifier.weight"] = torch.zeros(7, 32)
    save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert str(tmp_path) in refusal(tmp_path)


def test_damaged_weights(tmp_path: Path) -> None:
    save_bert(tmp_path)
    os.truncate(tmp_path / "model.safetensors", 1000)
    assert str(tmp_path) in refusal(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        "not json",
        "[]",
        '{"model_type": "no-such-type"}',
        "{}",
        {"hidden_size": "wide"},
        {"num_attention_heads": 5},
        {"architectures": ["NoSuchModel"], "model_type": "t5"},
    ],
)
def test_corrupted_config(tmp_path: Path, change: str | dict[str, object]) -> None:
    save_bert(tmp_path)
    file = tmp_path / "config.json"
    text = change if isinstance(change, str) else json.dumps(json.loads(file.read_text()) | change)
    file.write_text(text)
    message = refusal(tmp_path)
    assert str(tmp_path) in message
    assert "did you mean" not in message


def test_directory_that_is_no_model(tmp_path: Path) -> None:
    assert "without config.json" in refusal(tmp_path)


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    save_bert(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text()) | {"model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}}
    file.write_text(json.dumps(config))
    (tmp_path / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass OwnConfig: pass\n")
    assert str(tmp_path) in refusal(tmp_path)
    assert not (tmp_path / "ran").exists()


# Checkpoints of our own


def test_checkpoint_is_a_model(tmp_path: Path) -> None:
    network = vision_network()
    checkpoint.save(network, Plan({}), tmp_path / "own")
    loaded = load_network(str(tmp_path / "own"))
    with torch.inference_mode():
        assert torch.equal(loaded.forward(network.inputs)["logits"], network.forward(network.inputs)["logits"])
    assert "takes no --weights" in refusal(tmp_path / "own", weights="random")
    assert "no --image-size" in refusal(tmp_path / "own", image_size=32)
