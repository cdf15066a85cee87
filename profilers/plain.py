"""Dataclasses as JSON and back."""

import json
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, TypeVar, cast, get_args, get_origin, get_type_hints

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

T = TypeVar("T")


def to_json(value: "DataclassInstance") -> str:
    """Return a dataclass as JSON; paths become absolute, because the reader may run in another folder."""
    return json.dumps(asdict(value), default=lambda path: str(Path(path).resolve()))


def from_plain(kind: type[T], data: object) -> T:
    """Return the value of type ``kind`` that JSON turned into plain ``data``.

    Supports dataclasses of plain values, paths, tuples, lists and string-keyed mappings of them, and ``X | None``.

    Raises:
        TypeError: a field is missing or unknown, or ``data`` is not a mapping where ``kind`` is a dataclass.
    """
    return cast(T, _read(kind, data))


def _read(kind: Any, data: Any) -> object:
    if is_dataclass(kind):
        if not isinstance(data, Mapping):
            raise TypeError(f"{kind} needs a mapping, not {type(data)}")
        hints = get_type_hints(kind)
        return cast(type, kind)(**{name: _read(hints.get(name), value) for name, value in data.items()})
    if kind is Path:
        return Path(data)
    origin, arguments = get_origin(kind), get_args(kind)
    if data is not None and NoneType in arguments:
        return _read(arguments[0], data)
    if origin is tuple:
        # ``tuple[X, ...]`` or ``tuple[X, Y]`` with X and Y of one kind.
        return tuple(_read(arguments[0], item) for item in data)
    if origin is dict:
        return {name: _read(arguments[1], value) for name, value in data.items()}
    return data
