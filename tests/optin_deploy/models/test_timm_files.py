import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf
from tiny_models import save_images
from torch import nn

import optin_deploy
from optin_deploy.data.calibration import load_calibration
from optin_deploy.data.labels import classes_of_folders
from optin_deploy.errors import UserError
from optin_deploy.evaluation.load import load_dataset
from optin_deploy.models import checkpoint
from optin_deploy.models.load import load_network
from optin_deploy.models.timm_files import arguments_from_weights, read_saved_network
from optin_deploy.models.weight_files import WeightsFile
from optin_deploy.network import Network
from optin_deploy.structure.plan import Plan

SIZE = 32


def trained(name: str = "test_vit", **arguments: Any) -> nn.Module:
    """A network as a user has it: other classes, pictures of another size, other means."""
    torch.manual_seed(3)
    module = timm.create_model(name, **arguments).eval()
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.1)
    module.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.4, 0.3), "crop_pct": 1.0}
    return module


def save(module: nn.Module, directory: Path, **arguments: Any) -> Path:
    save_for_hf(module, directory, model_args=arguments or None, safe_serialization=True)
    return directory


def changed(directory: Path, **told: Any) -> str:
    """What loading says once the configuration tells something else."""
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **told}))
    with pytest.raises(UserError) as caught:
        load_network(str(directory))
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Files of weights


@pytest.mark.parametrize("name", ["test_vit", "test_resnet", "deit_tiny_distilled_patch16_224"])
@pytest.mark.parametrize(("classes", "prefix"), [(0, ""), (7, ""), (7, "module.")])
def test_the_number_of_classes_is_that_of_the_file(name: str, classes: int, prefix: str, tmp_path: Path) -> None:
    module = trained(name, num_classes=classes)
    save_file({prefix + n: t for n, t in module.state_dict().items()}, tmp_path / "mine.safetensors")
    network = load_network(name, weights=str(tmp_path / "mine.safetensors"))
    assert network.source.arguments == {"num_classes": classes}
    assert network.logits == ("logits" if classes else None)
    given = torch.randn(2, *network.inputs["x"].shape[1:])
    with torch.inference_mode():
        assert torch.equal(next(iter(network.forward({"x": given}).values())), module(given))


def test_files_that_say_nothing_of_classes(tmp_path: Path) -> None:
    own, other, text = (tmp_path / f"{n}.safetensors" for n in ("own", "other", "text"))
    save_file(trained().state_dict(), own)
    save_file({"weight": torch.zeros(2)}, other)
    text.write_text("no tensors")
    for path in (own, other, text, tmp_path / "none.safetensors", tmp_path / "weights.pth"):
        assert arguments_from_weights("test_vit", WeightsFile(path)) == {}


@pytest.mark.parametrize("channels", [4, 6])
def test_the_number_of_channels_is_that_of_the_file(channels: int, tmp_path: Path) -> None:
    module = trained(in_chans=channels, num_classes=3)
    save_file({f"model.{n}": t for n, t in module.state_dict().items()}, tmp_path / "mine.safetensors")
    network = load_network("test_vit", weights=str(tmp_path / "mine.safetensors"))
    assert network.source.arguments == {"num_classes": 3, "in_chans": channels}
    check_channels(network, module, channels, tmp_path)


@pytest.mark.parametrize("told", [True, False])
def test_the_number_of_channels_of_a_directory(told: bool, tmp_path: Path) -> None:
    channels = 4
    module = trained(in_chans=channels)
    module.pretrained_cfg |= {"mean": (0.5,) * channels, "std": (0.5,) * channels}
    directory = save(module, tmp_path / "mine", **({"in_chans": channels} if told else {}))
    check_channels(load_network(str(directory)), module, channels, tmp_path)


def check_channels(network: Network, module: nn.Module, channels: int, folder: Path) -> None:
    """Sample inputs have as many, tensors calibrate it, pictures are refused with what to do."""
    given = network.inputs["x"]
    assert given.shape[1] == channels
    assert network.preprocessing is None
    with torch.inference_mode():
        assert torch.equal(network.forward({"x": given})["logits"], module(given))
    save_images(folder / "pictures", 2)
    shape = f"tensor 'x' of shape \\(samples, {channels}, {given.shape[2]}, {given.shape[3]}\\)"
    for path in (None, folder / "pictures"):
        with pytest.raises(UserError, match=f"{channels} channels.*{shape}.*--calibration FILE"):
            load_calibration(network, path)
    with pytest.raises(UserError, match=f"--evaluate .*{channels} channels"):
        load_dataset(network, folder / "pictures")
    save_file({"x": torch.randn(4, *given.shape[1:])}, folder / "samples.safetensors")
    assert load_calibration(network, folder / "samples.safetensors").batches[0]["x"].shape[1] == channels
    checkpoint.save(network, Plan({}), folder / "own")
    assert checkpoint.load_network(folder / "own").inputs["x"].shape == given.shape


# Directories


@pytest.mark.parametrize("told", [True, False])
def test_a_directory_of_timm(told: bool, tmp_path: Path) -> None:
    arguments = {"num_classes": 5, "img_size": SIZE}
    module = trained(**arguments)
    module.pretrained_cfg["input_size"] = (3, SIZE, SIZE)
    path = save(module, tmp_path, **arguments) / "config.json"
    config = json.loads(path.read_text())
    if not told:
        del config["model_args"]
    path.write_text(json.dumps(config))
    network = load_network(str(tmp_path))
    assert network.source.name == "test_vit"
    assert {**network.source.arguments, **arguments} == network.source.arguments
    picture = Image.new("RGB", (50, 40), (10, 200, 90))
    expected = timm.data.create_transform(**timm.data.resolve_data_config({}, model=module))(picture)
    batch = network.preprocessing([picture])
    assert torch.equal(batch["x"][0], expected)
    with torch.inference_mode():
        assert torch.equal(network.forward(batch)["logits"], module(batch["x"]))


@pytest.mark.usefixtures("without_layers")
@pytest.mark.slow
def test_what_is_pruned_of_a_directory_loads_without_it(tmp_path: Path) -> None:
    arguments = {"num_classes": 5, "img_size": SIZE}
    directory = save(trained(**arguments), tmp_path / "mine", **arguments)
    save_images(tmp_path / "pictures", 12)
    settings: dict[str, Any] = {"calibration": "pictures", "calibration_samples": 8, "runtimes": ("ort-cpu",)}
    quick: dict[str, Any] = {"batch_sizes": (1,), "profile_seconds": 0.1, "threads": 1, "criterion": "random"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path)
        optin_deploy.prune_export(optin_deploy.Recipe(model="mine", flops=0.6, **settings, **quick), output=Path("run"))
    (directory / "model.safetensors").unlink()
    again = load_network(str(tmp_path / "run" / "checkpoint"))
    assert again.preprocessing.mean == (0.1, 0.2, 0.3)
    assert again.forward(again.inputs)["logits"].shape == (2, 5)


def test_a_directory_of_a_network_for_pictures_of_any_size(tmp_path: Path) -> None:
    module = trained("test_resnet", num_classes=3)
    module.pretrained_cfg["input_size"] = (3, 96, 96)
    network = load_network(str(save(module, tmp_path)))
    assert network.inputs["x"].shape == (2, 3, 96, 96)


def test_directories_that_cannot_be_used(tmp_path: Path) -> None:
    arguments = {"num_classes": 5, "img_size": SIZE}
    directory = save(trained(**arguments), tmp_path, **arguments)
    mean = {"pretrained_cfg": {"mean": ["a", 1, 1]}}
    assert "pretrained_cfg.mean.0" in changed(directory, **mean)
    assert re.search(r"pretrained_cfg\.mean .* 2 ", changed(directory, pretrained_cfg={"mean": [1, 1]}))
    assert "pretrained_cfg.std.1" in changed(directory, pretrained_cfg={"std": [1, 0, 1]})
    assert "checkpoint_path" in changed(directory, pretrained_cfg={}, model_args={"checkpoint_path": "weights.pth"})
    assert "only square ones" in changed(directory, model_args={"img_size": [32, 48]})
    assert "does not fit the model" in changed(directory, model_args={"img_size": 48})
    assert re.search(r"model_args\.depth .*1000000000", changed(directory, model_args={"depth": 10**9}))
    assert "model_args.img_size" in changed(directory, model_args={"img_size": [10**6, 10**6]})
    assert "num_classes" in changed(directory, num_classes=-1)
    assert "no architecture 'no_vit'" in changed(directory, architecture="no_vit", num_classes=5)
    with pytest.raises(UserError, match="--image-size 64"):
        load_network(str(save(trained(), tmp_path / "other")), image_size=64)
    (tmp_path / "other" / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        load_network(str(tmp_path / "other"))


@pytest.mark.parametrize("text", ["", "[1]", '{"model_type": "vit", "architecture": "x"}', "[" * 9999])
def test_other_directories_are_not_timms(text: str, tmp_path: Path) -> None:
    assert read_saved_network(tmp_path) is None
    (tmp_path / "config.json").write_text(text)
    assert read_saved_network(tmp_path) is None


FLAT = {"architecture": "test_vit", "num_classes": 3, "mean": [0.1, 0.2, 0.3], "labels": ["emu", "dog", "cat"]}
PREPARING = ("mean", "std", "interpolation", "crop_pct", "crop_mode")


@pytest.mark.parametrize("written", ["whole", "empty", "partly", "flat"])
def test_pictures_of_a_directory_are_prepared_as_timm_does(written: str, tmp_path: Path) -> None:
    module = trained(num_classes=3)
    labels = {"label_names": ["emu", "dog", "cat"], "label_descriptions": {"dog": "man's best friend"}}
    timm.models.save_for_hf(module, tmp_path, safe_serialization=True, model_config=labels)
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    crop = {"crop_pct": 0.7, "crop_mode": "squash"}
    other = {"empty": {**config, "pretrained_cfg": {}}, "partly": {**config, "pretrained_cfg": crop}, "flat": FLAT}
    path.write_text(json.dumps(other.get(written, config)))
    own = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path}"))
    network = load_network(str(tmp_path))
    for name in PREPARING:
        assert getattr(network.preprocessing, name) == (tuple(own[name]) if name in ("mean", "std") else own[name])
    checkpoint.save(network, Plan({}), tmp_path / "checkpoint")
    for each in (network, load_network(str(tmp_path / "checkpoint"))):
        assert classes_of_folders(each, tmp_path, ["cat", "dog", "emu"]) == {"emu": 0, "dog": 1, "cat": 2}
    if written != "flat":
        assert classes_of_folders(network, tmp_path, ["Man's best friend"]) == {"Man's best friend": 1}


def test_labels_with_gaps(tmp_path: Path) -> None:
    save(trained(num_classes=3), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "label_names": {"2": "cat", "0": "emu"}}))
    assert classes_of_folders(load_network(str(tmp_path)), tmp_path, ["cat", "emu"]) == {"cat": 2, "emu": 0}
