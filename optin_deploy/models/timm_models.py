"""Networks from timm."""

import logging
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType

import timm
import torch
from torch import nn

from optin_deploy.data.preprocessing import IMAGE_CHANNELS, ImagePreprocessing
from optin_deploy.errors import UserError, one_line
from optin_deploy.network import Network, Origin, Source
from optin_deploy.structure.canonicalize import canonicalize
from optin_deploy.utils.json_types import JsonObject, JsonValue

logger = logging.getLogger(__name__)

# `deit_small` means `deit_small_patch16_224`; timm's own short names come first.
_ALIAS_SUFFIXES = ("", "_patch16_224", "_patch4_window7_224")
# Plain ResNets and ResNeXts, with and without squeeze-and-excitation: others pool between the convolutions.
_RESNETS = re.compile(r"(se)?resnet\d+[dst]?|(se)?resnext\d+_\d+x\d+d?")
# Arguments that name files to load, pickles among them, or addresses.
_OF_WEIGHTS = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
_CNNS = ("vgg", "regnet", "efficientnet", "mobilenetv3")
INPUT_NAME = "x"


def full_name(name: str) -> str | None:
    """Return timm's full name for ``name`` or its short form; None if timm has no such model."""
    base, _, tag = name.partition(".")
    for suffix in _ALIAS_SUFFIXES:
        if timm.is_model(base + suffix):
            return f"{base}{suffix}.{tag}" if tag else base + suffix
    return None


def short_names() -> list[str]:
    """Return the names of all timm models, with the short forms."""
    names = timm.list_models()
    short = [n.removesuffix(s) for n in names for s in _ALIAS_SUFFIXES[1:] if n.endswith(s)]
    return sorted({*names, *short})


def prunable_names() -> list[str]:
    """Return the names of timm's plain vision transformers, ResNets and other CNNs that can be pruned."""
    resnets = [n for n in timm.list_models(module="resnet") if _RESNETS.fullmatch(n)]
    others = [n for m in ("vision_transformer", "deit", *_CNNS) for n in timm.list_models(module=m)]
    return others + resnets


def _build_arguments(source: Source) -> dict[str, JsonValue]:
    """Return the arguments of ``timm.create_model``; CNNs take no image size."""
    is_cnn = any(source.name.partition(".")[0] in timm.list_models(module=m) for m in ("resnet", *_CNNS))
    return {name: value for name, value in source.arguments.items() if not (is_cnn and name == "img_size")}


def build(source: Source) -> nn.Module:
    """Return the dense module with initial weights; UserError if the arguments do not fit, or name files to load."""
    if not timm.is_model(source.name):
        raise UserError(f"timm {timm.__version__} has no model {source.name!r}: install the version it is from")
    loading = next((name for name in _OF_WEIGHTS if name in source.arguments), None)
    if loading:
        raise UserError(f"{source.name} is not built with {loading}: weights are read from safetensors only")
    try:
        return timm.create_model(source.name, pretrained=False, **_build_arguments(source)).eval()
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        raise UserError(f"timm cannot build {source.name} with {dict(source.arguments)}: {one_line(error)}") from error


def source_of(name: str, image_size: int | None, arguments: JsonObject = MappingProxyType({})) -> Source:
    """Return the source of a timm model, with ``image_size`` in pixels if it differs from the model's own."""
    if image_size is not None and image_size < 1:
        raise UserError(f"image size {image_size}: give a positive number of pixels")
    cfg = timm.get_pretrained_cfg(name, allow_unregistered=True)
    if image_size is None or (cfg is not None and cfg.input_size[-1] == image_size):
        return Source("timm", name, dict(arguments))
    return Source("timm", name, {**arguments, "img_size": image_size})


def load_pretrained(source: Source) -> nn.Module:
    """Return the module with timm's pretrained weights; OSError or RuntimeError if they cannot be fetched."""
    return timm.create_model(source.name, pretrained=True, **_build_arguments(source)).eval()


def network_of(
    module: nn.Module,
    source: Source,
    weights: str,
    pretrained_cfg: JsonObject | None = None,
    origin: Origin | None = None,
) -> Network:
    """Return a `Network` around a timm module; UserError if the image size does not fit it.

    Preprocessing and origin come from ``pretrained_cfg`` and ``origin`` or, if these are None, from the module.
    Networks of neither color nor grey images have no preprocessing: they are calibrated on tensors.
    """
    known = dict(pretrained_cfg or getattr(module, "pretrained_cfg", None) or {})
    config: dict[str, JsonValue] = timm.data.resolve_data_config({}, pretrained_cfg=known)
    size = source.arguments.get("img_size")
    patch = getattr(getattr(module, "patch_embed", None), "patch_size", (1, 1))
    if size and (size % patch[0] or size % patch[1]):
        raise UserError(f"image size {size} does not fit {source.name}: give a multiple of its patch size {patch[0]}")
    height, width = (size, size) if size else config["input_size"][1:]
    channels = source.arguments.get("in_chans", config["input_size"][0])
    inputs = {INPUT_NAME: torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))}
    classifies = getattr(module, "num_classes", 0) > 0
    return Network(
        module=canonicalize(module),
        inputs=inputs,
        outputs={"logits" if classifies else "features": "output"},
        source=source,
        weights=weights,
        logits="logits" if classifies else None,
        head="binary" if getattr(module, "num_classes", 0) == 1 else "classes",
        class_names=_class_names(known),
        preprocessing=_preprocessing(source.name, config, channels, (height, width)),
        origin=origin or _origin(known, weights),
    )


def _preprocessing(name: str, config: JsonObject, channels: int, size: tuple[int, int]) -> ImagePreprocessing | None:
    """Return timm's preprocessing; None, with a warning, for networks of neither color nor grey images."""
    if channels not in (1, 3):
        logger.warning(
            "%s takes %d channels and no images: calibrate it on tensors (.npz, .safetensors)", name, channels
        )
        return None
    return ImagePreprocessing(
        input_name=INPUT_NAME,
        size=size,
        mean=_for_channels(name, "mean", config["mean"], channels),
        std=_for_channels(name, "std", config["std"], channels),
        interpolation=config["interpolation"],
        crop_pct=config["crop_pct"],
        crop_mode=config["crop_mode"],
    )


def _for_channels(name: str, key: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """Return one value per channel; those of colors are averaged for grey images, as in timm's loaders.

    Raises:
        UserError: there are neither ``channels`` values nor those of colors.
    """
    if len(values) == channels:
        return tuple(values)
    if len(values) in (1, IMAGE_CHANNELS):
        return (sum(values) / len(values),) * channels
    raise UserError(
        f"pretrained_cfg.{key} of {name} has {len(values)} numbers, its images have {channels} channels: correct "
        "config.json"
    )


def _class_names(known: JsonObject) -> tuple[tuple[str, ...], ...]:
    """Return the names of each class in ``pretrained_cfg``: its label and, if there is one, its description."""
    labels, descriptions = known.get("label_names") or (), known.get("label_descriptions") or {}
    if isinstance(labels, Mapping):
        by_number = {int(number): str(label) for number, label in labels.items()}
        labels = [by_number.get(number, "") for number in range(max(by_number, default=-1) + 1)]
    pairs = [(str(label), str(descriptions.get(label, ""))) for label in labels]
    return tuple(tuple(name for name in pair if name) for pair in pairs)


def _origin(known: JsonObject, weights: str) -> Origin:
    if weights != "pretrained":
        return Origin()
    return Origin(base_model=known.get("hf_hub_id"), license=known.get("license"))
