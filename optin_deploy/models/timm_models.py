"""Networks from timm, by name."""

import logging
import re
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import timm
import torch
from torch import nn

from optin_deploy.data.preprocessing import PICTURE_CHANNELS, ImagePreprocessing
from optin_deploy.errors import UserError
from optin_deploy.network import Network, Origin, Source
from optin_deploy.structure.canonicalize import prunable_form

logger = logging.getLogger(__name__)

# `deit_small` means `deit_small_patch16_224`; timm's own short names come first.
_ALIAS_SUFFIXES = ("", "_patch16_224", "_patch4_window7_224")
# Plain ResNets and ResNeXts, with and without squeeze-and-excitation: others pool between the convolutions.
_RESNETS = re.compile(r"(se)?resnet\d+[dst]?|(se)?resnext\d+_\d+x\d+d?")
# Arguments of timm's that name files to be loaded, pickles too, or places to fetch from.
_OF_WEIGHTS = ("checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")
_CNNS = ("vgg", "regnet", "efficientnet", "mobilenetv3")
INPUT_NAME = "x"


def full_name(name: str) -> str | None:
    """timm's name for ``name`` or its short form, or None."""
    base, _, tag = name.partition(".")
    for suffix in _ALIAS_SUFFIXES:
        if timm.is_model(base + suffix):
            return f"{base}{suffix}.{tag}" if tag else base + suffix
    return None


def short_names() -> list[str]:
    """Names by which timm's models may be given, the short forms among them."""
    names = timm.list_models()
    short = [n.removesuffix(s) for n in names for s in _ALIAS_SUFFIXES[1:] if n.endswith(s)]
    return sorted({*names, *short})


def prunable_names() -> list[str]:
    """timm's plain vision transformers, ResNets and other CNNs built of the prunable modules."""
    resnets = [n for n in timm.list_models(module="resnet") if _RESNETS.fullmatch(n)]
    others = [n for m in ("vision_transformer", "deit", *_CNNS) for n in timm.list_models(module=m)]
    return others + resnets


def _build_arguments(source: Source) -> dict[str, Any]:
    """What timm builds the module with: a network that takes pictures of any size is not told their size."""
    fixed = not any(source.name.partition(".")[0] in timm.list_models(module=m) for m in ("resnet", *_CNNS))
    return {name: value for name, value in source.arguments.items() if fixed or name != "img_size"}


def build(source: Source) -> nn.Module:
    """The dense module with timm's initial weights; UserError when the arguments do not fit, or name weights."""
    if not timm.is_model(source.name):
        raise UserError(f"timm {timm.__version__} has no model {source.name!r}: install the version it is from")
    loading = next((name for name in _OF_WEIGHTS if name in source.arguments), None)
    if loading:
        raise UserError(f"{source.name} is not built with {loading}: weights come from safetensors beside it only")
    try:
        return timm.create_model(source.name, pretrained=False, **_build_arguments(source)).eval()
    except (TypeError, AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"timm cannot build {source.name} with {dict(source.arguments)}: {reason}") from error


def source_of(name: str, image_size: int | None, told: Mapping[str, Any] = MappingProxyType({})) -> Source:
    """The source of a timm model; ``image_size`` in pixels, and other arguments, where they are not the model's own."""
    if image_size is not None and image_size < 1:
        raise UserError(f"image size {image_size}: give a positive number of pixels")
    own = timm.get_pretrained_cfg(name, allow_unregistered=True)
    arguments = dict(told)
    if image_size is not None and (own is None or own.input_size[-1] != image_size):
        arguments["img_size"] = image_size
    return Source("timm", name, arguments)


def load_pretrained(source: Source) -> nn.Module:
    """The module with the weights that timm knows for it; OSError or RuntimeError when they cannot be had."""
    return timm.create_model(source.name, pretrained=True, **_build_arguments(source)).eval()


def network_of(
    module: nn.Module,
    source: Source,
    weights: str,
    pretrained_cfg: Mapping[str, Any] | None = None,
    origin: Origin | None = None,
) -> Network:
    """`Network` around a timm module; UserError when the image size does not fit it.

    Pictures of neither colours nor grey are calibrated on ready tensors. How others are prepared is said by
    ``pretrained_cfg``, else by what timm knows of the module; so is the origin.
    """
    known = dict(pretrained_cfg or getattr(module, "pretrained_cfg", None) or {})
    config: dict[str, Any] = timm.data.resolve_data_config({}, pretrained_cfg=known)
    size = source.arguments.get("img_size")
    patch = getattr(getattr(module, "patch_embed", None), "patch_size", (1, 1))
    if size and (size % patch[0] or size % patch[1]):
        raise UserError(f"image size {size} does not fit {source.name}: give a multiple of its patch size {patch[0]}")
    height, width = (size, size) if size else config["input_size"][1:]
    channels = source.arguments.get("in_chans", config["input_size"][0])
    inputs = {INPUT_NAME: torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))}
    classifies = getattr(module, "num_classes", 0) > 0
    return Network(
        module=prunable_form(module),
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


def _preprocessing(
    name: str, config: Mapping[str, Any], channels: int, size: tuple[int, int]
) -> ImagePreprocessing | None:
    """Pictures as timm prepares them; None, with a warning, for networks of neither colours nor grey."""
    if channels not in (1, 3):
        logger.warning(
            "%s takes %d channels and no pictures: calibrate it on tensors (.npz, .safetensors)", name, channels
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
    """Means or deviations for as many channels; those of colours are averaged for grey pictures, as timm's loaders do.

    Raises:
        UserError: there are neither as many nor those of colours.
    """
    if len(values) == channels:
        return tuple(values)
    if len(values) in (1, PICTURE_CHANNELS):
        return (sum(values) / len(values),) * channels
    raise UserError(
        f"pretrained_cfg.{key} of {name} has {len(values)} numbers, its pictures have {channels} channels: correct "
        "config.json"
    )


def _class_names(known: Mapping[str, Any]) -> tuple[tuple[str, ...], ...]:
    """What ``pretrained_cfg`` calls each class: its label, and the description of that."""
    labels, descriptions = known.get("label_names") or (), known.get("label_descriptions") or {}
    if isinstance(labels, Mapping):
        by_number = {int(number): str(label) for number, label in labels.items()}
        labels = [by_number.get(number, "") for number in range(max(by_number, default=-1) + 1)]
    told = [(str(label), str(descriptions.get(label, ""))) for label in labels]
    return tuple(tuple(name for name in names if name) for names in told)


def _origin(known: Mapping[str, Any], weights: str) -> Origin:
    if weights != "pretrained":
        return Origin()
    return Origin(base_model=known.get("hf_hub_id"), license=known.get("license"))
