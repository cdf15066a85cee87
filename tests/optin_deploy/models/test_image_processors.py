"""Pictures are prepared as the library's own pipeline prepares them."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import tiny
import torch
import transformers as hf
from PIL import Image
from torch import nn
from transformers.models.auto import modeling_auto
from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES

from optin_deploy.data.calibration import load_calibration
from optin_deploy.data.preprocessing import ImagePreprocessing, ProcessorPreprocessing
from optin_deploy.errors import UserError
from optin_deploy.evaluation.load import load_dataset
from optin_deploy.models import checkpoint
from optin_deploy.models.load import load_network
from optin_deploy.models.transformers_images import read_image_preprocessing
from optin_deploy.network import Network
from optin_deploy.structure.plan import Plan

pytestmark = pytest.mark.slow


CLASSES = {"id2label": dict(enumerate("abcd")), "label2id": {name: i for i, name in enumerate("abcd")}}
VIT: dict[str, Any] = {
    "image_size": 32,
    "patch_size": 8,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 16,
    **CLASSES,
}
STAGES: dict[str, Any] = {"depths": [1, 1, 1, 1], "hidden_sizes": [8, 8, 8, 8], **CLASSES}
SQUARE = {"height": 32, "width": 32}


def save_pictures(folder: Path, count: int = 24) -> list[Path]:
    """Pictures of many sizes, colours and contrasts, every fourth of which lies on its side by its EXIF orientation."""
    folder.mkdir(parents=True, exist_ok=True)
    rng, files = np.random.default_rng(0), []
    for number in range(count):
        width, height = (int(n) for n in rng.integers(40, 90, 2))
        ramp = (
            np.linspace(0, 1, width)[None, :, None]
            * rng.uniform(0, 255, 3)
            * np.linspace(1, 0.2, height)[:, None, None]
        )
        noise = rng.uniform(0, rng.uniform(10, 120), (height, width, 3))
        image = Image.fromarray(np.clip(ramp + noise, 0, 255).astype(np.uint8))
        exif = Image.Exif()
        if number % 4 == 0:
            exif[0x0112] = 6
        files.append(folder / f"{number:02}.png")
        image.save(files[-1], exif=exif)
    return files


def own_processor(directory: Path) -> Any:
    """What transformers reads; by default it has no way to resize by BOX and HAMMING."""
    processor = hf.AutoImageProcessor.from_pretrained(directory)
    return (
        hf.AutoImageProcessor.from_pretrained(directory, use_fast=False) if processor.resample in (4, 5) else processor
    )


def own_answers(directory: Path, files: list[Path]) -> list[str]:
    """What transformers' own pipeline calls each picture."""
    processor = own_processor(directory)
    pipeline = hf.pipeline("image-classification", model=str(directory), image_processor=processor, device="cpu")
    return [pipeline(str(file))[0]["label"] for file in files]


def balance(module: Any, directory: Path, files: list[Path]) -> list[Path]:
    """Shift the logits so that all classes are answers: those of random networks are almost always one. Then give the
    files whose answers rounding cannot change."""
    processor = own_processor(directory)
    pictures = [hf.image_utils.load_image(str(file)) for file in files]
    with torch.inference_mode():
        logits = torch.cat([module(**processor(images=p, return_tensors="pt")).logits for p in pictures])
    head = [m for m in module.modules() if isinstance(m, nn.Linear) and m.out_features == len(CLASSES["id2label"])][-1]
    with torch.no_grad():
        head.weight /= logits.std(0)[:, None]
        head.bias.copy_((head.bias - logits.mean(0)) / logits.std(0))
    first, second = ((logits - logits.mean(0)) / logits.std(0)).topk(2).values.T
    return [file for file, margin in zip(files, first - second, strict=True) if margin > 0.02]


def sort_by(labels: list[str], files: list[Path], folder: Path) -> Path:
    for label, file in zip(labels, files, strict=True):
        (folder / label).mkdir(parents=True, exist_ok=True)
        (folder / label / file.name).write_bytes(file.read_bytes())
    return folder


def accuracy(network: Network, folder: Path) -> float:
    return load_dataset(network, folder).measure(network.module)


def efficientnet() -> nn.Module:
    config = hf.EfficientNetConfig(
        image_size=32,
        width_coefficient=0.1,
        depth_coefficient=0.1,
        hidden_dim=128,
        kernel_sizes=[3],
        in_channels=[8],
        out_channels=[8],
        strides=[1],
        num_block_repeats=[1],
        expand_ratios=[1],
        depthwise_padding=[],
        **CLASSES,
    )
    return hf.EfficientNetForImageClassification(config)


def convnext() -> nn.Module:
    return hf.ConvNextForImageClassification(hf.ConvNextConfig(**STAGES))


def vit() -> nn.Module:
    return hf.ViTForImageClassification(hf.ViTConfig(**VIT))


def levit() -> nn.Module:
    config = hf.LevitConfig(
        image_size=32,
        hidden_sizes=[16, 16, 16],
        num_attention_heads=[2, 2, 2],
        depths=[1, 1, 1],
        key_dim=[4] * 3,
        **CLASSES,
    )
    return hf.LevitForImageClassification(config)


def poolformer() -> nn.Module:
    return hf.PoolFormerForImageClassification(hf.PoolFormerConfig(**STAGES))


def mobilevit() -> nn.Module:
    config = hf.MobileViTConfig(
        image_size=32,
        hidden_sizes=[8, 8, 8],
        neck_hidden_sizes=[8] * 7,
        num_attention_heads=2,
        expand_ratio=1.0,
        **CLASSES,
    )
    return hf.MobileViTForImageClassification(config)


def clip() -> nn.Module:
    vision = {key: value for key, value in VIT.items() if key not in CLASSES}
    config = hf.CLIPConfig(vision_config=vision, **CLASSES)
    return hf.CLIPForImageClassification(config)


def siglip() -> nn.Module:
    vision = {key: value for key, value in VIT.items() if key not in CLASSES}
    return hf.SiglipForImageClassification(hf.SiglipConfig(vision_config=vision, **CLASSES))


KINDS: dict[str, tuple[Callable[[], nn.Module], Any]] = {
    "deit": (
        lambda: hf.DeiTForImageClassification(hf.DeiTConfig(**VIT)),
        hf.DeiTImageProcessor(size={"height": 40, "width": 40}, crop_size=SQUARE),
    ),
    "convnext": (convnext, hf.ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=0.8)),
    "convnext_large": (convnext, hf.ConvNextImageProcessor(size={"shortest_edge": 384})),
    "levit": (levit, hf.LevitImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)),
    "poolformer": (
        poolformer,
        hf.PoolFormerImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE, crop_pct=0.7),
    ),
    "mobilevit": (mobilevit, hf.MobileViTImageProcessor(size={"shortest_edge": 36}, crop_size=SQUARE)),
    "efficientnet": (efficientnet, hf.EfficientNetImageProcessor(size=SQUARE)),
    "efficientnet_offset": (
        efficientnet,
        hf.EfficientNetImageProcessor(size=SQUARE, rescale_offset=True, rescale_factor=1 / 127.5, include_top=False),
    ),
    "vit": (vit, hf.ViTImageProcessor(size=SQUARE)),
    "not_normalised": (vit, hf.ViTImageProcessor(size=SQUARE, do_normalize=False)),
    "not_rescaled": (
        vit,
        hf.ViTImageProcessor(size=SQUARE, do_rescale=False, image_mean=[120] * 3, image_std=[60] * 3),
    ),
    "rescaled": (vit, hf.ViTImageProcessor(size=SQUARE, rescale_factor=1 / 127.5, image_mean=[1.0] * 3)),
    "nearest": (vit, hf.ViTImageProcessor(size=SQUARE, resample=0)),
    "lanczos": (vit, hf.ViTImageProcessor(size=SQUARE, resample=1)),
    "box": (vit, hf.ViTImageProcessor(size=SQUARE, resample=4)),
    "hamming": (vit, hf.ViTImageProcessor(size=SQUARE, resample=5)),
    "shortest_edge": (vit, hf.BitImageProcessor(size={"shortest_edge": 48}, crop_size=SQUARE)),
    "crop_that_pads": (vit, hf.BitImageProcessor(size={"shortest_edge": 24}, crop_size=SQUARE)),
    "kept_aspect": (
        vit,
        hf.DPTImageProcessor(size=SQUARE, do_pad=False, keep_aspect_ratio=False, ensure_multiple_of=32),
    ),
    "clip": (clip, hf.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=SQUARE)),
    "siglip": (siglip, hf.SiglipImageProcessor(size=SQUARE)),
    "beit": (
        lambda: hf.BeitForImageClassification(hf.BeitConfig(**VIT)),
        hf.BeitImageProcessor(size={"height": 40, "width": 40}, do_center_crop=True, crop_size=SQUARE),
    ),
    "mobilenet_v2": (
        lambda: hf.MobileNetV2ForImageClassification(hf.MobileNetV2Config(depth_multiplier=0.1, **CLASSES)),
        hf.MobileNetV2ImageProcessor(size={"shortest_edge": 40}, crop_size=SQUARE),
    ),
    "swin": (
        lambda: hf.SwinForImageClassification(
            hf.SwinConfig(image_size=32, patch_size=4, depths=[1], num_heads=[2], embed_dim=8, window_size=4, **CLASSES)
        ),
        hf.ViTImageProcessor(size=SQUARE),
    ),
}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return save_pictures(tmp_path_factory.mktemp("pictures"))


def save_kind(kind: str, directory: Path, files: list[Path]) -> list[Path]:
    make, processor = KINDS[kind]
    torch.manual_seed(0)
    # Depthwise convolutions make the signal small.
    module: Any = tiny.randomised(make(), gain=8 if kind == "mobilevit" else 1.5)
    processor.save_pretrained(directory)
    module.save_pretrained(directory)
    clear = balance(module, directory, files)
    module.save_pretrained(directory)
    return clear


@pytest.mark.parametrize("kind", KINDS)
def test_accuracy_on_what_the_models_own_pipeline_says(kind: str, tmp_path: Path, pictures: list[Path]) -> None:
    clear = save_kind(kind, tmp_path / "model", pictures)
    labels = own_answers(tmp_path / "model", clear)
    assert len(clear) > 12
    assert len(set(labels)) > 2
    folder = sort_by(labels, clear, tmp_path / "set")
    network = load_network(str(tmp_path / "model"))
    assert accuracy(network, folder) == 100
    checkpoint.save(network, Plan({}), tmp_path / "checkpoint")
    again = checkpoint.load_network(tmp_path / "checkpoint")
    picture = [Image.open(pictures[0])]
    assert torch.equal(again.preprocessing(picture)["pixel_values"], network.preprocessing(picture)["pixel_values"])
    assert (again.preprocessing.size, again.preprocessing.fixed) == (network.preprocessing.size, True)
    assert accuracy(again, folder) == 100


TASKS = ("IMAGE_CLASSIFICATION", "SEMANTIC_SEGMENTATION", "DEPTH_ESTIMATION", "IMAGE_SEGMENTATION", "OBJECT_DETECTION")


def processors() -> Iterator[tuple[str, str]]:
    """Every image processor of networks for these tasks, with a model type that has it."""
    found: dict[str, str] = {}
    for task in TASKS:
        for model_type in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES"):
            names = IMAGE_PROCESSOR_MAPPING_NAMES.get(model_type, ())
            # Earlier versions have pairs of names.
            name = (names.get("torchvision") if isinstance(names, dict) else next(iter(names), None)) or ""
            if hasattr(hf, name.removesuffix("Fast")):
                found.setdefault(name.removesuffix("Fast"), model_type)
    yield from found.items()


class Takes(nn.Module):
    """A network by its forward and its configuration alone."""

    def __init__(self, config: Any = None) -> None:
        super().__init__()
        self.config = config or hf.ViTConfig(image_size=256)

    def forward(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor | None = None) -> torch.Tensor:
        return pixel_values


@pytest.mark.parametrize(("name", "model_type"), processors())
def test_every_processor_prepares_as_it_does_by_itself(
    name: str, model_type: str, tmp_path: Path, pictures: list[Path]
) -> None:
    try:
        own = getattr(hf, name)()
    except (TypeError, ImportError) as error:
        pytest.skip(f"there is no default of {name}: {error}")
    own.save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    try:
        given = own(images=Image.new("RGB", (256, 256)), return_tensors="pt")["pixel_values"]
    except Exception as error:
        with pytest.raises((UserError, ValueError)):
            read_image_preprocessing(str(tmp_path), Takes())
        pytest.skip(f"{name} needs more than its defaults: {error}")
    if given.dim() != 4:
        with pytest.raises(UserError, match=r"\(1, channels, height, width\)"):
            read_image_preprocessing(str(tmp_path), Takes())
        return
    preprocessing = read_image_preprocessing(str(tmp_path), Takes())
    assert isinstance(preprocessing, ProcessorPreprocessing)
    for file in pictures[:2]:
        upright = hf.image_utils.load_image(str(file))
        expected = hf.AutoImageProcessor.from_pretrained(tmp_path)(images=upright, return_tensors="pt")["pixel_values"]
        assert torch.equal(preprocessing([Image.open(file)])["pixel_values"], expected)
        if preprocessing.fixed:
            assert tuple(expected.shape[2:]) == preprocessing.size
        assert tuple(expected.shape[2:]) == preprocessing.shape_of(*upright.size)


# What is in a directory


@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("kind", ["siglip", "clip", "vit"])
def test_a_directory_with_one_processor_file(kind: str, nested: bool, tmp_path: Path, pictures: list[Path]) -> None:
    files = save_kind(kind, tmp_path, pictures)
    path = tmp_path / "preprocessor_config.json"
    told = json.loads(path.read_text())
    if nested:
        path.unlink()
        (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": told}))
    else:
        # As early versions wrote it: no name of a class, one number for the size.
        del told["image_processor_type"]
        path.write_text(json.dumps({**told, "size": 32}))
    network = load_network(str(tmp_path))
    upright = hf.image_utils.load_image(str(files[0]))
    expected = own_processor(tmp_path)(images=upright, return_tensors="pt")["pixel_values"]
    assert torch.equal(network.preprocessing([Image.open(files[0])])["pixel_values"], expected)
    checkpoint.save(network, Plan({}), tmp_path / "checkpoint")
    again = checkpoint.load_network(tmp_path / "checkpoint")
    assert torch.equal(again.preprocessing([Image.open(files[0])])["pixel_values"], expected)


def save_vit(path: Path, processor: Any = None, **changes: Any) -> Path:
    torch.manual_seed(0)
    hf.ViTForImageClassification(hf.ViTConfig(**{**VIT, **changes})).save_pretrained(path)
    if processor is not None:
        processor.save_pretrained(path)
    return path


def test_without_a_processor_pictures_are_a_guess(
    tmp_path: Path, pictures: list[Path], caplog: pytest.LogCaptureFixture
) -> None:
    network = load_network(str(save_vit(tmp_path / "model")))
    assert "has no image processor" in caplog.text
    assert isinstance(network.preprocessing, ImagePreprocessing)
    load_calibration(network, pictures[0].parent, samples=4)
    checkpoint.save(network, Plan({}), tmp_path / "checkpoint")
    folder = sort_by(["a"] * len(pictures), pictures, tmp_path / "set")
    for each in (network, checkpoint.load_network(tmp_path / "checkpoint")):
        with pytest.raises(UserError, match=r"preprocessor_config\.json"):
            load_dataset(each, folder)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"size": {"height": 10**9, "width": 32}}, "has height 1000000000"),
        ({"size": {"height": -1, "width": 32}}, "has height -1"),
        ({"image_processor_type": "NoSuchImageProcessor"}, "preprocessing of "),
        ({"size": {"height": "high"}}, "preprocessing of "),
        ({"image_mean": [0.5, 0.5]}, "preprocessing of "),
    ],
)
def test_processors_that_cannot_be_used(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    path = save_vit(tmp_path, hf.ViTImageProcessor(size=SQUARE)) / "preprocessor_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=expected) as caught:
        load_network(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_code_beside_a_processor_is_never_run(tmp_path: Path) -> None:
    path = save_vit(tmp_path, hf.ViTImageProcessor(size=SQUARE)) / "preprocessor_config.json"
    (tmp_path / "mine.py").write_text("raise SystemExit('run')\n")
    told = {**json.loads(path.read_text()), "auto_map": {"AutoImageProcessor": "mine.Processor"}}
    path.write_text(json.dumps({**told, "image_processor_type": "Processor"}))
    with pytest.raises(UserError, match="preprocessing of "):
        load_network(str(tmp_path))


# Sizes and channels


@pytest.mark.parametrize("size", [{"shortest_edge": 32}, {"shortest_edge": 32, "longest_edge": 64}])
def test_pictures_of_one_size_suit_a_processor_without_one(tmp_path: Path, size: dict[str, int]) -> None:
    processor = hf.BitImageProcessor(size=size, do_center_crop=False)
    network = load_network(str(save_vit(tmp_path / "model", processor)))
    assert (network.preprocessing.size, network.preprocessing.fixed) == ((32, 32), False)
    assert load_calibration(network, None, samples=4).batches[0]["pixel_values"].shape == (4, 3, 32, 32)
    for name, shape in (("square", (50, 50)), ("wide", (64, 40))):
        for number in range(4):
            (tmp_path / name / "a").mkdir(parents=True, exist_ok=True)
            Image.new("RGB", shape, (number, 0, 0)).save(tmp_path / name / "a" / f"{number}.png")
    assert load_calibration(network, tmp_path / "square").batches[0]["pixel_values"].shape[2:] == (32, 32)
    assert load_dataset(network, tmp_path / "square").samples == 4
    with pytest.raises(UserError, match=r"32 x 51 \(height x width\)"):
        load_calibration(network, tmp_path / "wide")
    Image.new("RGB", (90, 50)).save(tmp_path / "square" / "a" / "9.png")
    for read in (load_calibration, load_dataset):
        with pytest.raises(UserError, match=r"different shapes, 32 x \d\d and 32 x \d\d .*preprocessor_config.json"):
            read(network, tmp_path / "square")


def test_pictures_as_they_are(tmp_path: Path) -> None:
    network = load_network(str(save_vit(tmp_path / "model", hf.ViTImageProcessor(do_resize=False))))
    assert (network.preprocessing.size, network.preprocessing.fixed) == ((32, 32), False)
    assert load_calibration(network, None, samples=4).samples == 4


def test_masks_of_padding_are_refused(tmp_path: Path) -> None:
    size = {"shortest_edge": 32, "longest_edge": 64}
    hf.DetrImageProcessor(size=size, pad_size={"height": 64, "width": 64}).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"pads.* pixel_mask"):
        read_image_preprocessing(str(tmp_path), Takes())
    hf.DetrImageProcessor(size=size).save_pretrained(tmp_path)
    preprocessing = read_image_preprocessing(str(tmp_path), Takes())
    assert isinstance(preprocessing, ProcessorPreprocessing)
    assert preprocessing.masks == ("pixel_mask",)


@pytest.mark.parametrize("channels", [1, 4])
def test_networks_of_other_channels_take_tensors(
    tmp_path: Path, channels: int, caplog: pytest.LogCaptureFixture
) -> None:
    network = load_network(str(save_vit(tmp_path, hf.ViTImageProcessor(size=SQUARE), num_channels=channels)))
    assert network.preprocessing is None
    assert network.inputs["pixel_values"].shape[1] == channels
    assert f"takes images of {channels} channels, its image processor makes 3" in caplog.text
    with pytest.raises(UserError, match=f"takes .*{channels} channels.*tensor 'pixel_values'"):
        load_calibration(network, None)
    with pytest.raises(UserError, match=f"takes .*{channels} channels.*evaluate the pruned network in Python"):
        load_dataset(network, tmp_path)


@pytest.mark.parametrize("kind", ["mobilevit", "efficientnet_offset", "not_normalised", "rescaled", "vit"])
def test_prepared_pictures_are_shown_in_their_colours(kind: str, tmp_path: Path) -> None:
    KINDS[kind][1].save_pretrained(tmp_path)
    preprocessing = read_image_preprocessing(str(tmp_path), Takes())
    assert isinstance(preprocessing, ProcessorPreprocessing)
    pixels = preprocessing([Image.new("RGB", (50, 60), (250, 100, 10))])["pixel_values"][0]
    shown = preprocessing.to_colors(pixels)
    assert shown.shape == (*preprocessing.size, 3)
    assert torch.allclose(shown, torch.tensor([250, 100, 10]) / 255, atol=1e-4)


def test_checkpoints_of_earlier_versions_load(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    network = load_network(str(save_vit(tmp_path / "model", hf.ViTImageProcessor(size=SQUARE))))
    checkpoint.save(network, Plan({}), tmp_path / "checkpoint")
    path = tmp_path / "checkpoint" / "optin.json"
    told = json.loads(path.read_text())
    image = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "squash"}
    told["image"] = {"input_name": "pixel_values", "size": [32, 32], **image}
    del told["processor"], told["class_names"]
    path.write_text(json.dumps(told))
    again = checkpoint.load_network(tmp_path / "checkpoint")
    assert isinstance(again.preprocessing, ImagePreprocessing)
    assert "is of an earlier version" in caplog.text


def test_networks_of_timm_in_directories_of_transformers(tmp_path: Path, pictures: list[Path]) -> None:
    timm_module = timm.create_model("test_vit", img_size=32, num_classes=4)
    timm_module.pretrained_cfg |= {"mean": (0.1, 0.2, 0.3), "crop_pct": 0.7, "input_size": (3, 32, 32)}
    timm.models.save_for_hf(timm_module, tmp_path / "timm", model_args={"img_size": 32}, safe_serialization=True)
    config = json.loads((tmp_path / "timm" / "config.json").read_text())
    config["model_args"].pop("num_classes", None)  # which transformers gives a second time
    (tmp_path / "timm" / "config.json").write_text(json.dumps(config))
    hf.AutoModelForImageClassification.from_pretrained(tmp_path / "timm").save_pretrained(tmp_path / "model")
    hf.AutoImageProcessor.from_pretrained(tmp_path / "timm").save_pretrained(tmp_path / "model")
    network = load_network(str(tmp_path / "model"))
    upright = hf.image_utils.load_image(str(pictures[0]))
    expected = hf.AutoImageProcessor.from_pretrained(tmp_path / "model")(images=upright)["pixel_values"]
    assert torch.equal(network.preprocessing([Image.open(pictures[0])])["pixel_values"], expected)
    checkpoint.save(network, Plan({}), tmp_path / "checkpoint")
    again = checkpoint.load_network(tmp_path / "checkpoint")
    assert torch.equal(again.preprocessing([Image.open(pictures[0])])["pixel_values"], expected)
