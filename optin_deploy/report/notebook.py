"""How values show themselves in a notebook."""

from __future__ import annotations

import io
from html import escape

from rich.console import Console, RenderableType

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
