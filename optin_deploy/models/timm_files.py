"""Networks of timm's in a user's files: a directory as timm saves it, and the classes that weights tell apart."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from timm.models import PretrainedCfg

from optin_deploy.errors import UserError
from optin_deploy.models.weight_files import WeightsFile, shapes_if_readable
from optin_deploy.models.weight_names import chosen, parts_of, unwrapped
from optin_deploy.network import Source

# Far more than any network has of anything but classes: a depth without end would be built until memory is full.
_MOST = 10_000
# Dimensions of the weights of a convolution of pictures.
_OF_CONVOLUTION = 4
_Pixels = Annotated[int, Field(ge=1, le=_MOST)]
# Of a class, as JSON writes the keys of a mapping.
_Number = Annotated[int, Field(ge=0, lt=10_000_000)]
_Channels = Field(min_length=1, max_length=_MOST)


@dataclass(frozen=True)
class Saved:
    """A network in a directory of timm's.

    Attributes:
        source: what timm builds it with, the number of classes included.
        pretrained_cfg: how its pictures are prepared, in timm's names.
    """

    source: Source
    pretrained_cfg: Mapping[str, Any]


class _Preparing(BaseModel):
    """What is read of ``pretrained_cfg``; what it does not say is timm's default, whatever the architecture."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    input_size: tuple[_Pixels, _Pixels, _Pixels] | None = None
    mean: Annotated[list[float], _Channels] | None = None
    std: Annotated[list[Annotated[float, Field(gt=0)]], _Channels] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = None
    crop_pct: Annotated[float, Field(gt=0, le=2)] | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None


class _Config(BaseModel):
    """What is read of ``config.json``."""

    model_config = ConfigDict(frozen=True)

    architecture: str
    num_classes: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    label_names: list[str] | dict[_Number, str] | None = None
    label_descriptions: dict[str, str] | None = None
    model_args: dict[str, Any] = {}
    pretrained_cfg: _Preparing = _Preparing()


def saved(directory: Path) -> Saved | None:
    """The network that timm's ``save_for_hf`` has written to ``directory``; None where that is no such directory.

    Raises:
        UserError: its ``config.json`` cannot be used.
    """
    path = directory / "config.json"
    try:
        told = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(told, dict) or "architecture" not in told or "model_type" in told:
        return None
    if "pretrained_cfg" not in told:  # all in one, as early versions wrote it
        told = {"label_names": told.get("labels"), **told, "pretrained_cfg": told}
    try:
        config = _Config.model_validate(told)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if not timm.is_model(config.architecture):
        raise UserError(f"{path}: timm {timm.__version__} has no architecture {config.architecture!r}")
    return Saved(
        source=Source("timm", config.architecture, _arguments(config, path)),
        pretrained_cfg=_own(config.architecture)
        | _defaults()
        | config.pretrained_cfg.model_dump(exclude_none=True)
        | config.model_dump(include={"label_names", "label_descriptions"}),
    )


def _arguments(config: _Config, path: Path) -> dict[str, Any]:
    arguments = dict(config.model_args)
    for name, value in arguments.items():
        numbers = value if isinstance(value, list) else [value]
        if name != "num_classes" and any(isinstance(n, int | float) and n > _MOST for n in numbers):
            raise UserError(f"{path}: model_args.{name} is {str(value)[:40]}: at most {_MOST}; correct it")
    if config.num_classes is not None:
        arguments["num_classes"] = config.num_classes
    told = config.pretrained_cfg.input_size or _own(config.architecture).get("input_size") or (3, 224, 224)
    size = arguments.pop("img_size", None) or list(told[1:])
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    if not isinstance(height, int) or height != width:
        raise UserError(f"{path}: pictures of size {size}: only square ones are prepared")
    if height != (_own(config.architecture).get("input_size") or (3, 224, 224))[-1]:
        arguments["img_size"] = height
    return arguments


def _defaults() -> dict[str, Any]:
    """How timm prepares pictures where ``config.json`` does not say it."""
    default = PretrainedCfg().to_dict()
    return {name: default[name] for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}


def _own(architecture: str) -> dict[str, Any]:
    known = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    return known.to_dict() if known else {}


def told_by_weights(name: str, file: WeightsFile) -> dict[str, int]:
    """What a file of weights tells of the network ``name`` where that is other than timm's own: arguments for timm.

    They are the number of classes, 0 for a file without a head, and of the channels of its pictures. Nothing where the
    file cannot be read or does not fit, which loading it will tell.
    """
    own, shapes = _own(name), shapes_if_readable(file.path)
    head, first = _first(own.get("classifier")), _first(own.get("first_conv"))
    if shapes is None or head is None or first is None:
        return {}
    try:
        with torch.device("meta"):
            usual = {n: tuple(t.shape) for n, t in timm.create_model(name).state_dict().items()}
        found = unwrapped(shapes)
        parts = parts_of(found, [n for n in usual if not n.startswith(f"{head}.")])
        part = parts[0] if file.part is None else chosen(parts, file.part, file.path)
        conv, usual_conv = shapes[found[part.found[f"{first}.weight"]]], usual[f"{first}.weight"]
        classes = shapes.get(found.get(f"{part.prefix}{head}.weight", ""), (0,))[0]
    except (UserError, NotImplementedError, RuntimeError, LookupError):
        return {}
    told = {} if classes == usual.get(f"{head}.weight", (0,))[0] else {"num_classes": classes}
    if len(conv) == _OF_CONVOLUTION == len(usual_conv) and conv[1] != usual_conv[1]:
        told["in_chans"] = conv[1]
    return told


def _first(names: Any) -> str | None:
    return names if isinstance(names, str) else next(iter(names or ()), None)
