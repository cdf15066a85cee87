"""How values show themselves in a notebook."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from html import escape

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

Row = Sequence[str]
_WIDTH = 100
_BLOCK = '<pre style="line-height:normal;font-family:monospace">{code}</pre>'


def html_of(renderable: RenderableType) -> str:
    """What a terminal would show, as a piece of HTML with its colours inline."""
    console = Console(file=io.StringIO(), record=True, width=_WIDTH, force_jupyter=False, force_terminal=True)
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format=_BLOCK)


def framed(page: str) -> str:
    """A whole page in a frame of its own, so that its style is not that of the notebook, nor the other way round."""
    return f'<iframe srcdoc="{escape(page)}" sandbox style="width:100%;height:40em;border:0"></iframe>'


def kept_view(title: str, rows: Iterable[tuple[str, str, int, int]]) -> RenderableType:
    """A line for each group, given as name, kind, units and units kept."""
    told = [(name, kind, str(units), str(kept)) for name, kind, units, kept in rows]
    return Group(Text(title, style="bold"), table(("group", "kind", "units", "kept"), told))


def table(heading: Row, rows: Iterable[Row]) -> Table:
    """Return a table of plain text: the first column on the left, the others on the right."""
    made = Table(header_style="dim", box=None, pad_edge=False)
    for index, column in enumerate(heading):
        made.add_column(column, justify="left" if index == 0 else "right", overflow="fold")
    for row in rows:
        made.add_row(*(Text(cell) for cell in row))
    return made
