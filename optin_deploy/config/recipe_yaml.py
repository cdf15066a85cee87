"""Reading a recipe file: YAML with one mapping, which may be malformed or hostile."""

from dataclasses import dataclass
from pathlib import Path

import yaml

from optin_deploy.errors import UserError

# Far more than all options written out.
_MOST_BYTES = 1 << 20
_DEEPEST = 16


@dataclass(frozen=True)
class FileOptions:
    """The options in a recipe file, not validated.

    Attributes:
        values: by name.
        lines: where each option is, like "r.yaml, line 3", by name.
    """

    values: dict[str, object]
    lines: dict[str, str]


class _Loader(yaml.SafeLoader):
    """Refuses aliases and deep nesting: the time of the parser grows with the square of the depth."""

    def __init__(self, text: str, file: Path) -> None:
        super().__init__(text)
        self.file, self.depth = file, 0

    def line_of(self, item: yaml.Event | yaml.Node) -> str:
        return f"{self.file}, line {item.start_mark.line + 1 if item.start_mark else '?'}"

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise UserError(f"{self.line_of(event)}: an alias (*{event.anchor}); write the value out")
        if self.depth > _DEEPEST:
            raise UserError(f"recipe {self.file} cannot be read: it is nested too deeply")
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
    text = _read(file)
    try:
        loader = _Loader(text, file)
        node = loader.get_single_node()
        lines = _lines(loader, node) if isinstance(node, yaml.MappingNode) else {}
        values = loader.construct_document(node) if node is not None else None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"recipe {file} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"recipe {file} must be a mapping of options, like `flops: 0.5`")
    return FileOptions({str(name): value for name, value in values.items()}, lines)


def _read(file: Path) -> str:
    try:
        if file.exists() and not file.is_file():
            raise UserError(f"recipe {file} cannot be read: it is not a file")
        if file.stat().st_size > _MOST_BYTES:
            raise UserError(f"recipe {file} cannot be read: it is larger than 1 MiB, which no recipe is")
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"recipe {file} cannot be read: {' '.join(str(error).split())}") from error


def _lines(loader: _Loader, node: yaml.MappingNode) -> dict[str, str]:
    lines: dict[str, str] = {}
    for key, _ in node.value:
        name = str(key.value)
        if name in lines:
            raise UserError(f"{loader.line_of(key)}: {name} is given twice, first in {lines[name]}")
        lines[name] = loader.line_of(key)
    return lines
