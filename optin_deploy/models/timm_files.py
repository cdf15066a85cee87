"""timm networks in a user's files: directories that timm saved, and arguments that files of weights imply."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import timm
import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from timm.models import PretrainedCfg

from optin_deploy.errors import UserError
from optin_deploy.models.weight_files import WeightsFile, shapes_if_readable
from optin_deploy.models.weight_names import choose_part, find_parts, unwrap_names
from optin_deploy.network import Source
from optin_deploy.utils.json_types import JsonObject, JsonValue

# A limit for all numbers but classes: a huge depth would be built until memory is full.
_MOST = 10_000
# Dimensions of the weights of a convolution of images.
_CONV_DIMS = 4
_Pixels = Annotated[int, Field(ge=1, le=_MOST)]
# A class number as a key in JSON.
_Number = Annotated[int, Field(ge=0, lt=10_000_000)]
_Channels = Field(min_length=1, max_length=_MOST)


@dataclass(frozen=True)
class SavedNetwork:
    """A network in a directory that timm saved.

    Attributes:
        source: how timm builds it, with the number of classes.
        pretrained_cfg: its preprocessing and class names, as in timm.
    """

    source: Source
    pretrained_cfg: JsonObject


class _PretrainedCfg(BaseModel):
    """The fields of ``pretrained_cfg`` that are read; the others are timm's defaults for every architecture."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    input_size: tuple[_Pixels, _Pixels, _Pixels] | None = None
    mean: Annotated[list[float], _Channels] | None = None
    std: Annotated[list[Annotated[float, Field(gt=0)]], _Channels] | None = None
    interpolation: Literal["nearest", "bilinear", "bicubic", "box", "hamming", "lanczos"] | None = None
    crop_pct: Annotated[float, Field(gt=0, le=2)] | None = None
    crop_mode: Literal["center", "squash", "border"] | None = None


class _Config(BaseModel):
    """The fields of ``config.json`` that are read."""

    model_config = ConfigDict(frozen=True)

    architecture: str
    num_classes: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    label_names: list[str] | dict[_Number, str] | None = None
    label_descriptions: dict[str, str] | None = None
    model_args: dict[str, JsonValue] = {}
    pretrained_cfg: _PretrainedCfg = _PretrainedCfg()


def read_saved_network(directory: Path) -> SavedNetwork | None:
    """Return the network that timm's ``save_for_hf`` wrote to ``directory``; None if it is no such directory.

    Raises:
        UserError: its ``config.json`` cannot be used.
    """
    path = directory / "config.json"
    try:
        content = json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or "architecture" not in content or "model_type" in content:
        return None
    if "pretrained_cfg" not in content:  # early versions wrote all fields into one object
        content = {"label_names": content.get("labels"), **content, "pretrained_cfg": content}
    try:
        config = _Config.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{path}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    if not timm.is_model(config.architecture):
        raise UserError(f"{path}: timm {timm.__version__} has no architecture {config.architecture!r}")
    return SavedNetwork(
        source=Source("timm", config.architecture, _arguments(config, path)),
        pretrained_cfg=_architecture_cfg(config.architecture)
        | _default_preprocessing()
        | config.pretrained_cfg.model_dump(exclude_none=True)
        | config.model_dump(include={"label_names", "label_descriptions"}),
    )


def _arguments(config: _Config, path: Path) -> dict[str, JsonValue]:
    arguments = dict(config.model_args)
    for name, value in arguments.items():
        numbers = value if isinstance(value, list) else [value]
        if name != "num_classes" and any(isinstance(n, int | float) and n > _MOST for n in numbers):
            raise UserError(f"{path}: model_args.{name} is {str(value)[:40]}: at most {_MOST}; correct it")
    if config.num_classes is not None:
        arguments["num_classes"] = config.num_classes
    default = _architecture_cfg(config.architecture).get("input_size") or (3, 224, 224)
    size = arguments.pop("img_size", None) or list((config.pretrained_cfg.input_size or default)[1:])
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    if not isinstance(height, int) or height != width:
        raise UserError(f"{path}: images of size {size}: only square ones are supported")
    if height != default[-1]:
        arguments["img_size"] = height
    return arguments


def _default_preprocessing() -> dict[str, JsonValue]:
    """Return timm's preprocessing for a ``config.json`` that states none."""
    default = PretrainedCfg().to_dict()
    return {name: default[name] for name in ("mean", "std", "interpolation", "crop_pct", "crop_mode")}


def _architecture_cfg(architecture: str) -> dict[str, JsonValue]:
    """Return timm's ``pretrained_cfg`` for ``architecture``; empty if it has none."""
    known = timm.get_pretrained_cfg(architecture, allow_unregistered=True)
    return known.to_dict() if known else {}


def arguments_from_weights(name: str, file: WeightsFile) -> dict[str, int]:
    """Return the arguments for timm that the shapes in a file of weights imply, if they differ from timm's defaults.

    These are the number of classes (0 for a file without a head) and of image channels. Empty if the file cannot be
    read or does not fit; loading it reports that.
    """
    cfg, shapes = _architecture_cfg(name), shapes_if_readable(file.path)
    head, first = _first(cfg.get("classifier")), _first(cfg.get("first_conv"))
    if shapes is None or head is None or first is None:
        return {}
    try:
        with torch.device("meta"):
            usual = {n: tuple(t.shape) for n, t in timm.create_model(name).state_dict().items()}
        stored = unwrap_names(shapes)
        parts = find_parts(stored, [n for n in usual if not n.startswith(f"{head}.")])
        part = parts[0] if file.part is None else choose_part(parts, file.part, file.path)
        conv, usual_conv = shapes[stored[part.names[f"{first}.weight"]]], usual[f"{first}.weight"]
        classes = shapes.get(stored.get(f"{part.prefix}{head}.weight", ""), (0,))[0]
    except (UserError, NotImplementedError, RuntimeError, LookupError):
        return {}
    arguments = {} if classes == usual.get(f"{head}.weight", (0,))[0] else {"num_classes": classes}
    if len(conv) == _CONV_DIMS == len(usual_conv) and conv[1] != usual_conv[1]:
        arguments["in_chans"] = conv[1]
    return arguments


def _first(names: JsonValue) -> str | None:
    return names if isinstance(names, str) else next(iter(names or ()), None)
