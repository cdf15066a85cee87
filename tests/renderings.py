"""Renderings as plain text, for golden files."""

import re
from collections.abc import Callable
from html.parser import HTMLParser
from io import StringIO

from rich.console import Console, RenderableType

CheckGolden = Callable[[str, str], None]
"""The fixture ``check_golden`` of conftest.py: name of the file, whole text."""

_HIDDEN = {"style", "script", "svg", "title"}
_INLINE = {"a", "b", "code", "em", "i", "small", "span", "strong", "sub", "sup", "wbr"}
_CELLS = {"td", "th"}


def terminal_text(view: RenderableType, width: int = 100) -> str:
    """Return ``view`` as a terminal of ``width`` columns shows it, without colours."""
    stream = StringIO()
    Console(file=stream, width=width, color_system=None, force_terminal=False, force_jupyter=False).print(view)
    return stream.getvalue()


def visible_text(page: str) -> str:
    """Return the text of an HTML page that a reader sees: a line a block, cells of tables divided by ``|``."""
    reader = _Reader()
    reader.feed(page)
    lines = (re.sub(r"\s+", " ", line).strip(" |") for line in "".join(reader.pieces).split("\n"))
    return "\n".join(line for line in lines if line)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in _HIDDEN
        if tag in _CELLS:
            self.pieces.append(" | ")
        self._divide(tag)

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in _HIDDEN
        self._divide(tag)

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.pieces.append(data.replace("\n", " "))

    def _divide(self, tag: str) -> None:
        if tag not in _INLINE | _CELLS and not self.hidden:
            self.pieces.append("\n")
