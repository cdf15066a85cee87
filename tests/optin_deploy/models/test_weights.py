"""Files of weights as training scripts write them: which tensors are the network's, and what is said of the rest."""

import logging
import re
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_bert
from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, ViTConfig, ViTForImageClassification

from optin_deploy.config.recipe import make_recipe
from optin_deploy.errors import UserError
from optin_deploy.models.load import load_network
from optin_deploy.models.weight_files import WeightsFile, parse_weights
from optin_deploy.network import Network

pytestmark = pytest.mark.slow


State = dict[str, Tensor]


def trained(name: str = "test_vit", **arguments: int) -> State:
    torch.manual_seed(3)
    module = timm.create_model(name, **arguments)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return dict(module.state_dict())


PLAIN = trained(num_classes=7)
AVERAGE = {name: tensor + 1 for name, tensor in PLAIN.items()}


def under(prefix: str, state: Mapping[str, Tensor] = PLAIN) -> State:
    return {prefix + name: tensor.clone() for name, tensor in state.items()}


def loaded(state: State, folder: Path, part: str = "", model: str = "test_vit") -> Network:
    save_file(state, folder / "w.safetensors")
    return load_network(model, weights=f"{folder / 'w.safetensors'}{part}")


def refusal(state: State, folder: Path, part: str = "", model: str = "test_vit") -> str:
    with pytest.raises(UserError) as caught:
        loaded(state, folder, part, model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def same(network: Network, state: Mapping[str, Tensor]) -> bool:
    own = network.module.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[name], state[name]) for name in own)


# Prefixes


PREFIXES = (
    *("module.", "_orig_mod.", "model.", "backbone.", "net.", "encoder.", "student.", "ema_model.", "state_dict_ema."),
    *("module._orig_mod.model.", "model._orig_mod.", "state_dict.model.module.", "_fsdp_wrapped_module.model."),
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_the_one_prefix_is_left_out_and_told(prefix: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    network = loaded(under(prefix), tmp_path)
    assert same(network, PLAIN)
    assert network.source.arguments == {"num_classes": 7}
    assert f"prefix {prefix}" in caplog.text


def test_wrappers_within_the_network(tmp_path: Path) -> None:
    inner = {
        name.replace("blocks.", "blocks._orig_mod.").replace("mlp.", "mlp._checkpoint_wrapped_module."): t.clone()
        for name, t in PLAIN.items()
    }
    assert same(loaded(under("model.", inner), tmp_path), PLAIN)


def test_what_training_leaves_beside_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    beside = {
        "n_averaged": torch.tensor(4),
        "epoch": torch.tensor(2.0),
        "criterion.weight": torch.ones(7),
        "optimizer.state.0.exp_avg": torch.ones(3),
        "val_acc.confmat": torch.ones(7, 7),
    }
    for prefix in ("", "module."):
        assert same(loaded({**under(prefix), **beside}, tmp_path), PLAIN)
        assert "(4 more)" in caplog.text
        caplog.clear()


@pytest.mark.parametrize(
    ("extra", "tensor"),
    [
        ("n_averaged", torch.tensor(4)),
        ("total_ops", torch.tensor(0.0)),
        ("blocks.0.total_params", torch.zeros(1)),
        ("blocks.0.norm1.num_batches_tracked", torch.tensor(9)),
    ],
)
def test_counts_are_ignored(extra: str, tensor: Tensor, tmp_path: Path) -> None:
    assert same(loaded({**PLAIN, extra: tensor}, tmp_path), PLAIN)


def test_tables_of_the_configuration(tmp_path: Path) -> None:
    swin = "swin_tiny_patch4_window7_224"
    dense = timm.create_model(swin, num_classes=2)
    index = "layers.0.blocks.0.attn.relative_position_index"
    table = dict(dense.named_buffers())[index]
    state = {**dense.state_dict(), index: table.clone()}
    assert same(loaded(state, tmp_path, model=swin), dense.state_dict())
    assert "other values than the model" in refusal({**state, index: table.flip(0).clone()}, tmp_path, model=swin)


# Averages beside the weights


def both(plain: str, average: str) -> State:
    return {**under(plain), **under(average, AVERAGE)}


@pytest.mark.parametrize(
    ("plain", "average", "choices"),
    [
        ("model.", "model_ema.", "#model or .*#model_ema"),
        ("", "ema.", "#plain or .*#ema"),
        ("state_dict.", "state_dict_ema.", "#state_dict or .*#state_dict_ema"),
        ("model.", "ema_model.module.", "#model or .*#ema_model.module"),
        ("student.backbone.", "teacher.backbone.", "#student.backbone or .*#teacher.backbone"),
    ],
)
def test_of_two_copies_one_is_chosen_by_name(plain: str, average: str, choices: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=choices):
        loaded(both(plain, average), tmp_path)
    pieces = (plain or "plain").split(".")[0], average.split(".")[0]
    for piece, expected in zip(pieces, (PLAIN, AVERAGE), strict=True):
        network = loaded(both(plain, average), tmp_path, f"#{piece}")
        assert same(network, expected)
        assert network.weights.endswith(f"#{piece}")
        assert network.source.arguments == {"num_classes": 7}


def test_a_piece_of_the_name_is_enough(tmp_path: Path) -> None:
    assert same(loaded(both("model.", "model_ema."), tmp_path, "#EMA"), AVERAGE)
    told = refusal(both("model.", "model_ema."), tmp_path, "#student")
    assert "#student does not name one part" in told
    assert "#model_ema" in told
    assert "does not name one part" in refusal(both("a.model.", "b.model."), tmp_path, "#model")


def test_one_network_under_two_names_is_no_choice(tmp_path: Path) -> None:
    assert same(loaded({**under("model.encoder."), **under("encoder.")}, tmp_path), PLAIN)


def test_an_average_of_parameters_alone_is_never_filled_up(tmp_path: Path) -> None:
    resnet = trained("test_resnet", num_classes=3)
    average = {name: t for name, t in resnet.items() if "running" not in name and "num_batches" not in name}
    state = {**under("", resnet), **under("ema.", average)}
    assert same(loaded(state, tmp_path, "#plain", "test_resnet"), resnet)
    assert "it has no " in refusal(state, tmp_path, "#ema", "test_resnet")
    assert "#plain or" in refusal(state, tmp_path, "", "test_resnet")


def test_a_file_with_a_number_sign_in_its_name(tmp_path: Path) -> None:
    save_file(PLAIN, tmp_path / "w#1.safetensors")
    assert same(load_network("test_vit", weights=str(tmp_path / "w#1.safetensors")), PLAIN)
    assert parse_weights("a.safetensors#ema") == WeightsFile(Path("a.safetensors"), "ema")
    assert str(parse_weights("a.safetensors#ema")) == "a.safetensors#ema"


def test_a_recipe_takes_a_part(tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text("model: test_vit\nweights: w.safetensors#ema\nflops: 0.5\n")
    assert make_recipe({}, tmp_path / "r.yaml").weights == "w.safetensors#ema"


# What does not fit


def without(name: str) -> State:
    return {n: t for n, t in PLAIN.items() if name not in n}


REFUSED: dict[str, tuple[Callable[[], State], str]] = {
    "layer": (lambda: under("model.", without("blocks.3.")), r"no blocks\.3\..*11 more"),
    "deeper": (
        lambda: {
            **under("model."),
            **{n.replace("blocks.0", "model.blocks.9"): t for n, t in PLAIN.items() if "ks.0" in n},
        },
        r"no model\.blocks\.9\..*11 more",
    ),
    "registers": (lambda: {**PLAIN, "reg_token": torch.ones(1, 4, 64)}, "no reg_token"),
    "other head": (
        lambda: {**under("backbone.", without("head.")), "head.fc.weight": torch.ones(3, 64)},
        r"holds head\.fc\.weight .* the network's backbone\.: give --weights .*#backbone",
    ),
    "gptq": (
        lambda: {**without("blocks.0.mlp.fc1.weight"), "blocks.0.mlp.fc1.qweight": torch.ones(2, dtype=torch.int32)},
        r"fc1\.qweight.*quantized",
    ),
    "fp8": (lambda: {n: t.to(torch.float8_e4m3fn) for n, t in PLAIN.items()}, "holds float8_e4m3fn.*not quantized"),
    "lora": (lambda: {**PLAIN, "blocks.0.attn.qkv.lora_A.weight": torch.ones(2)}, "adapters"),
    "weight norm": (
        lambda: {**without("head.weight"), "head.weight_g": torch.ones(7, 1), "head.weight_v": torch.ones(7, 64)},
        "head.weight_g, of parametrized weights",
    ),
    "pruned": (
        lambda: {
            **without("head.weight"),
            "head.weight_orig": torch.ones(7, 64),
            "head.weight_mask": torch.ones(7, 64),
        },
        "head.weight_mask, of parametrized weights",
    ),
    "nameless average": (lambda: {"shadow_params.0": torch.ones(2)}, "moving average"),
    "nothing": (lambda: {"a": torch.ones(2)}, "no cls_token"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_half_fits_is_refused(name: str, tmp_path: Path) -> None:
    make, told = REFUSED[name]
    with pytest.raises(UserError, match=told):
        loaded(make(), tmp_path)


def test_a_part_named_leaves_the_rest_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    state = {**under("backbone.", without("head.")), "head.fc.weight": torch.ones(3, 64)}
    network = loaded(state, tmp_path, "#backbone")
    assert same(network, without("head."))
    assert network.logits is None
    assert re.search(r"not used.*head\.fc\.weight", caplog.text)


# Networks of transformers


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    save_bert(tmp_path / "bert")
    return tmp_path / "bert"


@pytest.mark.parametrize(
    "renamed",
    [
        lambda name: name,
        lambda name: f"model.{name}",
        lambda name: name.removeprefix("bert."),
        lambda name: f"module._orig_mod.{name.removeprefix('bert.')}",
    ],
)
def test_names_with_and_without_that_of_the_plain_network(renamed: Callable[[str], str], bert: Path) -> None:
    expected = load_network(str(bert)).module.state_dict()
    state = {renamed(name): t for name, t in load_file(bert / "model.safetensors").items()}
    assert same(loaded(state, bert.parent, model=str(bert)), expected)


def test_a_plain_network_of_one_with_a_head(bert: Path, tmp_path: Path) -> None:
    save_bert(tmp_path / "plain", head=False)
    state = load_file(bert / "model.safetensors")
    told = refusal(state, tmp_path, model=str(tmp_path / "plain"))
    assert "holds classifier.bias (1 more) next to the network's bert.: give --weights" in told
    network = loaded(state, tmp_path, "#bert", str(tmp_path / "plain"))
    assert all(torch.equal(t, state[f"bert.{name}"]) for name, t in network.module.state_dict().items())
    assert "it has no classifier.weight" in refusal(
        load_file(tmp_path / "plain" / "model.safetensors"), tmp_path, model=str(bert)
    )


def test_a_file_without_the_pooler_that_is_dropped(tmp_path: Path) -> None:
    save_bert(tmp_path / "plain", head=False)
    state = load_file(tmp_path / "plain" / "model.safetensors")
    bare = {name: t for name, t in state.items() if "pooler" not in name}
    assert same(loaded(bare, tmp_path, model=str(tmp_path / "plain")), bare)


def test_another_number_of_classes_is_told(bert: Path, tmp_path: Path) -> None:
    state = load_file(bert / "model.safetensors")
    state |= {"classifier.weight": torch.ones(7, 32), "classifier.bias": torch.ones(7)}
    told = refusal(state, tmp_path, model=str(bert))
    assert re.search(r"classifier\.weight .*\(7, 32\).*\(3, 32\).* 7 classes.*num_classes", told)


def test_positions_are_made_anew(bert: Path, tmp_path: Path) -> None:
    state = load_file(bert / "model.safetensors")
    name, own = "bert.embeddings.position_ids", load_network(str(bert)).module.state_dict()
    assert same(loaded({**state, name: torch.arange(24)[None]}, tmp_path, model=str(bert)), own)
    flipped = torch.arange(24).flip(0)[None].clone()
    assert "other values" in refusal({**state, name: flipped}, tmp_path, model=str(bert))


def test_files_by_earlier_names(tmp_path: Path) -> None:
    sizes = {"image_size": 16, "patch_size": 8, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    torch.manual_seed(0)
    vit = ViTForImageClassification(ViTConfig(**sizes, intermediate_size=64, num_labels=3))
    clip = CLIPVisionModel(CLIPVisionConfig(**sizes, intermediate_size=64))
    for name, module in (("vit", vit), ("clip", clip)):
        module.save_pretrained(tmp_path / name)
        own = {n: t.clone() for n, t in module.state_dict().items()}
        written = load_file(tmp_path / name / "model.safetensors")
        for state in (own, written, under("net.", own), under("net.", written)):
            assert same(loaded(state, tmp_path, model=str(tmp_path / name)), own)


# Several files


def test_an_index_of_several_files(tmp_path: Path) -> None:
    names, files = sorted(PLAIN), ("m-00001-of-00002.safetensors", "m-00002-of-00002.safetensors")
    for file, part in zip(files, (names[:40], names[40:]), strict=True):
        save_file({name: PLAIN[name] for name in part}, tmp_path / file)
    index = tmp_path / "m.safetensors.index.json"
    where = ", ".join(f'"{name}": "{files[i >= 40]}"' for i, name in enumerate(names))
    index.write_text('{"weight_map": {' + where + "}}")
    network = load_network("test_vit", weights=str(index))
    assert same(network, PLAIN)
    with pytest.raises(UserError, match=r"several files.*m\.safetensors\.index\.json"):
        load_network("test_vit", weights=str(tmp_path / files[0]))
    (tmp_path / files[1]).unlink()
    with pytest.raises(
        UserError, match=r"index\.json names m-00002-of-00002\.safetensors, which does not exist \(1 of 2"
    ):
        load_network("test_vit", weights=str(index))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("w.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer of git-lfs"),
        ("w.pth", b"version https://git-lfs.github.com/spec/v1\noid sha256:1\n", "pointer of git-lfs"),
        ("w.safetensors", b"<!DOCTYPE html><html></html>", "web page"),
        ("w.safetensors", b"", "an empty file"),
        ("w.onnx", b"x", "an exported ONNX graph"),
        ("w.gguf", b"GGUF", "quantized weights for llama.cpp"),
        ("w.h5", b"x", "weights of TensorFlow"),
    ],
)
def test_files_of_other_kinds(name: str, content: bytes, told: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=told):
        load_network("test_vit", weights=str(tmp_path / name))
