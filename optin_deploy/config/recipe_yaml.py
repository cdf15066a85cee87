"""Reading a recipe file: YAML of one mapping, as anybody may have written it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from optin_deploy.errors import UserError

# Far more than every option written out.
_MOST_BYTES = 1 << 20
_DEEPEST = 16


@dataclass(frozen=True)
class FileOptions:
    """What a recipe file holds: values by name, not validated, and where each one stands, as "r.yaml, line 3"."""

    values: dict[str, Any]
    places: dict[str, str]


def read_options(file: Path) -> FileOptions:
    """The options in a YAML file; tags other than YAML's own, aliases and options given twice are refused.

    Raises:
        UserError: one line with the place in the file where there is one.
    """
    text = _text(file)
    try:
        depth = 0
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            # The parser's time grows with the square of the depth.
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if depth > _DEEPEST:
                raise UserError(f"recipe {file} cannot be read: it is nested too deeply")
            if isinstance(event, yaml.AliasEvent):
                raise UserError(f"{_place(file, event)}: an alias (*{event.anchor}); write the value out")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"recipe {file} cannot be read: {' '.join(str(error).split())}") from error
    except RecursionError:
        raise UserError(f"recipe {file} cannot be read: it is nested too deeply") from None
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise UserError(f"recipe {file} must be a mapping of options, like `flops: 0.5`")
    return FileOptions({str(name): value for name, value in values.items()}, _places(file, node))


def _text(file: Path) -> str:
    try:
        if file.exists() and not file.is_file():
            raise UserError(f"recipe {file} cannot be read: it is no file")
        if file.stat().st_size > _MOST_BYTES:
            raise UserError(f"recipe {file} cannot be read: it is larger than 1 MiB, which no recipe is")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {file} cannot be read: {' '.join(str(error).split())}") from error


def _places(file: Path, node: yaml.MappingNode) -> dict[str, str]:
    places: dict[str, str] = {}
    for key, _ in node.value:
        if key.value in places:
            raise UserError(f"{_place(file, key)}: {key.value} is given twice, first in {places[key.value]}")
        places[str(key.value)] = _place(file, key)
    return places


def _place(file: Path, at: Any) -> str:
    return f"{file}, line {at.start_mark.line + 1}"
