"""Networks of timm's in a user's files: a directory as timm saves it, and the classes that weights tell apart."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import timm
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError, safe_open
from timm.models import PretrainedCfg

from optin_deploy.errors import UserError
from optin_deploy.network import Source
from optin_deploy.places import regular

# Far more than any network has of anything but classes: a depth without end would be built until memory is full.
_MOST = 10_000
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
        weights: the file, which may be missing.
    """

    source: Source
    pretrained_cfg: Mapping[str, Any]
    weights: Path


class _Preparing(BaseModel):
    """What is read of ``pretrained_cfg``; what it does not say is timm's default, whatever the architecture."""

    model_config = ConfigDict(frozen=True, allow_inf_nan=False)

    input_size: tuple[Literal[3], _Pixels, _Pixels] | None = None
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
        weights=directory / "model.safetensors",
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


def classes_in(name: str, weights: Path) -> int | None:
    """How many classes the network ``name`` tells apart by a file of its weights, where they are other than timm's own.

    A file without the head is one of a network that gives features: 0. None where the file is as timm's own, or cannot
    be read, which loading it will tell.
    """
    own = _own(name)
    heads = own.get("classifier")
    head = heads if isinstance(heads, str) else next(iter(heads or ()), None)
    if head is None or weights.suffix != ".safetensors":
        return None
    try:
        with safe_open(regular(weights), framework="pt") as file:
            # Data parallel training puts "module." before every name.
            tensors = {name.removeprefix("module."): name for name in file.keys()}  # noqa: SIM118
            if f"{head}.weight" not in tensors:
                return 0 if f"{own.get('first_conv')}.weight" in tensors else None
            classes: int = file.get_slice(tensors[f"{head}.weight"]).get_shape()[0]
    except (OSError, SafetensorError, IndexError):
        return None
    return None if classes == own.get("num_classes") else classes
