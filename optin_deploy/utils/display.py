"""Tables as values, and values as displayed in a terminal and in a notebook."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

from rich import table as rich_table
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.text import Text

Cell = str | Text
WIDTH = 100
"""Columns of a terminal that every summary fits into."""

_BLOCK = '<pre style="line-height:normal;font-family:monospace">{code}</pre>'


@dataclass(frozen=True)
class Table:
    """A heading and rows of text, which `render_table` and `report.markdown.table` render.

    Attributes:
        heading: names of the columns.
        rows: one cell for each column; no cell is read as markup.
        left: indices of the columns that are aligned on the left.
        widths: column index -> its largest width in the terminal.
        fold_figures: whether columns on the right may be folded where the terminal is narrow.
    """

    heading: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    left: frozenset[int] = frozenset({0})
    widths: Mapping[int, int] = field(default_factory=dict)
    fold_figures: bool = True


def render_table(table: Table, title: str = "") -> RenderableType:
    """Return the table for a rich console, below its title if it has one."""
    rendered = rich_table.Table(header_style="dim", box=None, pad_edge=False)
    for index, name in enumerate(table.heading):
        is_left = index in table.left
        rendered.add_column(
            Text(name),
            justify="left" if is_left else "right",
            overflow="fold",
            no_wrap=not (is_left or table.fold_figures),
            max_width=table.widths.get(index),
        )
    for row in table.rows:
        rendered.add_row(*(Text(cell) if isinstance(cell, str) else cell for cell in row))
    # A title of rich's table would be folded to the width of the table.
    return Group(Text(title, style="bold"), rendered) if title else rendered


def render_kept(title: str, rows: Iterable[tuple[str, str, int, int]]) -> RenderableType:
    """Return a table of pruned groups, each as its name, kind, number of units and number of units kept."""
    cells = [(name, kind, str(units), str(kept)) for name, kind, units, kept in rows]
    return render_table(Table(("group", "kind", "units", "kept"), cells), title)


def render_banner(text: str, *, alarm: bool) -> Panel:
    """Return a framed sentence: red for an alarm, yellow for a notice."""
    style = "bold red" if alarm else "yellow"
    return Panel(Text(text), border_style=style, style=style, width=WIDTH)


def html_of(renderable: RenderableType) -> str:
    """Return what a terminal would show, as HTML with inline colours."""
    console = Console(file=io.StringIO(), record=True, width=WIDTH, force_jupyter=False, force_terminal=True)
    console.print(renderable)
    return console.export_html(inline_styles=True, code_format=_BLOCK)


def html_frame(page: str) -> str:
    """Return a whole page in an ``<iframe>``, so that its style and the notebook's do not mix."""
    return f'<iframe srcdoc="{escape(page)}" sandbox style="width:100%;height:40em;border:0"></iframe>'
