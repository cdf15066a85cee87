"""The one error type of the exporters."""

from __future__ import annotations


class ExportError(Exception):
    """An export that cannot be made or trusted. The message is one line that says what is wrong and what to do."""


def first_line(error: BaseException) -> str:
    """The most telling single line of an exception whose text spans paragraphs, as torch's do."""
    lines = [line.strip().lstrip("- ") for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return next((line for line in lines if "specialized it to be a constant" in line), lines[0])
