"""Reading a recipe file: YAML with one mapping, which may be malformed or hostile."""

from pathlib import Path
from typing import NamedTuple

import yaml

from optin_deploy.errors import UserError

# Far more than all options written out.
_MOST_BYTES = 1 << 20
_DEEPEST = 16


class FileOptions(NamedTuple):
    """Options in a file by name, not validated, and the line that holds each, like "r.yaml, line 3"."""

    values: dict[str, object]
    lines: dict[str, str]


class _Loader(yaml.SafeLoader):
    """Refuses aliases and deep nesting: the parser's time grows with the square of the depth."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{_line(event)}: an alias (*{event.anchor}); write the value out")
        if self.depth > _DEEPEST:
            raise yaml.YAMLError("it is nested too deeply")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_options(file: Path) -> FileOptions:
    """Return the options in a YAML file.

    Raises:
        UserError: the file is not YAML with one mapping, or it has tags other than YAML's own, aliases, or options
            given twice. The message names the line if there is one.
    """
    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is not a file")
        if file.stat().st_size > _MOST_BYTES:
            raise ValueError("it is larger than 1 MiB, which no recipe is")
        loader = _Loader(file.read_text(encoding="utf-8"))
        loader.name = str(file)
        node = loader.get_single_node()
        lines = _lines(node) if isinstance(node, yaml.MappingNode) else {}
        values = loader.construct_document(node) if node is not None else None
    except (OSError, yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"recipe {file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {file} must be a mapping of options, like `flops: 0.5`")
    return FileOptions({str(name): value for name, value in values.items()}, lines)


def _lines(node: yaml.MappingNode) -> dict[str, str]:
    lines: dict[str, str] = {}
    for key, _ in node.value:
        name = str(key.value)
        if name in lines:
            raise UserError(f"{_line(key)}: {name} is given twice, first in {lines[name]}")
        lines[name] = _line(key)
    return lines


def _line(item: yaml.Event | yaml.Node) -> str:
    mark = item.start_mark
    return f"{mark.name}, line {mark.line + 1}" if mark else "the file"
