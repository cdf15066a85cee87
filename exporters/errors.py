"""The one error type of the exporters."""


class ExportError(Exception):
    """An export cannot be made or trusted. The message is one line: what is wrong and what to do."""


def first_line(error: BaseException) -> str:
    """Return the line of a long exception, as torch has them, that says most about its cause."""
    lines = [line.strip().lstrip("- ") for line in str(error).splitlines() if line.strip()]
    if not lines:
        return type(error).__name__
    return next((line for line in lines if "specialized it to be a constant" in line), lines[0])
